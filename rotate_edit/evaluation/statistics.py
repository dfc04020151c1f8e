"""Fractions kept, intervals and paired tests (maths only: arrays in, numbers out).

Everything random takes a seed, so the same numbers give the same interval. Formulas: the fractions kept,
efficacy, specificity and harmonic mean are those of the EMBER benchmark (arXiv 2606.03695); the sources of the
statistics stand with each function.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

DRAWS = 10_000
CONFIDENCE = 0.95
CELLS_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Measure:
    """One measured number beside the base model's.

    value; low and high: its 95 % interval; n: how many items (texts, prompts, neurons) stand behind it;
    standard_error; baseline: the base model's number, None where there is none. Not-a-number is a legal value
    and means that the items cannot answer the question.
    """

    value: float
    low: float
    high: float
    n: int
    standard_error: float
    baseline: float | None = None

    def against(self, baseline: float) -> "Measure":
        """The same measure with the base model's number beside it."""
        return replace(self, baseline=float(baseline))

    def plain(self) -> dict[str, float | int | None]:
        """Plain JSON values; not-a-number and infinities become None, which strict JSON can hold."""
        fields = {"value": self.value, "low": self.low, "high": self.high, "standard_error": self.standard_error}
        plain: dict[str, float | int | None] = {
            name: float(number) if math.isfinite(number) else None for name, number in fields.items()
        }
        plain["n"] = int(self.n)
        if self.baseline is not None:
            plain["baseline"] = float(self.baseline) if math.isfinite(self.baseline) else None
        return plain

    def text(self) -> str:
        """For a terminal: "0.912 (0.87 to 0.95, n = 200; base 0.980)"."""
        base = "" if self.baseline is None else f"; base {self.baseline:.4g}"
        return f"{self.value:.4g} ({self.low:.3g} to {self.high:.3g}, n = {self.n}{base})"

    def markdown(self) -> str:
        """For a Markdown table cell: the value in bold, then interval, n and the base model's number."""
        base = "" if self.baseline is None else f"; base {self.baseline:.4g}"
        return f"**{self.value:.4g}** [{self.low:.3g}, {self.high:.3g}], n = {self.n}{base}"


@dataclass(frozen=True)
class Estimate:
    """A number with its bootstrap distribution, so that estimates can be combined before an interval is taken.

    value; draws: float64 [draws], the same quantity on resampled items; n: items behind it.
    """

    value: float
    draws: NDArray[np.float64]
    n: int


def measure(estimate: Estimate) -> Measure:
    """The percentile interval and standard error of an estimate; draws that are not numbers are left out."""
    draws = estimate.draws[np.isfinite(estimate.draws)]
    if draws.size == 0 or not math.isfinite(estimate.value):
        return Measure(estimate.value, math.nan, math.nan, estimate.n, math.nan)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Measure(estimate.value, float(low), float(high), estimate.n, float(draws.std()))


def resampled_means(columns: ArrayLike, *, draws: int = DRAWS, seed: int = 0) -> NDArray[np.float64]:
    """Means of resampled items: columns [n, k] (rows are items, resampled together), result float64 [draws, k].

    The nonparametric bootstrap (Efron 1979). Rows that are equal are counted, not repeated: drawing how often
    each distinct row occurs is the same distribution and makes right/wrong items almost free.
    """
    table = np.asarray(columns, dtype=np.float64)
    if table.ndim == 1:
        table = table[:, None]
    items = len(table)
    if items == 0:
        return np.full((draws, table.shape[1]), np.nan)
    generator = np.random.default_rng(seed)
    distinct, counts = np.unique(table, axis=0, return_counts=True)
    if len(distinct) <= 64:
        occurrences = generator.multinomial(items, counts / items, size=draws)
        return occurrences @ distinct / items
    means = np.empty((draws, table.shape[1]))
    step = max(1, CELLS_AT_ONCE // items)
    for start in range(0, draws, step):
        chosen = generator.integers(0, items, (min(step, draws - start), items), dtype=np.int32)
        for column in range(table.shape[1]):
            means[start : start + step, column] = table[:, column][chosen].mean(axis=1)
    return means


def bootstrap(
    columns: ArrayLike,
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Estimate:
    """Estimate of a function of column means: columns [n, k]; statistic maps means [m, k] to values [m]."""
    table = np.asarray(columns, dtype=np.float64)
    if table.ndim == 1:
        table = table[:, None]
    point = table.mean(axis=0, keepdims=True) if len(table) else np.full((1, table.shape[1]), np.nan)
    resampled = resampled_means(table, draws=draws, seed=seed)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return Estimate(float(statistic(point)[0]), statistic(resampled), len(table))


def mean(values: ArrayLike, *, draws: int = DRAWS, seed: int = 0) -> Measure:
    """The mean of values [n] with its bootstrap interval."""
    return measure(bootstrap(values, lambda means: means[:, 0], draws=draws, seed=seed))


def ratio_of_sums(numerator: ArrayLike, denominator: ArrayLike, *, draws: int = DRAWS, seed: int = 0) -> Measure:
    """`sum(numerator) / sum(denominator)` with items [n] (texts) resampled whole, for means over positions."""
    columns = np.stack([np.asarray(numerator, dtype=float), np.asarray(denominator, dtype=float)], axis=1)
    return measure(bootstrap(columns, lambda means: means[:, 0] / means[:, 1], draws=draws, seed=seed))


# Fractions kept.


def kept_accuracy(base: ArrayLike, edited: ArrayLike, chance: float, *, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """`clip((accuracy - chance) / (base accuracy - chance), 0, 1)` of paired right/wrong items [n].

    chance: the accuracy of guessing, in [0, 1). Draws in which the base is not above chance are not-a-number.
    """

    def kept(means: NDArray[np.float64]) -> NDArray[np.float64]:
        above = means[:, 0] - chance
        return np.where(above > 0, np.clip((means[:, 1] - chance) / above, 0, 1), np.nan)

    return bootstrap(_paired(base, edited), kept, draws=draws, seed=seed)


def kept_probability(base: ArrayLike, edited: ArrayLike, *, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """`min(1, mean P / mean base P)` of paired probabilities [n] (cloze tasks)."""
    return bootstrap(
        _paired(base, edited), lambda means: np.minimum(1, means[:, 1] / means[:, 0]), draws=draws, seed=seed
    )


def kept_perplexity(
    base: ArrayLike, edited: ArrayLike, tokens: ArrayLike, *, draws: int = DRAWS, seed: int = 0
) -> Estimate:
    """`min(1, base perplexity / perplexity)` of paired texts.

    base, edited: summed log-likelihoods in nats [n]; tokens: how many tokens (or words) each text has [n].
    """
    columns = np.concatenate([_paired(base, edited), np.asarray(tokens, dtype=float)[:, None]], axis=1)
    return bootstrap(
        columns,
        lambda means: np.minimum(1, np.exp((means[:, 1] - means[:, 0]) / means[:, 2])),
        draws=draws,
        seed=seed,
    )


def efficacy(kept: Estimate) -> Estimate:
    """Removal: `1 - kept` on the concept's own items."""
    return Estimate(1 - kept.value, 1 - kept.draws, kept.n)


def regained(base: ArrayLike, edited: ArrayLike, after: ArrayLike, *, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """`clip((after - edited) / (base - edited), 0, 1)` of mean accuracies on the same items [n]: what relearning
    brought back of what the edit took. Not-a-number where the edit took nothing."""
    columns = np.concatenate([_paired(base, edited), np.asarray(after, dtype=float)[:, None]], axis=1)

    def share(means: NDArray[np.float64]) -> NDArray[np.float64]:
        lost = means[:, 0] - means[:, 1]
        return np.where(lost > 0, np.clip((means[:, 2] - means[:, 1]) / lost, 0, 1), np.nan)

    return bootstrap(columns, share, draws=draws, seed=seed)


def mean_kept(kept: Sequence[Estimate]) -> Estimate:
    """The mean over tasks, each task with its own resampled items."""
    if not kept:
        raise ValueError("a mean over tasks needs at least one task")
    draws = np.mean([one.draws for one in kept], axis=0)
    return Estimate(float(np.mean([one.value for one in kept])), draws, sum(one.n for one in kept))


def specificity(general: Sequence[Estimate], neighbours: Sequence[Estimate]) -> Estimate:
    """Harmonic mean of the mean kept over general tasks and the mean kept over neighbours.

    When one of the two groups has no task the other's mean stands alone.
    """
    groups = [mean_kept(group) for group in (general, neighbours) if group]
    return groups[0] if len(groups) == 1 else harmonic(*groups)


def harmonic(*estimates: Estimate) -> Estimate:
    """Harmonic mean, 0 as soon as one of them is 0 or less; draws are combined one by one."""
    draws = harmonic_mean(np.stack([one.draws for one in estimates]))
    value = harmonic_mean(np.array([[one.value] for one in estimates]))
    return Estimate(float(value[0]), draws, sum(one.n for one in estimates))


def harmonic_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Harmonic mean over the first axis of [k, m], 0 where any entry is 0 or less, result [m]."""
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_values = values.shape[0] / (1 / values).sum(axis=0)
    result = np.where((values <= 0).any(axis=0), 0.0, mean_values)
    return np.where(np.isnan(values).any(axis=0), np.nan, result)


# Accuracies.


def wilson(successes: int, n: int) -> Measure:
    """A share with Wilson's score interval (Wilson 1927): it holds its level for small n and near 0 and 1."""
    if n <= 0:
        return Measure(math.nan, math.nan, math.nan, 0, math.nan)
    z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Measure(share, low, high, n, math.sqrt(share * (1 - share) / n))


def above_chance(successes: int, n: int, chance: float) -> bool:
    """Whether the whole 95 % Wilson interval of an accuracy lies above chance: only then the task is used."""
    return n > 0 and wilson(successes, n).low > chance


def mcnemar_exact(base: ArrayLike, edited: ArrayLike) -> float:
    """Two-sided exact p-value of McNemar's test (1947) for paired right/wrong items [n].

    Under the null the items that changed are fair coin flips: with `b` lost and `c` gained,
    `p = min(1, 2 P(Binomial(b + c, 1/2) <= min(b, c)))`, summed in whole numbers.
    """
    pairs = _paired(base, edited) > 0.5
    lost = int((pairs[:, 0] & ~pairs[:, 1]).sum())
    gained = int((~pairs[:, 0] & pairs[:, 1]).sum())
    changed = lost + gained
    tail, ways = 0, 1
    for index in range(min(lost, gained) + 1):
        tail += ways
        ways = ways * (changed - index) // (index + 1)
    # Python divides whole numbers of any size correctly, where 2.0 ** changed would overflow.
    return min(1.0, 2 * tail / 2**changed)


# Paired differences.


@dataclass(frozen=True)
class Difference:
    """Edited minus base on the same items: the mean difference as a Measure, and a two-sided p-value."""

    measure: Measure
    p: float


def difference(
    columns: ArrayLike,
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Difference:
    """A difference that is a function of column means (see `bootstrap`), tested against 0.

    p = `2 min(P(difference* <= 0), P(difference* >= 0))` over the bootstrap draws, with one added to both counts
    (Davison and Hinkley 1997, 4.2), so it is never 0.
    """
    return tested(bootstrap(columns, statistic, draws=draws, seed=seed))


def tested(estimate: Estimate) -> Difference:
    """An estimate of a difference with its bootstrap p-value against 0 (see `difference`)."""
    below, above = (estimate.draws <= 0).sum(), (estimate.draws >= 0).sum()
    p = min(1.0, 2 * (min(below, above) + 1) / (len(estimate.draws) + 1)) if estimate.n else math.nan
    return Difference(measure(estimate), float(p))


def paired_bootstrap(base: ArrayLike, edited: ArrayLike, *, draws: int = DRAWS, seed: int = 0) -> Difference:
    """Mean of `edited - base` over paired items [n], with the base's mean beside it."""
    pairs = _paired(base, edited)
    found = difference(pairs[:, 1] - pairs[:, 0], lambda means: means[:, 0], draws=draws, seed=seed)
    return replace(found, measure=found.measure.against(float(pairs[:, 0].mean()) if len(pairs) else math.nan))


def paired_perplexity(
    base: ArrayLike, edited: ArrayLike, tokens: ArrayLike, *, draws: int = DRAWS, seed: int = 0
) -> Difference:
    """Perplexity of the edited minus that of the base model; arguments as in `kept_perplexity`."""
    columns = np.concatenate([_paired(base, edited), np.asarray(tokens, dtype=float)[:, None]], axis=1)

    def statistic(means: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.exp(-means[:, 1] / means[:, 2]) - np.exp(-means[:, 0] / means[:, 2])

    found = difference(columns, statistic, draws=draws, seed=seed)
    return replace(found, measure=found.measure.against(float(np.exp(-columns[:, 0].sum() / columns[:, 2].sum()))))


def paired_accuracy(base: ArrayLike, edited: ArrayLike, *, draws: int = DRAWS, seed: int = 0) -> Difference:
    """Difference of two accuracies on the same items: bootstrap interval, exact McNemar p."""
    return replace(paired_bootstrap(base, edited, draws=draws, seed=seed), p=mcnemar_exact(base, edited))


@dataclass(frozen=True)
class Pair:
    """Two levels of the same items, their difference and the fraction kept, all from one resampling."""

    base: Measure
    edited: Measure
    difference: Difference
    kept: Estimate


def paired_probabilities(base: ArrayLike, edited: ArrayLike, *, draws: int = DRAWS, seed: int = 0) -> Pair:
    """Paired probabilities [n]: what `mean`, `paired_bootstrap` and `kept_probability` say, in one resampling."""
    table = _paired(base, edited)
    # The point itself is the first row of what every formula below is applied to.
    before, after = np.vstack([table.mean(axis=0), resampled_means(table, draws=draws, seed=seed)]).T
    with np.errstate(divide="ignore", invalid="ignore"):
        kept = np.minimum(1, after / before)
    levels = [measure(_estimate(column, len(table))) for column in (before, after)]
    change = tested(_estimate(after - before, len(table)))
    change = replace(change, measure=change.measure.against(float(before[0])))
    return Pair(levels[0], levels[1], change, _estimate(kept, len(table)))


def paired_perplexities(
    base: ArrayLike, edited: ArrayLike, tokens: ArrayLike, *, draws: int = DRAWS, seed: int = 0
) -> Pair:
    """Paired texts: two perplexities, and what `paired_perplexity` and `kept_perplexity` say, in one resampling.

    base, edited: summed log-likelihoods in nats [n]; tokens: how many tokens (or words) each text has [n].
    """
    table = np.concatenate([_paired(base, edited), np.asarray(tokens, dtype=float)[:, None]], axis=1)
    before, after, length = np.vstack([table.mean(axis=0), resampled_means(table, draws=draws, seed=seed)]).T
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        first, second = np.exp(-before / length), np.exp(-after / length)
        kept = np.minimum(1, np.exp((after - before) / length))
    levels = [measure(_estimate(column, len(table))) for column in (first, second)]
    change = tested(_estimate(second - first, len(table)))
    change = replace(change, measure=change.measure.against(float(first[0])))
    return Pair(levels[0], levels[1], change, _estimate(kept, len(table)))


def _estimate(column: NDArray[np.float64], n: int) -> Estimate:
    return Estimate(float(column[0]), column[1:], n)


def paired_log_ratio(base: ArrayLike, other: ArrayLike, *, draws: int = DRAWS, seed: int = 0) -> Difference:
    """Geometric mean of `other / base` over paired positive numbers [n] (for instance one KL per concept).

    The bootstrap runs on the mean of the logarithms; value and interval are exponentiated, p is that of the
    mean logarithm being 0, standard_error is on the log scale.
    """
    pairs = _paired(base, other)
    if (pairs <= 0).any():
        raise ValueError("a log ratio needs positive numbers")
    difference = paired_bootstrap(np.log(pairs[:, 0]), np.log(pairs[:, 1]), draws=draws, seed=seed)
    logs = difference.measure
    ratio = Measure(math.exp(logs.value), math.exp(logs.low), math.exp(logs.high), logs.n, logs.standard_error, 1.0)
    return Difference(ratio, difference.p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979): adjusted p-values in the order given; not-a-number stays out of it."""
    order = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    adjusted = [math.nan] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        adjusted[index] = largest
    return adjusted


# Removal against damage.


@dataclass(frozen=True)
class Crossing:
    """Where a curve reaches the wanted removal: the strength, and the damage there."""

    strength: float
    damage: float


def matched_removal(
    strengths: Sequence[float], masses: Sequence[float], damages: Sequence[float], *, target: float = 0.1
) -> Crossing | None:
    """Damage at the smallest strength at which the concept's mass has fallen to `target` of the base's.

    strengths: ascending, all >= 0; masses: the concept's probability mass as a fraction of the base's; damages:
    KL in nats. Between two points the logarithms of mass and damage are taken as linear in the strength; a
    curve that starts above 0 is given the point (0, mass 1, damage 0), from which damage grows as the square
    of the strength, as a KL does. None when the curve never gets there.
    """
    points = [(float(s), float(m), float(d)) for s, m, d in zip(strengths, masses, damages, strict=True)]
    if any(later[0] <= earlier[0] for earlier, later in itertools.pairwise(points)):
        raise ValueError("strengths must ascend")
    if points and points[0][0] > 0:
        points.insert(0, (0.0, 1.0, 0.0))
    if points and points[0][1] <= target:
        return Crossing(points[0][0], points[0][2])
    for before, after in itertools.pairwise(points):
        if after[1] > target:
            continue
        tiny = np.finfo(float).tiny
        share = math.log(before[1] / target) / math.log(before[1] / max(after[1], tiny))
        strength = before[0] + share * (after[0] - before[0])
        if before[2] > 0 and after[2] > 0:
            damage = math.exp(math.log(before[2]) * (1 - share) + math.log(after[2]) * share)
        else:
            damage = before[2] + (after[2] - before[2]) * share**2
        return Crossing(strength, damage)
    return None


def crossing_strength(strengths: Sequence[float], masses: Sequence[float], *, target: float = 0.1) -> float | None:
    """The smallest strength at which the mass falls to `target` of the base's (see `matched_removal`), or None."""
    crossing = matched_removal(strengths, masses, [0.0] * len(strengths), target=target)
    return None if crossing is None else crossing.strength


def _paired(base: ArrayLike, edited: ArrayLike) -> NDArray[np.float64]:
    first, second = np.asarray(base, dtype=np.float64), np.asarray(edited, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"paired items must be two lists of one length, not {first.shape} and {second.shape}")
    return np.stack([first, second], axis=1)
