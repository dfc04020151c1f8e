"""Damage at matched removal, resampled over documents.

This module holds mathematics only: arrays go in, numbers come out.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rotate_edit.evaluation.statistics import DRAWS, Difference, Estimate, Measure, measure


def document_weights(documents: int, *, draws: int = DRAWS, seed: int = 0) -> NDArray[np.float64]:
    """Draw how often each document occurs in each bootstrap draw.

    One table for all methods and concepts keeps every comparison paired.

    Args:
        documents: Number of documents.
        draws: How many times the documents are resampled.
        seed: Seed of the random numbers.

    Returns:
        float64 [1 + draws, documents]. The first row is all ones, which is the data itself.
    """
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(documents, np.full(documents, 1 / documents), size=draws)
    return np.concatenate([np.ones((1, documents)), drawn.astype(np.float64)])


def log_damage_at(
    masses: ArrayLike,
    base_mass: ArrayLike,
    damages: ArrayLike,
    counts: ArrayLike,
    weights: NDArray[np.float64],
    *,
    target: float = 0.1,
) -> NDArray[np.float64]:
    """Compute the logarithm of the damage where the concept's mass falls to `target` of the base's.

    As in `statistics.matched_removal`, the logarithms of mass and damage are linear in the strength between two
    strengths. The first pair that crosses is used. A draw that does not cross among the strengths is extrapolated from
    the nearest pair.

    Args:
        masses: [strengths, documents], sums of the concept's probability over a document's positions, at ascending
            strengths.
        base_mass: [documents], the base's sums of the same.
        damages: [strengths, documents], sums of the KL divergence over a document's positions, in nats.
        counts: [documents], the number of positions behind the damage.
        weights: float64 [draws, documents], from `document_weights`.
        target: The wanted mass, as a fraction of the base's.

    Returns:
        float64 [draws], the natural logarithm of the mean damage in nats per position.

    Raises:
        ValueError: With fewer than two strengths.
    """
    table = np.asarray(masses, dtype=np.float64)
    if len(table) < 2:
        raise ValueError("a crossing needs two strengths")
    tiny = np.finfo(np.float64).tiny
    with np.errstate(divide="ignore", invalid="ignore"):
        mass = np.log(np.maximum(weights @ table.T, tiny) / (weights @ np.asarray(base_mass, dtype=float))[:, None])
        total = weights @ np.asarray(counts, dtype=float)
        damage = np.log(np.maximum(weights @ np.asarray(damages, dtype=float).T, tiny) / total[:, None])
    reached = mass <= math.log(target)
    after = np.where(reached.any(axis=1), reached.argmax(axis=1), len(table) - 1).clip(1)
    rows = np.arange(len(weights))
    step = mass[rows, after] - mass[rows, after - 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = (math.log(target) - mass[rows, after - 1]) / step
    return damage[rows, after - 1] + share * (damage[rows, after] - damage[rows, after - 1])


def pooled_ratio(log_ratios: Sequence[NDArray[np.float64]]) -> Difference:
    """Pool a ratio of damages over concepts by the geometric mean.

    Args:
        log_ratios: For each concept the logarithms float64 [1 + draws]. All come from the same `document_weights`, so a
            document counts as often in every concept. Draws that are not finite are left out.

    Returns:
        The ratio with its 95 % interval, and its two-sided p-value against ratio 1.
    """
    pooled = np.mean(np.stack(list(log_ratios)), axis=0)
    found = measure(Estimate(float(pooled[0]), pooled[1:], len(log_ratios)))
    draws = pooled[1:][np.isfinite(pooled[1:])]
    below, above = int((draws <= 0).sum()), int((draws >= 0).sum())
    p = min(1.0, 2 * (min(below, above) + 1) / (len(draws) + 1))
    ratio = Measure(
        math.exp(found.value), math.exp(found.low), math.exp(found.high), found.n, found.standard_error, 1.0
    )
    return Difference(ratio, p)
