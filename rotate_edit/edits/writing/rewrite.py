"""What an edit makes of each stored tensor.

It is computed block by block, so that memory does not depend on the model's size.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rotate_edit.edits.edit import Edit
from rotate_edit.edits.totals import Total, rounded, total_changes
from rotate_edit.errors import BadInput
from rotate_edit.models.architectures import Place
from rotate_edit.models.checkpoint import Checkpoint
from rotate_edit.models.layout import matrix_shape
from rotate_edit.models.safetensors_file import Stored, read_bytes

# Elements of a block: 2^22 of them are 8 MB as bfloat16 and 32 MB as the float64 they are computed in.
BLOCK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Rounding:
    """What one rounding to the stored dtype did to a change.

    Attributes:
        elements: How many numbers were to change.
        unchanged: How many of them rounding left as they were.
        largest_change: The largest |change| asked for.
        largest_error: The largest |stored - exact|.
        change_squares: Sum of the squares of the changes.
        error_squares: Sum of the squares of the errors.
    """

    elements: int = 0
    unchanged: int = 0
    largest_change: float = 0.0
    largest_error: float = 0.0
    change_squares: float = 0.0
    error_squares: float = 0.0

    def __add__(self, other: "Rounding") -> "Rounding":
        """Combine two roundings: counts and squares add up, the larger maximum counts."""
        return Rounding(
            self.elements + other.elements,
            self.unchanged + other.unchanged,
            max(self.largest_change, other.largest_change),
            max(self.largest_error, other.largest_error),
            self.change_squares + other.change_squares,
            self.error_squares + other.error_squares,
        )


def rounding_of(old: Tensor, change: Tensor, new: Tensor) -> Rounding:
    """Compute the figures of one rounding.

    Args:
        old: The old numbers, in the stored dtype.
        change: The exact change, float64, of the same shape.
        new: The new numbers, in the stored dtype, of the same shape.

    Returns:
        The figures.
    """
    wanted = change != 0
    error = new.double() - (old.double() + change)
    return Rounding(
        int(wanted.sum()),
        int(((new == old) & wanted).sum()),
        float(change.abs().max()),
        float(error.abs().max()),
        float(change.square().sum()),
        float(error.square().sum()),
    )


NewValues = Callable[[Tensor, Tensor, slice], tuple[Tensor, Rounding]]
"""A function that computes new values of some vectors.

Args:
    old: Old values [k, w], in the stored dtype.
    positions: int64 [k], places among the touched rows.
    width: Slice of d_model, of length w.

Returns:
    New values [k, w] in the stored dtype, and what rounding did to them.
"""


@dataclass(frozen=True)
class Touched:
    """Some neurons' vectors in one stored tensor that get new values.

    Attributes:
        tensor: Name of the tensor.
        place: How the vectors lie in it.
        expert: Index of the expert, None outside experts.
        rows: int64 [n], ascending, the indices of the neurons (or tokens).
        new_values: What the vectors become, in the stored dtype.
        total: The edit's change. None when originals are put back.
    """

    tensor: str
    place: Place
    expert: int | None
    rows: Tensor
    new_values: NewValues
    total: Total | None = None


@dataclass(frozen=True)
class Block:
    """Consecutive bytes of a tensor.

    Attributes:
        start: Offset of the first byte in the file.
        old: uint8 [bytes], as they were.
        new: uint8 [bytes], as they become. The same object as `old` when nothing in them is touched.
        rounding: What rounding did to them.
    """

    start: int
    old: Tensor
    new: Tensor
    rounding: Rounding


def plan_edit(checkpoint: Checkpoint, edit: Edit) -> dict[str, list[Touched]]:
    """Find which stored tensors an edit touches and how.

    With a tied head, embedding and unembedding are one table. Where a file holds it twice, both copies are touched.

    Args:
        checkpoint: The base.
        edit: The edit.

    Returns:
        The touched vectors by tensor name, in the order of the edit's changes.

    Raises:
        BadInput: When the checkpoint has no such matrix, or its shape does not fit the edit.
    """
    changes = edit.changes
    names: dict[str, list[str]] = {"embedding": [], "unembedding": []}
    if any(change.matrix in names for change in changes):
        embedding, head = checkpoint.place("embedding").name, checkpoint.place("unembedding").name
        names = {"embedding": [embedding], "unembedding": [head]}
        if checkpoint.tied:
            names["embedding"] = sorted({embedding, head})
            changes = tuple(
                replace(change, matrix="embedding") if change.matrix == "unembedding" else change for change in changes
            )
    touched: dict[str, list[Touched]] = {}
    for total in total_changes(changes):
        place = checkpoint.place(total.matrix, total.layer, total.expert)
        for name in names.get(total.matrix, [place.name]):
            _check_fit(checkpoint, total, replace(place, name=name))
            entry = Touched(
                name, replace(place, name=name), total.expert, total.rows, _added(checkpoint, name, total), total
            )
            touched.setdefault(name, []).append(entry)
    return touched


def _added(checkpoint: Checkpoint, name: str, total: Total) -> NewValues:
    dtype = checkpoint.stored[name].torch_dtype

    def new_values(old: Tensor, positions: Tensor, width: slice) -> tuple[Tensor, Rounding]:
        change = total.left[positions] @ total.right[:, width]
        new = rounded(old.double() + change, dtype)
        return new, rounding_of(old, change, new)

    return new_values


def _check_fit(checkpoint: Checkpoint, total: Total, place: Place) -> None:
    stored = checkpoint.stored[place.name]
    count, width = matrix_shape(stored, place)
    if total.right.shape[1] != width:
        narrow = " (its table is narrower than the residual stream)" if width != checkpoint.hidden_size else ""
        raise BadInput(
            f"the edit changes vectors of length {total.right.shape[1]}, but those of {place.name} have length "
            f"{width}{narrow}, so it cannot be written there."
        )
    if int(total.rows[-1]) >= count:
        raise BadInput(f"the edit changes row {int(total.rows[-1])} of {place.name}, which has only {count} rows.")


def rewritten(
    checkpoint: Checkpoint, tensor: str, touched: list[Touched], *, elements: int = BLOCK_ELEMENTS
) -> Iterator[Block]:
    """Read the whole stored tensor in blocks, with the touched values replaced.

    Args:
        checkpoint: The checkpoint.
        tensor: Name of the tensor.
        touched: The vectors that get new values.
        elements: About how many numbers a block holds.

    Yields:
        The blocks from the tensor's first byte to its last.
    """
    stored = checkpoint.stored[tensor]
    path = checkpoint.path(stored.file)
    if not touched:
        for start in range(stored.start, stored.end, 2 * elements):
            old = read_bytes(path, start, min(start + 2 * elements, stored.end))
            yield Block(start, old, old, Rounding())
        return
    lines, width = math.prod(stored.shape[:-1]), stored.shape[-1]
    line_bytes = (stored.end - stored.start) // max(1, lines)
    step = max(1, elements // max(1, width))
    for first in range(0, lines, step):
        last = min(lines, first + step)
        start = stored.start + first * line_bytes
        old = read_bytes(path, start, start + (last - first) * line_bytes)
        new, rounding = old, Rounding()
        for entry in touched:
            new, own = _replace_in(old, new, entry, stored, first, last)
            rounding += own
        yield Block(start, old, new, rounding)


def _replace_in(
    old: Tensor, new: Tensor, entry: Touched, stored: Stored, first: int, last: int
) -> tuple[Tensor, Rounding]:
    """Replace the touched values of lines [first, last) in `new`.

    A copy of `old` is made when it is needed.
    """
    count, _ = matrix_shape(stored, entry.place)
    height = stored.shape[-2] if len(stored.shape) > 1 else 1
    above = (entry.expert or 0) * height if entry.place.stacked else 0
    neurons = entry.rows + entry.place.part * count
    rounding = Rounding()
    if entry.place.neurons == "rows":
        lines = neurons + above
        inside = ((lines >= first) & (lines < last)).nonzero().flatten()
        if len(inside):
            new = old.clone() if new is old else new
            matrix = new.view(stored.torch_dtype).view(last - first, -1)
            lines = lines[inside] - first
            matrix[lines], rounding = entry.new_values(matrix[lines], inside, slice(None))
        return new, rounding
    top, bottom = max(first, above), min(last, above + height)
    if top < bottom:
        new = old.clone() if new is old else new
        part = new.view(stored.torch_dtype).view(last - first, -1)[top - first : bottom - first]
        positions, width = torch.arange(len(neurons)), slice(top - above, bottom - above)
        values, rounding = entry.new_values(part[:, neurons].T, positions, width)
        part[:, neurons] = values.T
    return new, rounding
