"""What an edit adds to each matrix in total, and the one rounding that follows (mathematics only)."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from rotate_edit.edits.edit import MatrixChange


@dataclass(frozen=True)
class Total:
    """The sum of all changes of one matrix, `W[rows] += left @ right`, strengths included.

    Attributes:
        matrix: Which matrix, as in MatrixChange.
        layer: Index of the layer, None for the embeddings.
        expert: Index of the expert, None outside experts.
        rows: int64 [n], ascending, the rows that change.
        left: float64 [n, r].
        right: float64 [r, d_model]. Its rows are distinct, so r is the number of distinct directions.
    """

    matrix: str
    layer: int | None
    expert: int | None
    rows: Tensor
    left: Tensor
    right: Tensor


def total_changes(changes: Iterable[MatrixChange]) -> list[Total]:
    """Add up the changes of each matrix.

    Everything is float64. In it float32 factors and their products are exact to 1e-16. So the order of addition does
    not matter to a result that is rounded to float32 or less.

    Args:
        changes: The changes of an edit.

    Returns:
        One Total for each matrix that the changes touch, in the order in which it is first met.
    """
    groups: dict[tuple[str, int | None, int | None], list[MatrixChange]] = {}
    for change in changes:
        groups.setdefault((change.matrix, change.layer, change.expert), []).append(change)
    return [_total(*key, group) for key, group in groups.items()]


def _total(matrix: str, layer: int | None, expert: int | None, changes: list[MatrixChange]) -> Total:
    rows, positions = torch.unique(torch.cat([change.rows for change in changes]), return_inverse=True)
    parts, right = distinct_directions(
        [change.strength * change.left.double() for change in changes], [change.right.double() for change in changes]
    )
    left = torch.zeros(len(rows), len(right), dtype=torch.float64).index_add_(0, positions, parts)
    return Total(matrix, layer, expert, rows, left, right)


def distinct_directions(lefts: list[Tensor], rights: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Write products as one product over distinct directions.

    The products `lefts[i] @ rights[i]` stand one below the other. The result is one product over the distinct rows of
    `rights`.

    Args:
        lefts: float64 [n_i, r_i] each.
        rights: float64 [r_i, d] each.

    Returns:
        left, float64 [sum of n_i, r], and right, float64 [r, d].
    """
    right, directions = torch.unique(torch.cat(rights), dim=0, return_inverse=True)
    parts, first = [], 0
    for left in lefts:
        columns = directions[first : first + left.shape[1]]
        first += left.shape[1]
        # index_add_ and not an assignment, since two directions of one change may be equal.
        parts.append(torch.zeros(len(left), len(right), dtype=torch.float64).index_add_(1, columns, left))
    return torch.cat(parts), right


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float64 values to `dtype` once, to nearest, ties to even.

    torch goes to a 16-bit format by way of float32. Two roundings can miss by one unit in the last place. So the first
    rounding is to odd (Boldo & Melquiond, 2008). It keeps the information that the second rounding needs.

    Args:
        values: float64, of any shape.
        dtype: The dtype to round to.

    Returns:
        The values in `dtype`, of the same shape.
    """
    if dtype in (torch.float64, torch.float32):
        return values.to(dtype)
    nearest = values.float()
    error = values - nearest.double()
    bits = nearest.view(torch.int32)
    # Where float32 is not exact and its last bit is even, step to the odd neighbour on the side of the true value.
    step = torch.where((error > 0) == (bits >= 0), 1, -1).to(torch.int32)
    inexact = (error != 0) & ((bits & 1) == 0) & torch.isfinite(nearest)
    return torch.where(inexact, bits + step, bits).view(torch.float32).to(dtype)
