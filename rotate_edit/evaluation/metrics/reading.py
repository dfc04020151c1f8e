"""How well a model reads: how much harder text about the concept became to follow, outside the concept's words."""

from dataclasses import dataclass
from typing import Any

from rotate_edit.evaluation import comprehension, statistics
from rotate_edit.evaluation.comprehension import Losses, MarkedTexts
from rotate_edit.evaluation.items import texts_about
from rotate_edit.evaluation.metrics.base import HIGHER, LOWER, MeasuredModel, Metric, metric
from rotate_edit.evaluation.statistics import Estimate, Measure

TOKENS = 4096


@dataclass(frozen=True)
class MarkedSets:
    """The texts that comprehension is measured on, and the base's losses on them.

    Attributes:
        own: Texts about the suppressed concepts, and the base's losses.
        others: Texts without any edited concept, and the base's losses.
    """

    own: tuple[MarkedTexts, Losses]
    others: tuple[MarkedTexts, Losses]


def _sets_of(base: MeasuredModel) -> MarkedSets | None:
    """None where there are no words, or no texts with and without the concepts."""

    def read() -> MarkedSets | None:
        if base.items is None or base.model is None or not base.plan.words:
            return None
        own = texts_about(base.items, base.plan.suppressed or base.plan.concepts)[0]
        others = texts_about(base.items, base.plan.concepts)[1]
        if not own or not others:
            return None
        config = base.model.config.get_text_config()
        longest = getattr(config, "max_position_embeddings", None)

        def marked(texts: list[str]) -> tuple[MarkedTexts, Losses]:
            found = comprehension.mark_words(
                base.tokenizer, texts, base.plan.words, vocabulary_size=config.vocab_size, longest=longest,
                token_limit=TOKENS,
            )  # fmt: skip
            return found, comprehension.read_losses(base.model, found)

        return MarkedSets(marked(own), marked(others))

    return base.once("marked texts", read)


class _Comprehension(Metric):
    """A metric of the rise of the loss on texts with and without the concept."""

    def prepare(self, base: MeasuredModel) -> MarkedSets | None:
        """The marked texts and the base's losses."""
        return _sets_of(base)

    def measure(self, edited: MeasuredModel, base: MeasuredModel, known: Any) -> Measure | None:
        """None without texts."""
        return None if known is None else self.taken(*_rises(edited, known))

    def taken(self, own: Estimate, others: Estimate) -> Measure:
        """The measure from the rise on the concept's texts and on others."""
        raise TypeError(f"the metric {self.name} measures nothing")


def _rises(edited: MeasuredModel, known: MarkedSets) -> tuple[Estimate, Estimate]:
    def read() -> tuple[Estimate, Estimate]:
        own, others = (
            comprehension.rise(base, comprehension.read_losses(edited.model, texts), seed=seed)
            for seed, (texts, base) in enumerate((known.own, known.others))
        )
        return own, others

    return edited.once("rises", read)


@metric(
    "comprehension_rise", title="nats of loss more", note="on text about it, outside its words", unit="nats",
    better=HIGHER, tile=False,
)  # fmt: skip
class ComprehensionRise(_Comprehension):
    """The rise of the loss a token on texts about the concept, at tokens that are not its words."""

    def taken(self, own: Estimate, others: Estimate) -> Measure:
        """The concept's texts alone."""
        return statistics.measure(own).against(0)


@metric(
    "comprehension_elsewhere", title="nats of loss more", note="on other texts", unit="nats", better=LOWER, tile=False
)
class ComprehensionElsewhere(_Comprehension):
    """The rise of the loss a token on texts without the concept."""

    def taken(self, own: Estimate, others: Estimate) -> Measure:
        """The other texts alone."""
        return statistics.measure(others).against(0)


@metric(
    "comprehension_selectivity", title="nats of loss more than elsewhere",
    note="on text about it, outside its words", unit="nats", better=HIGHER, tile=False,
)  # fmt: skip
class ComprehensionSelectivity(_Comprehension):
    """The first less the second."""

    def taken(self, own: Estimate, others: Estimate) -> Measure:
        """The difference."""
        return comprehension.selectivity(own, others)
