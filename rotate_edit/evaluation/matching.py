"""Damage at matched removal, resampled over documents (maths only: arrays in, numbers out)."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rotate_edit.evaluation.statistics import DRAWS, Difference, Estimate, Measure, measure


def document_weights(documents: int, *, draws: int = DRAWS, seed: int = 0) -> NDArray[np.float64]:
    """How often each document is drawn: float64 [1 + draws, documents], the first row once each (the data itself).

    One table for all methods and concepts keeps every comparison paired.
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
    """Logarithm of the damage where the concept's mass falls to `target` of the base's, float64 [draws].

    masses, damages: [strengths, documents] sums of a document's positions at ascending strengths; base_mass, counts:
    [documents], the base's mass and the positions behind the damage; weights: [draws, documents]. As in
    `statistics.matched_removal` the logarithms of mass and damage are linear in the strength between two strengths,
    at the first pair that crosses; a draw that does not cross among the strengths is extrapolated from the nearest
    pair. Raises ValueError with fewer than two strengths.
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
    """Geometric mean over concepts of a ratio of damages, its 95 % interval and its two-sided p against ratio 1.

    log_ratios: for each concept the logarithms [1 + draws] from the same `document_weights`, so that a document
    counts as often in every concept. Draws that are not finite are left out.
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
