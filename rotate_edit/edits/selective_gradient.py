"""What is specific to a concept in a gradient, and its largest part of low rank (maths only)."""

from collections.abc import Sequence

import torch
from torch import Tensor


def without_common(gradient: Tensor, common: int) -> Tensor:
    """Flatten the directions that a gradient shares with every text.

    The largest singular directions of a gradient are those of language at large. RepSelect (arXiv 2606.17168) divides
    them on both sides by how far they exceed the last of them. With `G = U S V'` and q directions,

        G1 = G - (G V)(I - diag(1/s)) V'     G' = G1 - U (I - diag(1/s)) U' G1     s = S / S_q

    Both sides share the singular vectors, so that `G' = G - (G V)(I - diag(1/s^2)) V'`, which needs V alone. The
    singular values `S_i` become `S_q^2 / S_i`. It is solved in float64.

    Args:
        gradient: G, [n, d_model].
        common: q, how many directions are flattened. At most as many as G has, less one.

    Returns:
        G', float32 [n, d_model].
    """
    wanted = min(common, min(gradient.shape) - 1)
    if wanted < 1:
        return gradient.float()
    exact = gradient.double()
    squares, directions = torch.linalg.eigh(exact.T @ exact)
    squares, directions = squares[-wanted:].clamp_min(1e-300), directions[:, -wanted:]
    flattened = 1 - squares[0] / squares
    return (exact - (exact @ directions * flattened) @ directions.T).float()


def largest_part(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of a matrix by two factors of a rank, in the Frobenius norm.

    Args:
        change: [n, d_model].
        rank: At most so many directions.

    Returns:
        left, float32 [n, rank], and right, float32 [rank, d_model] with orthonormal rows.
    """
    exact = change.double()
    wanted = min(rank, *change.shape)
    directions = torch.linalg.eigh(exact.T @ exact).eigenvectors[:, -wanted:].flip(1)
    return (exact @ directions).float(), directions.T.float().contiguous()


def strongest_rows(changes: Sequence[Tensor], share: float) -> list[Tensor]:
    """The rows that change most, over several matrices together.

    Args:
        changes: The changes of the matrices, [n_i, d_model] each.
        share: The share of all rows that is wanted, above 0 and at most 1.

    Returns:
        By matrix the rows, int64, ascending. There is at least one in all.
    """
    if share >= 1 or not changes:
        return [torch.arange(len(change)) for change in changes]
    sizes = torch.cat([change.square().sum(1) for change in changes])
    chosen = torch.zeros(len(sizes), dtype=torch.bool)
    chosen[sizes.topk(max(1, round(share * len(sizes)))).indices] = True
    return [part.nonzero()[:, 0] for part in chosen.split([len(change) for change in changes])]
