"""Read the header of a GGUF file: what its keys say and where every tensor lies.

A file begins with four magic bytes, a version and two counts. Then come keys with their values, then name, shape, type
and place of every tensor, then the tensors' bytes (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). A file
is untrusted until its header has been checked here: every count, length and place is compared with the file's size
before anything is made of it.
"""

import hashlib
import math
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rotate_edit.errors import BadInput, quoted

MAGIC = b"GGUF"
VERSIONS = (2, 3)
LARGEST_HEADER = 1 << 28
MOST_KEYS = 10_000
MOST_TENSORS = 100_000
MOST_ENTRIES = 4_000_000
MOST_DIMENSIONS = 4
LARGEST_DIMENSION = 2**32
LARGEST_ALIGNMENT = 1 << 16
LONGEST_KEY = 200
LONGEST_TEXT = 1 << 22
# No token of a real vocabulary is nearly as long, and splitting one into merges takes the square of its length.
LONGEST_ENTRY = 1024

# The value types of a fixed size by their number in the file, as struct writes them; text and arrays have none.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9


@dataclass(frozen=True)
class PackedTensor:
    """Where one tensor lies in a GGUF file.

    Attributes:
        name: Its name, such as "blk.0.ffn_up.weight".
        kind: Its type, such as "Q4_0".
        shape: Its shape when it is unpacked, rows first as torch has it.
        start: Its first byte, counted from the beginning of the file.
        end: The byte after its last one.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class GgufHeader:
    """A checked header.

    Attributes:
        architecture: What `general.architecture` says, such as "llama".
        keys: Every key with its value: a number, a truth value or a text. Of an array only its length is kept, as
            (length,).
        tensors: The tensors by name, in the file's order.
        digest: SHA-256 of the header's bytes.
    """

    architecture: str
    keys: dict[str, Any]
    tensors: dict[str, PackedTensor]
    digest: str


@dataclass
class _Reader:
    """The header's bytes and how far they are read. Every step checks that the file goes on that far."""

    file: str
    data: mmap.mmap
    place: int = 0

    def skip(self, count: int) -> int:
        """Go `count` bytes further. Returns where they begin."""
        start, end = self.place, self.place + count
        if end > len(self.data):
            raise BadInput(f"{self.file} is cut short: its header goes on past the end of the file.")
        if end > LARGEST_HEADER:
            raise BadInput(f"{self.file} has a header of over {LARGEST_HEADER >> 20} MiB, which no model needs.")
        self.place = end
        return start

    def number(self, form: str) -> Any:
        """One number, in struct's notation."""
        return struct.unpack_from("<" + form, self.data, self.skip(struct.calcsize("<" + form)))[0]

    def bytes(self, longest: int, what: str) -> bytes:
        """A text with its length before it, as bytes."""
        length = self.number("Q")
        if length > longest:
            raise BadInput(f"{self.file} has {what} of {length:,} bytes; none may be longer than {longest:,}.")
        start = self.skip(length)
        return self.data[start : start + length]

    def text(self, longest: int, what: str) -> str:
        """A text with its length before it."""
        try:
            return self.bytes(longest, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadInput(f"{self.file} has {what} that is not valid UTF-8.") from error


def read_gguf_header(path: Path) -> GgufHeader:
    """Read and check the header of a GGUF file. No weight is read.

    Args:
        path: The file.

    Returns:
        The checked header.

    Raises:
        BadInput: If the file cannot be read, is no whole GGUF file, is one part of several, holds a type that cannot
            be unpacked, or says something impossible.
    """
    file = path.name
    try:
        if not path.is_file():
            raise BadInput(f"there is no file {path}.")
        with open(path, "rb") as stream:
            if stream.read(4) != MAGIC:
                raise BadInput(f"{file} is no GGUF file: it does not begin with the letters GGUF.")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _read(_Reader(file, data, len(MAGIC)))
    except OSError as error:
        raise BadInput(f"{file} cannot be read ({error.strerror}).") from error


def _read(reader: _Reader) -> GgufHeader:
    file = reader.file
    version = reader.number("I")
    if version not in VERSIONS:
        raise BadInput(
            f"{file} is GGUF version {version}; versions {' and '.join(map(str, VERSIONS))} of little-endian machines "
            "can be read."
        )
    tensor_count, key_count = reader.number("Q"), reader.number("Q")
    if not 0 < tensor_count <= MOST_TENSORS or key_count > MOST_KEYS:
        raise BadInput(f"{file} says that it holds {tensor_count:,} tensors and {key_count:,} keys; no model does.")
    keys: dict[str, Any] = {}
    for _ in range(key_count):
        key = reader.text(LONGEST_KEY, "the name of a key")
        if key in keys:
            raise BadInput(f"{file} has the key {quoted(key)} twice.")
        keys[key] = _value(reader, key)
    _check_whole(file, keys)
    rows = [_tensor(reader) for _ in range(tensor_count)]
    alignment = keys.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= LARGEST_ALIGNMENT or alignment & (alignment - 1):
        raise BadInput(f"{file} has a general.alignment that is not a power of two up to {LARGEST_ALIGNMENT}.")
    digest = hashlib.sha256(reader.data[: reader.place]).hexdigest()
    data_start = -(-reader.place // alignment) * alignment
    tensors: dict[str, PackedTensor] = {}
    for name, shape, kind, offset in rows:
        if name in tensors:
            raise BadInput(f"{file} has the tensor {name} twice.")
        tensors[name] = _placed(reader, name, shape, kind, data_start, offset, alignment)
    _check_apart(file, tensors)
    architecture = keys.get("general.architecture")
    if not isinstance(architecture, str):
        raise BadInput(f"{file} does not say its general.architecture.")
    return GgufHeader(architecture, keys, tensors, digest)


def _value(reader: _Reader, key: str) -> Any:
    kind = reader.number("I")
    if kind in _NUMBERS:
        return reader.number(_NUMBERS[kind])
    if kind == _TEXT:
        return reader.text(LONGEST_TEXT, f"a text under {quoted(key)}")
    if kind != _ARRAY:
        raise BadInput(f"{reader.file} has a value of the unknown type {kind} under {quoted(key)}.")
    entries, count = reader.number("I"), reader.number("Q")
    if count > MOST_ENTRIES:
        raise BadInput(f"{reader.file} has {count:,} entries under {quoted(key)}; more than {MOST_ENTRIES:,} are none.")
    if entries in _NUMBERS:
        reader.skip(count * struct.calcsize("<" + _NUMBERS[entries]))
    elif entries == _TEXT:
        for _ in range(count):
            reader.bytes(LONGEST_ENTRY, f"an entry under {quoted(key)}")
    else:
        raise BadInput(f"{reader.file} has an array of the unknown type {entries} under {quoted(key)}.")
    return (count,)


def _check_whole(file: str, keys: dict[str, Any]) -> None:
    """Refuse a part of a model. Raises BadInput."""
    kind, parts = keys.get("general.type", "model"), keys.get("split.count", 1)
    if kind != "model":
        raise BadInput(f"{file} holds {quoted(kind)} and not a model.")
    if parts != 1:
        raise BadInput(
            f"{file} is one of {parts} parts of a model; join them with `llama-gguf-split --merge` of llama.cpp."
        )


def _tensor(reader: _Reader) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, type and offset of a tensor."""
    raw = reader.bytes(LONGEST_KEY, "the name of a tensor")
    name = raw.decode("utf-8", "replace")
    if re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", name, flags=re.ASCII) is None:
        raise BadInput(f"{reader.file} names a tensor {quoted(name)}, which is not a plain tensor name.")
    count = reader.number("I")
    if not 0 < count <= MOST_DIMENSIONS:
        raise BadInput(f"{reader.file} says that {name} has {count:,} dimensions; 1 to {MOST_DIMENSIONS} are possible.")
    # The file has the dimension that moves fastest first.
    shape = tuple(reversed([reader.number("Q") for _ in range(count)]))
    if not all(0 < number <= LARGEST_DIMENSION for number in shape):
        raise BadInput(f"{reader.file} says that {name} has the shape {list(shape)}, which is not a possible one.")
    return name, shape, reader.number("I"), reader.number("Q")


def _placed(
    reader: _Reader, name: str, shape: tuple[int, ...], number: int, data_start: int, offset: int, alignment: int
) -> PackedTensor:
    kind, elements, size = _packing(reader.file, name, number)
    if shape[-1] % elements:
        raise BadInput(
            f"{reader.file} has rows of {shape[-1]} numbers in {name}, which blocks of {elements} ({kind}) cannot fill."
        )
    start = data_start + offset
    end = start + math.prod(shape) // elements * size
    if end > len(reader.data):
        raise BadInput(f"{reader.file} is cut short or damaged: {name} would end after the end of the file.")
    if offset % alignment:
        raise BadInput(f"{reader.file} is damaged: {name} does not begin at a multiple of {alignment} bytes.")
    return PackedTensor(name, kind, shape, start, end)


def _packing(file: str, name: str, number: int) -> tuple[str, int, int]:
    """Name of a tensor type, numbers in a block and bytes of one. Raises BadInput for one that cannot be unpacked."""
    import numpy
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    known = {int(kind): kind for kind in GGMLQuantizationType}
    if number not in known or known[number] not in GGML_QUANT_SIZES:
        raise BadInput(f"{file} stores {name} as type {number}, which is not known; convert the file to Q8_0 or F16.")
    kind = known[number]
    elements, size = GGML_QUANT_SIZES[kind]
    try:
        dequantize(numpy.zeros((1, size), numpy.uint8), kind)
    except NotImplementedError as error:
        raise BadInput(
            f"{file} stores {name} as {kind.name}, which cannot be unpacked; convert the file to Q8_0 or F16."
        ) from error
    return kind.name, elements, size


def _check_apart(file: str, tensors: dict[str, PackedTensor]) -> None:
    """Refuse tensors that share bytes: a small file could claim to hold any number of them. Raises BadInput."""
    end = 0
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.start):
        if tensor.start < end:
            raise BadInput(f"{file} is damaged: the bytes of {tensor.name} overlap those of another tensor.")
        end = tensor.end
