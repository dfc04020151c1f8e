"""What a model writes: repetition, diversity, and how often a concept's words leak into its generations."""

import re
from collections.abc import Sequence

import numpy as np

from rotate_edit.errors import BadInput
from rotate_edit.evaluation import statistics
from rotate_edit.evaluation.statistics import Measure


def repetition(texts: Sequence[str], *, n: int = 4) -> Measure:
    """Measure the share of a text's n-grams of words that occurred in it before (Welleck et al. 2020, seq-rep-n).

    Args:
        texts: The texts. Those of fewer than `n` words are left out.
        n: Number of words in an n-gram.

    Returns:
        The mean over texts, in [0, 1].
    """
    shares = []
    for text in texts:
        grams = _grams(text, n)
        if grams:
            shares.append(1 - len(set(grams)) / len(grams))
    return statistics.mean(shares)


def distinct(texts: Sequence[str], *, n: int = 2) -> Measure:
    """Measure different n-grams of words over all n-grams of all texts (Li et al. 2016, distinct-n).

    The ratio falls as texts are added, so compare equal numbers of texts only. Its interval resamples texts. It is
    centred on the value, because resampling repeats texts and so lowers the ratio itself.

    Args:
        texts: The texts.
        n: Number of words in an n-gram.

    Returns:
        The ratio, in [0, 1].
    """
    lists = [_grams(text, n) for text in texts]
    value = _distinct_share(lists)
    generator = np.random.default_rng(0)
    count = len(lists)
    draws = np.array([_distinct_share([lists[i] for i in generator.integers(0, count, count)]) for _ in range(200)])
    found = draws[np.isfinite(draws)]
    centred = found - found.mean() + value if len(found) else found
    return statistics.measure(statistics.Estimate(value, centred, count))


def _distinct_share(lists: Sequence[Sequence[tuple[str, ...]]]) -> float:
    total = sum(len(grams) for grams in lists)
    return len({gram for grams in lists for gram in grams}) / total if total else float("nan")


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]


def word_pattern(words: Sequence[str]) -> re.Pattern[str]:
    """Make a pattern that finds any of the words, or its plain plural, as whole words in any case.

    Args:
        words: The words. Empty ones are left out.

    Returns:
        The compiled pattern.

    Raises:
        BadInput: When there is no word.
    """
    if not any(word.strip() for word in words):
        raise BadInput("a leak rate needs at least one word of the concept.")
    ordered = sorted({word.strip() for word in words if word.strip()}, key=len, reverse=True)
    return re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, ordered)) + r")(?:s|es)?(?!\w)", re.IGNORECASE)


def leak_rate(generations: Sequence[Sequence[str]], words: Sequence[str]) -> Measure:
    """Measure the share of sampled generations in which a word of the concept appears.

    The interval is, on each side, the wider of two. One resamples prompts, because samples of one prompt resemble each
    other. The other is Wilson's over all samples, because resampling cannot widen a rate of 0 or 1.

    Args:
        generations: The samples of each prompt.
        words: Words of the concept.

    Returns:
        The rate, in [0, 1]. Its `n` is the number of samples in all.

    Raises:
        BadInput: When there is no word.
    """
    pattern = word_pattern(words)
    hits = [sum(bool(pattern.search(text)) for text in texts) for texts in generations]
    rate = statistics.ratio_of_sums(hits, [len(texts) for texts in generations])
    count = sum(map(len, generations))
    whole = statistics.wilson(sum(hits), count)
    low, high = min(rate.low, whole.low), max(rate.high, whole.high)
    return Measure(rate.value, low, high, count, rate.standard_error)
