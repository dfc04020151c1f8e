"""What an exact undo needs: the original vectors of every touched matrix.

They are in one safetensors file beside the edit.
"""

import json
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rotate_edit.edits.edit import MATRICES
from rotate_edit.edits.writing.rewrite import Rounding, Touched
from rotate_edit.errors import BadInput
from rotate_edit.files import file_inside, whole_file
from rotate_edit.models.checkpoint import Checkpoint, read_place
from rotate_edit.models.layout import matrix_shape
from rotate_edit.models.safetensors_file import Header, Stored, read_header, read_stored, read_stored_rows

UNDO = "undo.safetensors"
FORMAT = "rotate-edit undo"


@dataclass(frozen=True)
class Undo:
    """An undo file that was read.

    Attributes:
        edit: Identity of the edit.
        hashes: SHA-256 {"before", "after"} of each tensor, by its name.
        entries: Which matrix of which tensor the numbered originals belong to.
        header: The file's header, which says where the originals are.
        path: The file.
    """

    edit: str
    hashes: dict[str, dict[str, str]]
    entries: list[dict[str, Any]]
    header: Header
    path: Path


def write_undo(
    checkpoint: Checkpoint,
    touched: dict[str, list[Touched]],
    hashes: dict[str, dict[str, str]],
    edit: str,
    edit_folder: Path,
) -> None:
    """Write `undo.safetensors`: rows and original vectors of everything touched.

    One matrix is in memory at a time. The file holds the removed capability, so it is for the editor and not for
    publication. It replaces an older undo file.

    Args:
        checkpoint: The base.
        touched: The touched vectors by tensor name (see `plan_edit`).
        hashes: SHA-256 {"before", "after"} of each touched tensor, by its name.
        edit: Identity of the edit.
        edit_folder: The edit's folder.

    Raises:
        ValueError: When a touched vector does not belong to an edit.
        BadInput: When the folder may not be written.
        Failure: When the disk is full or fails.
    """
    entries: list[dict[str, Any]] = []
    layout: list[tuple[str, str, tuple[int, ...], int]] = []
    for name, parts in touched.items():
        for part in parts:
            if part.total is None:
                raise ValueError("only the touched tensors of an edit have an undo")
            number = len(entries)
            width = matrix_shape(checkpoint.stored[name], part.place)[1]
            total = part.total
            entries.append({"tensor": name, "matrix": total.matrix, "layer": total.layer, "expert": total.expert})
            layout.append((f"{number}.rows", "I64", (len(part.rows),), 8))
            dtype = checkpoint.stored[name].dtype
            layout.append((f"{number}.original", dtype, (len(part.rows), width), checkpoint.stored[name].itemsize))
    content = {"format": FORMAT, "version": 1, "edit": edit, "hashes": hashes, "entries": entries}
    header: dict[str, object] = {"__metadata__": {"rotate_edit": json.dumps(content)}}
    end = 0
    for name, dtype, shape, itemsize in layout:
        start, end = end, end + math.prod(shape) * itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with whole_file(edit_folder / UNDO, overwrite=True) as temporary, open(temporary, "wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        for parts in touched.values():
            for part in parts:
                original = read_place(checkpoint, part.place, part.expert, part.rows).contiguous()
                stream.write(part.rows.contiguous().numpy().data)
                stream.write(original.view(-1).view(torch.uint8).numpy().data)


def read_undo(edit_folder: Path) -> Undo:
    """Open the undo file of an edit folder.

    Args:
        edit_folder: The edit's folder.

    Returns:
        The undo file, with its header read.

    Raises:
        BadInput: When there is no undo file or it is not a consistent one.
    """
    if not (edit_folder / UNDO).is_file():
        raise BadInput(f'"{edit_folder}" has no {UNDO}, without which nothing is undone exactly; take the base again.')
    path = file_inside(edit_folder, UNDO)
    header = read_header(path, UNDO)
    wrong = BadInput(f"{UNDO} was not written by this package, or it is damaged.")
    try:
        content = json.loads(header.metadata.get("rotate_edit", ""))
    except (ValueError, RecursionError) as error:
        raise wrong from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("version") != 1:
        raise wrong
    edit, hashes, entries = content.get("edit"), content.get("hashes"), content.get("entries")
    if not (isinstance(edit, str) and isinstance(hashes, dict) and isinstance(entries, list)):
        raise wrong
    if not all(
        isinstance(pair, dict) and isinstance(pair.get("before"), str) and isinstance(pair.get("after"), str)
        for pair in hashes.values()
    ):
        raise wrong
    return Undo(edit, hashes, entries, header, path)


def plan_undo(checkpoint: Checkpoint, undo: Undo) -> dict[str, list[Touched]]:
    """Find which vectors of a patched checkpoint get their originals back.

    Args:
        checkpoint: The patched checkpoint.
        undo: The undo file.

    Returns:
        The vectors by tensor name.

    Raises:
        BadInput: When the undo file does not fit the checkpoint or lacks originals.
    """
    touched: dict[str, list[Touched]] = {}
    for number, entry in enumerate(undo.entries):
        wrong = BadInput(f"entry {number} of {UNDO} does not fit {checkpoint.source}.")
        if not isinstance(entry, dict) or entry.get("matrix") not in MATRICES:
            raise wrong
        tensor, layer, expert = entry.get("tensor"), entry.get("layer"), entry.get("expert")
        if not isinstance(tensor, str) or any(type(position) not in (int, type(None)) for position in (layer, expert)):
            raise wrong
        place = checkpoint.place(entry["matrix"], layer, expert)
        tables = {checkpoint.place(table).name for table in ("embedding", "unembedding")}
        if tensor not in undo.hashes or not (tensor == place.name or (place.name in tables and tensor in tables)):
            raise wrong
        place = replace(place, name=tensor)
        rows, original = (undo.header.tensors.get(f"{number}.{part}") for part in ("rows", "original"))
        stored = checkpoint.stored[tensor]
        count, width = matrix_shape(stored, place)
        if rows is None or original is None or rows.dtype != "I64" or original.dtype != stored.dtype:
            raise wrong
        if len(rows.shape) != 1 or rows.shape[0] == 0 or original.shape != (rows.shape[0], width):
            raise wrong
        indices = read_stored(undo.path, rows)
        if int(indices[0]) < 0 or int(indices[-1]) >= count or bool((indices[1:] <= indices[:-1]).any()):
            raise wrong
        values = partial(_originals, undo.path, original)
        touched.setdefault(tensor, []).append(Touched(tensor, place, expert, indices, values))
    if set(touched) != set(undo.hashes):
        raise BadInput(f"{UNDO} does not hold the originals of every tensor it lists.")
    return touched


def _originals(path: Path, stored: Stored, old: Tensor, positions: Tensor, width: slice) -> tuple[Tensor, Rounding]:
    return read_stored_rows(path, stored, positions)[:, width], Rounding()
