"""What an edit changes, matrix by matrix, as figures (mathematics only, except that the base's norms may be read)."""

from dataclasses import dataclass

from rotate_edit.edits.edit import Edit
from rotate_edit.edits.totals import Total, total_changes
from rotate_edit.edits.writing.rewrite import plan_edit
from rotate_edit.models.checkpoint import Checkpoint, read_place

ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class MatrixDiff:
    """What an edit does to one matrix.

    Attributes:
        address: "L3.out", "L3.E1.gate" or "unembedding", for instance.
        tensor: Name of the stored tensor, None when no base was at hand.
        rows: How many vectors change.
        rank: In how many directions they change.
        largest: The largest |change| of a number.
        norm: Frobenius norm of the change.
        relative: Frobenius norm of the change over that of the whole matrix. None without a base.
    """

    address: str
    tensor: str | None
    rows: int
    rank: int
    largest: float
    norm: float
    relative: float | None


def diff(edit: Edit, base: Checkpoint | None = None) -> list[MatrixDiff]:
    """List what an edit changes. What became of each neuron is in `edit.vectors`.

    Args:
        edit: The edit.
        base: The base. Without it the figures come from the edit alone.

    Returns:
        One row for each matrix the edit changes.

    Raises:
        BadInput: When the base does not fit the edit.
    """
    if base is None:
        return [_row(total, None, None) for total in total_changes(edit.changes)]
    rows = []
    for name, touched in plan_edit(base, edit).items():
        for entry in touched:
            if entry.total is not None:
                weights = read_place(base, entry.place, entry.expert)
                rows.append(_row(entry.total, name, float(weights.double().norm())))
    return rows


def _row(total: Total, tensor: str | None, whole: float | None) -> MatrixDiff:
    largest, squares = 0.0, 0.0
    for first in range(0, len(total.rows), ROWS_AT_ONCE):
        change = total.left[first : first + ROWS_AT_ONCE] @ total.right
        largest = max(largest, float(change.abs().max()))
        squares += float(change.square().sum())
    norm = squares**0.5
    relative = None if not whole else norm / whole
    return MatrixDiff(address(total), tensor, len(total.rows), len(total.right), largest, norm, relative)


def address(total: Total) -> str:
    """Return the address of a changed matrix, for instance "L3.out".

    Args:
        total: The matrix's total change.

    Returns:
        The address.
    """
    if total.layer is None:
        return total.matrix
    return f"L{total.layer}" + ("" if total.expert is None else f".E{total.expert}") + f".{total.matrix}"
