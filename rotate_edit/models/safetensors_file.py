"""Read safetensors files directly: check the header and fetch single tensors or rows by their place in the file.

A file begins with eight bytes that hold the header's length (little endian). Then comes a JSON header with every
tensor's dtype, shape and byte range. Then come the bytes of the tensors. A file is untrusted until its header has been
checked here.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rotate_edit.errors import BadInput, quoted

LARGEST_HEADER = 100_000_000
LARGEST_DIMENSION = 2**48
MOST_DIMENSIONS = 16
LONGEST_NAME = 500

# Element sizes in bytes, with the torch dtype of those that can be read; the others are only copied.
_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
EDITABLE = ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies in a file.

    Attributes:
        file: Name of the file in the checkpoint folder.
        dtype: Dtype as safetensors writes it, for instance "BF16".
        shape: Shape of the tensor.
        start: First byte of the tensor, counted from the beginning of the file.
        end: The byte after its last one, counted in the same way.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Size of one element in bytes."""
        return _SIZES[self.dtype]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch dtype of the tensor.

        Raises:
            BadInput: If the dtype cannot be read as numbers (packed or unusual ones).
        """
        if self.dtype not in _DTYPES:
            raise BadInput(f"{self.file} stores a tensor as {self.dtype}, which cannot be read as numbers.")
        return _DTYPES[self.dtype]


@dataclass(frozen=True)
class Header:
    """A checked header.

    Attributes:
        tensors: The tensors by name, in the file's order.
        metadata: The header's metadata.
        raw: The length word and the JSON as they stand in the file.
    """

    tensors: dict[str, Stored]
    metadata: dict[str, str]
    raw: bytes


def read_header(path: Path, file: str | None = None) -> Header:
    """Read and check the header of a safetensors file.

    Args:
        path: Path of the file.
        file: Name to use in messages; None for the path's own name.

    Returns:
        The checked header.

    Raises:
        BadInput: If the file cannot be read or is truncated, or its header is not consistent.
    """
    file = file or path.name
    try:
        size = path.stat().st_size
        with open(path, "rb") as stream:
            length = stream.read(8)
            count = int.from_bytes(length, "little")
            if len(length) == 8 and count <= min(LARGEST_HEADER, size - 8):
                length += stream.read(count)
    except OSError as error:
        raise BadInput(f"{file} cannot be read ({error.strerror}).") from error
    return parse_header(length, size, file)


def parse_header(raw: bytes, size: int, file: str) -> Header:
    """Check a header that is given as bytes.

    Args:
        raw: The length word and the JSON.
        size: Size of the whole file in bytes.
        file: Name of the file for messages.

    Returns:
        The checked header.

    Raises:
        BadInput: If the header is cut short, is not valid JSON, or does not describe the file.
    """
    if len(raw) < 8 or int.from_bytes(raw[:8], "little") != len(raw) - 8:
        raise BadInput(f"{file} is not a whole safetensors file: its header is cut short or longer than allowed.")
    try:
        entries = json.loads(raw[8:].decode("utf-8"), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{file} has a header that is not valid JSON or names a tensor twice.") from error
    if not isinstance(entries, dict):
        raise BadInput(f"{file} has a header that is not a table of tensors.")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BadInput(f"{file} has metadata that is not a table of texts.")
    tensors = {name: _stored(name, entry, len(raw), size, file) for name, entry in entries.items()}
    end = len(raw)
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if stored.start != end:
            raise BadInput(f"{file} is damaged: the bytes of {quoted(name)} overlap another tensor or leave a hole.")
        end = stored.end
    if end != size:
        raise BadInput(f"{file} is damaged: its header describes {end} bytes and the file has {size}.")
    return Header(tensors, metadata, raw)


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a key stands twice")
    return entries


def _stored(name: str, entry: object, data_start: int, size: int, file: str) -> Stored:
    wrong = BadInput(f"{file} is damaged: its header entry for {quoted(name)} is not a possible tensor.")
    # Messages and reports show the names, so a name has to be plain text of a sensible length.
    if not name.isprintable() or len(name) > LONGEST_NAME:
        raise wrong
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise wrong
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (isinstance(dtype, str) and isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2):
        raise wrong
    if len(shape) > MOST_DIMENSIONS:
        raise wrong
    # `type(...) is int` and not isinstance: JSON's true would pass for a number.
    if not all(type(number) is int and 0 <= number <= LARGEST_DIMENSION for number in shape + offsets):
        raise wrong
    if dtype not in _SIZES:
        raise BadInput(f"{file} stores {quoted(name)} as {quoted(dtype)}, a number format that is not known.")
    elements = math.prod(shape)
    begin, end = data_start + offsets[0], data_start + offsets[1]
    if end - begin != elements * _SIZES[dtype] or end > size:
        raise wrong
    return Stored(file, dtype, tuple(shape), begin, end)


def read_bytes(path: Path, start: int, end: int) -> Tensor:
    """Read the bytes [start, end) of a file.

    Args:
        path: Path of the file.
        start: First byte.
        end: The byte after the last one.

    Returns:
        The bytes as a writable tensor, uint8 [end - start].

    Raises:
        BadInput: If the file cannot be read or ends before `end`.
    """
    content = torch.empty(end - start, dtype=torch.uint8)
    view = content.numpy().data
    done = 0
    try:
        with open(path, "rb", buffering=0) as stream:
            stream.seek(start)
            while done < len(view):
                count = stream.readinto(view[done:])
                if not count:
                    break
                done += count
    except OSError as error:
        raise BadInput(f"{path.name} cannot be read ({error.strerror}).") from error
    if done < len(view):
        raise BadInput(f"{path.name} is cut short: it ends before byte {end}.")
    return content


def read_stored(path: Path, stored: Stored) -> Tensor:
    """Read a whole tensor.

    Args:
        path: Path of the file.
        stored: Where the tensor lies.

    Returns:
        The tensor in its stored dtype and shape.

    Raises:
        BadInput: If the tensor cannot be read.
    """
    dtype = stored.torch_dtype
    return read_bytes(path, stored.start, stored.end).view(dtype).reshape(stored.shape)


def read_stored_rows(path: Path, stored: Stored, rows: Tensor) -> Tensor:
    """Read some rows of a tensor's first dimension, without reading the others.

    Args:
        path: Path of the file.
        stored: Where the tensor lies.
        rows: Indices of the rows, int64 [n].

    Returns:
        The rows [n, ...] in the stored dtype.

    Raises:
        BadInput: If there is no such row, or the tensor cannot be read.
    """
    dtype = stored.torch_dtype
    if not stored.shape or (len(rows) and not (int(rows.min()) >= 0 and int(rows.max()) < stored.shape[0])):
        raise BadInput(f"{stored.file} holds a tensor of shape {list(stored.shape)} that has no such row.")
    result = torch.empty((len(rows), *stored.shape[1:]), dtype=dtype)
    row_bytes = (stored.end - stored.start) // max(1, stored.shape[0])
    if not result.numel():
        return result
    target = result.view(-1).view(torch.uint8).numpy().data
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise BadInput(f"{path.name} cannot be read ({error.strerror}).") from error
    try:
        for position, row in enumerate(rows.tolist()):
            content = os.pread(descriptor, row_bytes, stored.start + row * row_bytes)
            if len(content) != row_bytes:
                raise BadInput(f"{path.name} is cut short: row {row} of a tensor is missing.")
            target[position * row_bytes : (position + 1) * row_bytes] = content
    finally:
        os.close(descriptor)
    return result
