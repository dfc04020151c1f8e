"""Fractions kept, confidence intervals and paired tests.

This module holds mathematics only: arrays go in, numbers come out. Everything random takes a seed, so the same numbers
give the same interval. The fractions kept, efficacy, specificity and harmonic mean are those of the EMBER benchmark
(arXiv 2606.03695). The sources of the other statistics stand with each function.
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
    """One measured number, with its interval and the base model's number.

    Not-a-number is a legal value. It means that the items cannot answer the question.

    Attributes:
        value: The measured number, float, in the unit of the measure.
        low: Lower end of the 95 % interval, float, in the same unit.
        high: Upper end of the 95 % interval, float, in the same unit.
        n: Number of items (texts, prompts, neurons) behind the value.
        standard_error: Standard error of the value, float, in the same unit.
        baseline: The base model's number, or None where there is none.
    """

    value: float
    low: float
    high: float
    n: int
    standard_error: float
    baseline: float | None = None

    def against(self, baseline: float) -> "Measure":
        """Return the same measure with the base model's number beside it.

        Args:
            baseline: The base model's number, in the unit of the measure.

        Returns:
            A copy with `baseline` set.
        """
        return replace(self, baseline=float(baseline))

    def plain(self) -> dict[str, float | int | None]:
        """Return the measure as plain JSON values.

        Returns:
            The fields by name. Not-a-number and infinities become None, because strict JSON cannot hold them.
            `baseline` is left out when there is none.
        """
        fields = {"value": self.value, "low": self.low, "high": self.high, "standard_error": self.standard_error}
        plain: dict[str, float | int | None] = {
            name: float(number) if math.isfinite(number) else None for name, number in fields.items()
        }
        plain["n"] = int(self.n)
        if self.baseline is not None:
            plain["baseline"] = float(self.baseline) if math.isfinite(self.baseline) else None
        return plain

    def text(self) -> str:
        """Format the measure for a terminal: "0.912 (0.87 to 0.95, n = 200; base 0.980)".

        Returns:
            One line of text.
        """
        base = "" if self.baseline is None else f"; base {self.baseline:.4g}"
        return f"{self.value:.4g} ({self.low:.3g} to {self.high:.3g}, n = {self.n}{base})"

    def markdown(self) -> str:
        """Format the measure for a Markdown table cell.

        Returns:
            The value in bold, then the interval, n and the base model's number.
        """
        base = "" if self.baseline is None else f"; base {self.baseline:.4g}"
        return f"**{self.value:.4g}** [{self.low:.3g}, {self.high:.3g}], n = {self.n}{base}"


@dataclass(frozen=True)
class Estimate:
    """A number with its bootstrap distribution.

    Estimates can be combined before an interval is taken.

    Attributes:
        value: The number on the items themselves, float.
        draws: float64 [draws], the same quantity on resampled items.
        n: Number of items behind it.
    """

    value: float
    draws: NDArray[np.float64]
    n: int


def measure(estimate: Estimate) -> Measure:
    """Take the percentile interval and the standard error of an estimate.

    Args:
        estimate: The number with its draws. Draws that are not finite are left out.

    Returns:
        The estimate as a Measure. Interval and standard error are not-a-number when no draw is left or the value is not
        finite.
    """
    draws = estimate.draws[np.isfinite(estimate.draws)]
    if draws.size == 0 or not math.isfinite(estimate.value):
        return Measure(estimate.value, math.nan, math.nan, estimate.n, math.nan)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Measure(estimate.value, float(low), float(high), estimate.n, float(draws.std()))


def resampled_means(columns: ArrayLike, *, draws: int = DRAWS, seed: int = 0) -> NDArray[np.float64]:
    """Compute the column means of resampled items.

    This is the nonparametric bootstrap (Efron 1979). Equal rows are counted, not repeated. Drawing how often each
    distinct row occurs gives the same distribution. It makes right/wrong items almost free.

    Args:
        columns: Numbers [n, k] or [n]. Rows are items and are resampled together.
        draws: How many times the items are resampled.
        seed: Seed of the random numbers.

    Returns:
        float64 [draws, k], the mean of each column in each draw. All not-a-number when there are no items.
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
    """Estimate a function of column means.

    Args:
        columns: Numbers [n, k] or [n]. Rows are items and are resampled together.
        statistic: Maps means float64 [m, k] to values float64 [m].
        draws: How many times the items are resampled.
        seed: Seed of the random numbers.

    Returns:
        The statistic of the items, with its draws.
    """
    table = np.asarray(columns, dtype=np.float64)
    if table.ndim == 1:
        table = table[:, None]
    point = table.mean(axis=0, keepdims=True) if len(table) else np.full((1, table.shape[1]), np.nan)
    resampled = resampled_means(table, draws=draws, seed=seed)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return Estimate(float(statistic(point)[0]), statistic(resampled), len(table))


def mean(values: ArrayLike, *, draws: int = DRAWS, seed: int = 0) -> Measure:
    """Take the mean of values with its bootstrap interval.

    Args:
        values: Numbers [n], one per item.
        draws: How many times the items are resampled.
        seed: Seed of the random numbers.

    Returns:
        The mean, in the unit of the values.
    """
    return measure(bootstrap(values, lambda means: means[:, 0], draws=draws, seed=seed))


def ratio_of_sums(numerator: ArrayLike, denominator: ArrayLike, *, draws: int = DRAWS, seed: int = 0) -> Measure:
    """Compute `sum(numerator) / sum(denominator)` with its bootstrap interval.

    Items (texts) are resampled whole. Use it for means over positions.

    Args:
        numerator: Numbers [n], one sum per item.
        denominator: Numbers [n], one count or sum per item.
        draws: How many times the items are resampled.
        seed: Seed of the random numbers.

    Returns:
        The ratio.
    """
    columns = np.stack([np.asarray(numerator, dtype=float), np.asarray(denominator, dtype=float)], axis=1)
    return measure(bootstrap(columns, lambda means: means[:, 0] / means[:, 1], draws=draws, seed=seed))


# Fractions kept.


def kept_accuracy(base: ArrayLike, edited: ArrayLike, chance: float, *, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """Estimate the fraction of the accuracy above chance that the edit kept.

    The formula is `clip((accuracy - chance) / (base accuracy - chance), 0, 1)`. Draws in which the base is not above
    chance are not-a-number.

    Args:
        base: The base model's right/wrong items [n], 0 or 1.
        edited: The edited model's right/wrong items [n], in the same order.
        chance: The accuracy of guessing, in [0, 1).
        draws: How many times the items are resampled.
        seed: Seed of the random numbers.

    Returns:
        The fraction kept, in [0, 1].

    Raises:
        ValueError: When the two lists differ in length.
    """

    def kept(means: NDArray[np.float64]) -> NDArray[np.float64]:
        above = means[:, 0] - chance
        return np.where(above > 0, np.clip((means[:, 1] - chance) / above, 0, 1), np.nan)

    return bootstrap(_paired(base, edited), kept, draws=draws, seed=seed)


def kept_probability(base: ArrayLike, edited: ArrayLike, *, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """Estimate the fraction of the probability that the edit kept (cloze tasks).

    The formula is `min(1, mean P / mean base P)`.

    Args:
        base: The base model's probabilities [n].
        edited: The edited model's probabilities [n], in the same order.
        draws: How many times the items are resampled.
        seed: Seed of the random numbers.

    Returns:
        The fraction kept, in [0, 1].

    Raises:
        ValueError: When the two lists differ in length.
    """
    return bootstrap(
        _paired(base, edited), lambda means: np.minimum(1, means[:, 1] / means[:, 0]), draws=draws, seed=seed
    )


def kept_perplexity(
    base: ArrayLike, edited: ArrayLike, tokens: ArrayLike, *, draws: int = DRAWS, seed: int = 0
) -> Estimate:
    """Estimate the fraction kept of paired texts: `min(1, base perplexity / perplexity)`.

    Args:
        base: The base model's summed log-likelihoods [n], in nats.
        edited: The edited model's summed log-likelihoods [n], in nats.
        tokens: How many tokens (or words) each text has [n].
        draws: How many times the texts are resampled.
        seed: Seed of the random numbers.

    Returns:
        The fraction kept, in [0, 1].

    Raises:
        ValueError: When `base` and `edited` differ in length.
    """
    columns = np.concatenate([_paired(base, edited), np.asarray(tokens, dtype=float)[:, None]], axis=1)
    return bootstrap(
        columns,
        lambda means: np.minimum(1, np.exp((means[:, 1] - means[:, 0]) / means[:, 2])),
        draws=draws,
        seed=seed,
    )


def efficacy(kept: Estimate) -> Estimate:
    """Turn the fraction kept on the concept's own items into the removal: `1 - kept`.

    Args:
        kept: The fraction kept, in [0, 1].

    Returns:
        The fraction removed, in [0, 1].
    """
    return Estimate(1 - kept.value, 1 - kept.draws, kept.n)


def regained(base: ArrayLike, edited: ArrayLike, after: ArrayLike, *, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """Estimate how much relearning brought back of what the edit took.

    The formula is `clip((after - edited) / (base - edited), 0, 1)` of mean accuracies on the same items. It is
    not-a-number where the edit took nothing.

    Args:
        base: The base model's right/wrong items [n], 0 or 1.
        edited: The edited model's items [n] before relearning.
        after: The edited model's items [n] after relearning.
        draws: How many times the items are resampled.
        seed: Seed of the random numbers.

    Returns:
        The share regained, in [0, 1].

    Raises:
        ValueError: When `base` and `edited` differ in length.
    """
    columns = np.concatenate([_paired(base, edited), np.asarray(after, dtype=float)[:, None]], axis=1)

    def share(means: NDArray[np.float64]) -> NDArray[np.float64]:
        lost = means[:, 0] - means[:, 1]
        return np.where(lost > 0, np.clip((means[:, 2] - means[:, 1]) / lost, 0, 1), np.nan)

    return bootstrap(columns, share, draws=draws, seed=seed)


def mean_kept(kept: Sequence[Estimate]) -> Estimate:
    """Average fractions kept over tasks, each task with its own resampled items.

    Args:
        kept: One estimate per task.

    Returns:
        The mean over tasks. Its `n` is the number of all items.

    Raises:
        ValueError: When there is no task.
    """
    if not kept:
        raise ValueError("a mean over tasks needs at least one task")
    draws = np.mean([one.draws for one in kept], axis=0)
    return Estimate(float(np.mean([one.value for one in kept])), draws, sum(one.n for one in kept))


def specificity(general: Sequence[Estimate], neighbours: Sequence[Estimate]) -> Estimate:
    """Combine the fractions kept on general tasks and on neighbours.

    It is the harmonic mean of the two groups' means. When one group has no task, the other group's mean stands alone.

    Args:
        general: One estimate per general task.
        neighbours: One estimate per neighbour task.

    Returns:
        The specificity, in [0, 1].

    Raises:
        ValueError: When neither group has a task.
    """
    groups = [mean_kept(group) for group in (general, neighbours) if group]
    return groups[0] if len(groups) == 1 else harmonic(*groups)


def harmonic(*estimates: Estimate) -> Estimate:
    """Take the harmonic mean of estimates. Their draws are combined one by one.

    Args:
        estimates: The estimates, with equal numbers of draws.

    Returns:
        The harmonic mean. It is 0 as soon as one of the estimates is 0 or less.
    """
    draws = harmonic_mean(np.stack([one.draws for one in estimates]))
    value = harmonic_mean(np.array([[one.value] for one in estimates]))
    return Estimate(float(value[0]), draws, sum(one.n for one in estimates))


def harmonic_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Take the harmonic mean over the first axis.

    Args:
        values: float64 [k, m].

    Returns:
        float64 [m]. It is 0 where any entry is 0 or less, and not-a-number where any entry is.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_values = values.shape[0] / (1 / values).sum(axis=0)
    result = np.where((values <= 0).any(axis=0), 0.0, mean_values)
    return np.where(np.isnan(values).any(axis=0), np.nan, result)


# Accuracies.


def wilson(successes: int, n: int) -> Measure:
    """Compute a share with Wilson's score interval (Wilson 1927).

    The interval holds its level for small n and near 0 and 1.

    Args:
        successes: Number of successes.
        n: Number of items.

    Returns:
        The share, in [0, 1]. All numbers are not-a-number when `n` is 0.
    """
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
    """Tell whether the whole 95 % Wilson interval of an accuracy lies above chance.

    A task is used only when it does.

    Args:
        successes: Number of right answers.
        n: Number of items.
        chance: The accuracy of guessing, in [0, 1).

    Returns:
        True when the lower end of the interval is above chance.
    """
    return n > 0 and wilson(successes, n).low > chance


def mcnemar_exact(base: ArrayLike, edited: ArrayLike) -> float:
    """Compute the two-sided exact p-value of McNemar's test (1947).

    Under the null hypothesis the items that changed are fair coin flips. With `b` lost and `c` gained, `p = min(1, 2
    P(Binomial(b + c, 1/2) <= min(b, c)))`, summed in whole numbers.

    Args:
        base: The base model's right/wrong items [n], 0 or 1.
        edited: The edited model's right/wrong items [n], in the same order.

    Returns:
        The p-value, in (0, 1].

    Raises:
        ValueError: When the two lists differ in length.
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
    """The edited model minus the base model on the same items.

    Attributes:
        measure: The mean difference with its interval.
        p: Two-sided p-value against no difference.
    """

    measure: Measure
    p: float


def difference(
    columns: ArrayLike,
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Difference:
    """Estimate a difference that is a function of column means, tested against 0.

    The p-value is `2 min(P(difference* <= 0), P(difference* >= 0))` over the bootstrap draws. One is added to both
    counts (Davison and Hinkley 1997, 4.2), so it is never 0.

    Args:
        columns: Numbers [n, k] or [n] (see `bootstrap`).
        statistic: Maps means float64 [m, k] to differences float64 [m].
        draws: How many times the items are resampled.
        seed: Seed of the random numbers.

    Returns:
        The difference and its p-value.
    """
    return tested(bootstrap(columns, statistic, draws=draws, seed=seed))


def tested(estimate: Estimate) -> Difference:
    """Test an estimate of a difference against 0 with its bootstrap draws (see `difference`).

    Args:
        estimate: The difference with its draws.

    Returns:
        The difference and its p-value. The p-value is not-a-number when there are no items.
    """
    below, above = (estimate.draws <= 0).sum(), (estimate.draws >= 0).sum()
    p = min(1.0, 2 * (min(below, above) + 1) / (len(estimate.draws) + 1)) if estimate.n else math.nan
    return Difference(measure(estimate), float(p))


def paired_bootstrap(base: ArrayLike, edited: ArrayLike, *, draws: int = DRAWS, seed: int = 0) -> Difference:
    """Estimate the mean of `edited - base` over paired items.

    Args:
        base: The base model's numbers [n].
        edited: The edited model's numbers [n], in the same order.
        draws: How many times the items are resampled.
        seed: Seed of the random numbers.

    Returns:
        The mean difference, with the base's mean beside it.

    Raises:
        ValueError: When the two lists differ in length.
    """
    pairs = _paired(base, edited)
    found = difference(pairs[:, 1] - pairs[:, 0], lambda means: means[:, 0], draws=draws, seed=seed)
    return replace(found, measure=found.measure.against(float(pairs[:, 0].mean()) if len(pairs) else math.nan))


def paired_perplexity(
    base: ArrayLike, edited: ArrayLike, tokens: ArrayLike, *, draws: int = DRAWS, seed: int = 0
) -> Difference:
    """Estimate the perplexity of the edited model minus that of the base model.

    Args:
        base: The base model's summed log-likelihoods [n], in nats.
        edited: The edited model's summed log-likelihoods [n], in nats.
        tokens: How many tokens (or words) each text has [n].
        draws: How many times the texts are resampled.
        seed: Seed of the random numbers.

    Returns:
        The difference of perplexities, with the base's perplexity beside it.

    Raises:
        ValueError: When `base` and `edited` differ in length.
    """
    columns = np.concatenate([_paired(base, edited), np.asarray(tokens, dtype=float)[:, None]], axis=1)

    def statistic(means: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.exp(-means[:, 1] / means[:, 2]) - np.exp(-means[:, 0] / means[:, 2])

    found = difference(columns, statistic, draws=draws, seed=seed)
    return replace(found, measure=found.measure.against(float(np.exp(-columns[:, 0].sum() / columns[:, 2].sum()))))


def paired_accuracy(base: ArrayLike, edited: ArrayLike, *, draws: int = DRAWS, seed: int = 0) -> Difference:
    """Estimate the difference of two accuracies on the same items.

    Args:
        base: The base model's right/wrong items [n], 0 or 1.
        edited: The edited model's right/wrong items [n], in the same order.
        draws: How many times the items are resampled.
        seed: Seed of the random numbers.

    Returns:
        The difference with its bootstrap interval and its exact McNemar p-value.

    Raises:
        ValueError: When the two lists differ in length.
    """
    return replace(paired_bootstrap(base, edited, draws=draws, seed=seed), p=mcnemar_exact(base, edited))


@dataclass(frozen=True)
class Pair:
    """Two levels of the same items, their difference and the fraction kept.

    All four come from one resampling.

    Attributes:
        base: The base model's level.
        edited: The edited model's level.
        difference: Edited minus base, with its p-value.
        kept: The fraction kept, in [0, 1].
    """

    base: Measure
    edited: Measure
    difference: Difference
    kept: Estimate


def paired_probabilities(base: ArrayLike, edited: ArrayLike, *, draws: int = DRAWS, seed: int = 0) -> Pair:
    """Compare paired probabilities in one resampling.

    The result is what `mean`, `paired_bootstrap` and `kept_probability` return.

    Args:
        base: The base model's probabilities [n].
        edited: The edited model's probabilities [n], in the same order.
        draws: How many times the items are resampled.
        seed: Seed of the random numbers.

    Returns:
        Both means, their difference and the fraction kept.

    Raises:
        ValueError: When the two lists differ in length.
    """
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
    """Compare the perplexities of paired texts in one resampling.

    The result is both perplexities, and what `paired_perplexity` and `kept_perplexity` return.

    Args:
        base: The base model's summed log-likelihoods [n], in nats.
        edited: The edited model's summed log-likelihoods [n], in nats.
        tokens: How many tokens (or words) each text has [n].
        draws: How many times the texts are resampled.
        seed: Seed of the random numbers.

    Returns:
        Both perplexities, their difference and the fraction kept.

    Raises:
        ValueError: When `base` and `edited` differ in length.
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
    """Estimate the geometric mean of `other / base` over paired positive numbers.

    An example is one KL divergence per concept. The bootstrap runs on the mean of the logarithms. Value and interval
    are exponentiated. The p-value is that of the mean logarithm being 0. The standard error is on the log scale.

    Args:
        base: Positive numbers [n].
        other: Positive numbers [n], in the same order.
        draws: How many times the pairs are resampled.
        seed: Seed of the random numbers.

    Returns:
        The ratio, with baseline 1, and its p-value.

    Raises:
        ValueError: When a number is not positive, or the two lists differ in length.
    """
    pairs = _paired(base, other)
    if (pairs <= 0).any():
        raise ValueError("a log ratio needs positive numbers")
    difference = paired_bootstrap(np.log(pairs[:, 0]), np.log(pairs[:, 1]), draws=draws, seed=seed)
    logs = difference.measure
    ratio = Measure(math.exp(logs.value), math.exp(logs.low), math.exp(logs.high), logs.n, logs.standard_error, 1.0)
    return Difference(ratio, difference.p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values by Holm's step-down correction (1979).

    Args:
        p_values: The p-values. Those that are not-a-number stay out of the correction.

    Returns:
        The adjusted p-values, in the order given.
    """
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
    """The point at which a curve reaches the wanted removal.

    Attributes:
        strength: The strength at the crossing.
        damage: The damage there, KL divergence in nats.
    """

    strength: float
    damage: float


def matched_removal(
    strengths: Sequence[float], masses: Sequence[float], damages: Sequence[float], *, target: float = 0.1
) -> Crossing | None:
    """Find the damage at the smallest strength that reaches the wanted removal.

    The removal is reached when the concept's mass has fallen to `target` of the base's. Between two points the
    logarithms of mass and damage are taken as linear in the strength. A curve that starts above 0 is given the point
    (0, mass 1, damage 0). From there the damage grows as the square of the strength, as a KL divergence does.

    Args:
        strengths: Strengths [n], ascending, all >= 0.
        masses: The concept's probability mass [n], as a fraction of the base's.
        damages: KL divergences [n], in nats.
        target: The wanted mass, as a fraction of the base's.

    Returns:
        The crossing, or None when the curve never gets there.

    Raises:
        ValueError: When the strengths do not ascend or the lists differ in length.
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
    """Find the smallest strength at which the mass falls to `target` of the base's.

    Args:
        strengths: Strengths [n], ascending, all >= 0 (see `matched_removal`).
        masses: The concept's probability mass [n], as a fraction of the base's.
        target: The wanted mass, as a fraction of the base's.

    Returns:
        The strength, or None when the curve never gets there.

    Raises:
        ValueError: When the strengths do not ascend or the lists differ in length.
    """
    crossing = matched_removal(strengths, masses, [0.0] * len(strengths), target=target)
    return None if crossing is None else crossing.strength


def _paired(base: ArrayLike, edited: ArrayLike) -> NDArray[np.float64]:
    first, second = np.asarray(base, dtype=np.float64), np.asarray(edited, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"paired items must be two lists of one length, not {first.shape} and {second.shape}")
    return np.stack([first, second], axis=1)
