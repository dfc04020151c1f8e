"""What a model writes: how often it names the concept, repeats itself, and varies its words."""

from typing import Any

from rotate_edit.evaluation import generations
from rotate_edit.evaluation.metrics.base import LOWER, MeasuredModel, Metric, metric
from rotate_edit.evaluation.statistics import Measure


class _LeakRate(Metric):
    """Share of sampled continuations that name the concept.

    Attributes:
        asked: Whether the prompts that count are about the concept.
    """

    asked: bool

    def measure(self, edited: MeasuredModel, base: MeasuredModel, known: Any) -> Measure | None:
        """None without samples of such prompts."""
        if not edited.samples:
            return None
        before, after = (_of_prompts(model, self.asked) for model in (base, edited))
        if not before:
            return None
        was, now = (generations.leak_rate(samples, edited.plan.words) for samples in (before, after))
        return now.against(was.value)


@metric(
    "leak_rate_asked", title="leak rate when asked", note="sampled answers to prompts about it that name it",
    unit="share", better=LOWER,
)  # fmt: skip
class LeakRateAsked(_LeakRate):
    """Share of sampled answers to prompts about the concept that name it."""

    asked = True


@metric(
    "leak_rate_neutral", title="leak rate when not asked", note="sampled answers to neutral prompts that name it",
    unit="share", better=LOWER,
)  # fmt: skip
class LeakRateNeutral(_LeakRate):
    """Share of sampled answers to neutral prompts that name the concept."""

    asked = False


@metric("repetition_4", title="repetition", note="4-grams of words that a text repeats", unit="share", better=LOWER)
class Repetition(Metric):
    """Share of a text's 4-grams of words that occurred in it before."""

    def measure(self, edited: MeasuredModel, base: MeasuredModel, known: Any) -> Measure | None:
        """None without texts."""
        if not edited.texts:
            return None
        return generations.repetition(_written(edited)).against(generations.repetition(_written(base)).value)


@metric("distinct_2", title="variety", note="different pairs of words over all pairs", unit="share")
class Variety(Metric):
    """Different pairs of words over all pairs of words."""

    def measure(self, edited: MeasuredModel, base: MeasuredModel, known: Any) -> Measure | None:
        """None without texts."""
        if not edited.texts:
            return None
        return generations.distinct(_written(edited)).against(generations.distinct(_written(base)).value)


def _written(model: MeasuredModel) -> list[str]:
    return [text for texts in model.samples for text in texts] or list(model.texts)


def _of_prompts(model: MeasuredModel, asked: bool) -> list[list[str]]:
    return [texts for texts, about in zip(model.samples, model.about, strict=True) if about == asked]
