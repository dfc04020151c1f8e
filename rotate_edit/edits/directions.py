"""Directions of a concept in the residual stream, and the closed forms that edit methods share (maths only)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Direction:
    """How a concept is read off a vector and what is taken away per unit: `w <- w - strength * (w . read) write`.

    Attributes:
        read: float32 [d_model].
        write: float32 [d_model], with `read . write == 1`, so that strength 1 makes `w . read` zero.
    """

    read: Tensor
    write: Tensor


def concept_mean(projection: Tensor, token_ids: Tensor, usable: Tensor | None = None) -> Tensor:
    """The concept's mean token vector less the mean of the vocabulary, `mu_T`.

    Args:
        projection: A table of token vectors, [V, d_model].
        token_ids: The concept's tokens, int64 [n].
        usable: Which tokens the vocabulary's mean is taken over, bool [V]. All when left out.

    Returns:
        [d_model].
    """
    rest = projection if usable is None else projection[usable]
    return projection[token_ids.to(projection.device)].mean(0) - rest.mean(0)


def nearest_tokens(tables: Sequence[Tensor], token_ids: Tensor, usable: Tensor, count: int) -> Tensor:
    """The tokens whose rows point most along a concept's direction, beside its own.

    Rows and direction are taken less the mean of the usable rows. The cosines of all tables are added.

    Args:
        tables: The embedding, and the unembedding of an untied model, [V, d_model] each.
        token_ids: The concept's tokens, int64 [n].
        usable: Tokens that may be found, bool [V].
        count: How many are wanted.

    Returns:
        int64, the nearest first. Only tokens with a positive sum are found.
    """
    cosines = torch.zeros(len(usable))
    for table in tables:
        mean = table[usable].mean(0)
        direction = table[token_ids].mean(0) - mean
        # (w - m) . d and |w - m|^2 without a copy of the table.
        projections = table @ direction - mean @ direction
        squares = table.square().sum(1) - 2 * (table @ mean) + mean @ mean
        cosines += projections / (squares.clamp_min(1e-12).sqrt() * direction.norm())
    cosines[~usable] = 0
    cosines[token_ids] = 0
    found = cosines.topk(min(count, len(cosines)))
    return found.indices[found.values > 0]


def token_covariance(projection: Tensor) -> Tensor:
    """Covariance of the token vectors over the vocabulary, [d_model, d_model], of a projection [V, d_model]."""
    centred = projection - projection.mean(0)
    return centred.T @ centred / len(projection)


def mean_direction(mean: Tensor) -> Direction:
    """The unit concept direction `d_T = mu_T / |mu_T|` for reading and writing (projection on a line).

    Args:
        mean: `concept_mean`, float32 [d_model].
    """
    unit = mean / mean.norm()
    return Direction(unit, unit)


def keeping(direction: Direction, keep: Tensor) -> Direction:
    """The same reading with a writing direction that is orthogonal to some vectors, and of unit effect.

    Args:
        direction: The direction to change.
        keep: The vectors, [m, d_model].

    Raises:
        ValueError: The vectors span the concept's own direction, so that nothing can be removed.
    """
    rows, write = keep.double(), direction.write.double()
    rest = write - rows.T @ torch.linalg.lstsq(rows.T, write[:, None], driver="gelsd").solution[:, 0]
    reached = float(direction.read.double() @ rest)
    if not reached > 1e-6:
        raise ValueError("the words to keep span the concept's own direction")
    return Direction(direction.read, (rest / reached).to(direction.write.dtype))


def least_collateral_direction(
    mean: Tensor, covariance: Tensor, *, ridge: float = 0.3, keep: Tensor | None = None
) -> Direction:
    """The direction that lowers the concept's mean logit while moving the other logits least.

    It minimises `e' (S + l I) e` subject to `mean . e = 1` and `k . e = 0` for each vector k to keep. The solution is
    `e = P C' (C P C')^-1 (1, 0, ...)'` with `P = (S + l I)^-1` and the constraints' rows C. It is solved in float64.

    Args:
        mean: `concept_mean`, [d_model].
        covariance: S, `token_covariance` or another cost of moving along a direction, [d_model, d_model].
        ridge: l as a multiple of the median eigenvalue of S.
        keep: Vectors to keep, [m, d_model].

    Raises:
        ValueError: The vectors to keep span the concept's own direction, so that nothing can be removed.
    """
    covariance, mean64 = covariance.double(), mean.double()
    median = torch.linalg.eigvalsh(covariance).median()
    damped = covariance + ridge * median * torch.eye(len(mean), dtype=torch.float64, device=mean.device)
    constraints = mean64[None] if keep is None else torch.cat([mean64[None], keep.double()])
    whitened = torch.linalg.solve(damped, constraints.T)
    gram = constraints @ whitened
    wanted = torch.zeros(len(constraints), 1, dtype=torch.float64, device=mean.device)
    wanted[0] = 1.0
    write = (whitened @ (torch.linalg.pinv(gram, hermitian=True) @ wanted)).squeeze(1)
    reached = float(mean64 @ write)
    if not abs(reached - 1.0) < 1e-6:
        raise ValueError("the words to keep span the concept's own direction")
    return Direction(mean, write.to(mean.dtype))


def key_coefficients(second: Tensor, mean: Tensor, *, ridge: float) -> Tensor:
    """The weights of neurons whose sum is 1 where a concept comes next and as small as can be elsewhere.

    It minimises `c' (S + l I) c` subject to `m . c = 1`: `c = (S + l I)^-1 m / (m' (S + l I)^-1 m)`. This is the key
    side of ROME's rank-one update (Meng et al. 2022, arXiv 2202.05262).

    Args:
        second: S, the neurons' second moments over all text, [n, n].
        mean: m, the neurons' mean where the concept comes next, [n].
        ridge: l as a multiple of the mean of S's diagonal.

    Returns:
        float64 [n].
    """
    damped = second.double() + ridge * second.double().diagonal().mean() * torch.eye(len(second), dtype=torch.float64)
    solved = torch.linalg.solve(damped, mean.double())
    return solved / (mean.double() @ solved)


def subtract_direction(vectors: Tensor, direction: Direction) -> tuple[Tensor, Tensor]:
    """Factors of `w <- w - (w . read) write`.

    Args:
        vectors: float32 [n, d_model].
        direction: What is read and written.

    Returns:
        left [n, 1] and right [1, d_model].
    """
    return -(vectors @ direction.read)[:, None], direction.write[None]


def coverage(scores: Tensor, share: float) -> Tensor:
    """The strongest entries (by absolute value) that together hold `share` of `sum |scores|`: int64, ascending."""
    if len(scores) == 0 or share <= 0:
        return torch.empty(0, dtype=torch.int64)
    ordered, places = scores.abs().sort(descending=True)
    held = ordered.double().cumsum(0) / ordered.double().sum().clamp_min(1e-30)
    wanted = int((held < share).sum()) + 1
    return places[:wanted].sort().values
