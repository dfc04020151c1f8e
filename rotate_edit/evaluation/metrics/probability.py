"""The probability of a concept's words, and how far all other predictions moved."""

import math
from typing import Any

from torch import Tensor

from rotate_edit.evaluation import measures
from rotate_edit.evaluation.items import texts_about
from rotate_edit.evaluation.measures import Reference
from rotate_edit.evaluation.metrics.base import LOWER, MeasuredModel, Metric, metric
from rotate_edit.evaluation.statistics import Measure
from rotate_edit.models.batches import Passages, tokenise

Prompts = tuple[Passages, Tensor]


def reference_of(base: MeasuredModel) -> Reference | None:
    """The base's answers on texts with the suppressed concepts and on texts without any of the edited ones."""

    def read() -> Reference | None:
        if base.items is None or base.concept_ids is None or base.model is None:
            return None
        own = texts_about(base.items, base.plan.suppressed or base.plan.concepts)[0]
        others = texts_about(base.items, base.plan.concepts)[1]
        if not own or not others:
            return None
        return measures.reference(
            base.model, base.tokenizer, base.concept_ids, concept_texts=own, other_texts=others, longest=_longest(base)
        )

    return base.once("reference", read)


def prompts_of(base: MeasuredModel) -> Prompts | None:
    """The neutral prompts, and the base's log-probabilities of the first token after each."""

    def read() -> Prompts | None:
        if base.items is None or not base.items.prompts or base.model is None:
            return None
        size = base.model.config.get_text_config().vocab_size
        prompts = tokenise(base.tokenizer, base.items.prompts, vocabulary_size=size, longest=_longest(base))
        return prompts, measures.last_position(base.model, prompts)

    return base.once("prompts", read)


def _longest(base: MeasuredModel) -> int | None:
    return getattr(base.model.config.get_text_config(), "max_position_embeddings", None)


def ratio_to_base(measure: Measure) -> Measure:
    """A measure as a multiple of its baseline."""
    base = measure.baseline or math.nan
    return Measure(
        measure.value / base, measure.low / base, measure.high / base, measure.n, measure.standard_error / base, 1.0
    )


@metric("amplification", title="times likelier", note="the concept's words on neutral prompts", unit="times")
class Amplification(Metric):
    """The probability of the amplified concepts' words after neutral prompts, as a multiple of the base's."""

    def prepare(self, base: MeasuredModel) -> Prompts | None:
        """The prompts, where a concept is amplified."""
        return prompts_of(base) if base.amplified_ids is not None else None

    def measure(self, edited: MeasuredModel, base: MeasuredModel, known: Any) -> Measure | None:
        """None where no concept is amplified."""
        if known is None or base.amplified_ids is None:
            return None
        found = measures.concept_probability(edited.model, known[0], base.amplified_ids, known[1])
        return ratio_to_base(found)


def _mass(edited: MeasuredModel, known: Reference) -> Measure:
    return edited.once(
        "concept mass",
        lambda: measures.concept_mass(edited.model, known.concept, known.concept_ids, known.concept_mass),
    )


@metric(
    "concept_mass_fraction", title="of its probability left", note="on the concept's words where texts have one",
    unit="share", better=LOWER,
)  # fmt: skip
class ConceptMassFraction(Metric):
    """The concept's probability mass where texts have one of its words, as a share of the base's."""

    def prepare(self, base: MeasuredModel) -> Reference | None:
        """The base's answers on the texts."""
        return reference_of(base)

    def measure(self, edited: MeasuredModel, base: MeasuredModel, known: Any) -> Measure | None:
        """None without texts."""
        return None if known is None else ratio_to_base(_mass(edited, known))


@metric(
    "collateral_kl", title="nats of collateral KL", note="over texts without the concept", unit="nats", better=LOWER
)
class CollateralKL(Metric):
    """Mean KL(base || edited) over all positions of texts without the concept."""

    def prepare(self, base: MeasuredModel) -> Reference | None:
        """The base's answers on the texts."""
        return reference_of(base)

    def measure(self, edited: MeasuredModel, base: MeasuredModel, known: Any) -> Measure | None:
        """None without texts."""
        return None if known is None else measures.collateral_kl(edited.model, known.others, known.others_base)


@metric(
    "first_token_kl", title="nats of first-token KL", note="on neutral prompts", unit="nats", better=LOWER,
    headline=True,
)  # fmt: skip
class FirstTokenKL(Metric):
    """KL(base || edited) of the first generated token after neutral prompts, as heretic's evaluator takes it."""

    def prepare(self, base: MeasuredModel) -> Prompts | None:
        """The prompts and the base's predictions."""
        return prompts_of(base)

    def measure(self, edited: MeasuredModel, base: MeasuredModel, known: Any) -> Measure | None:
        """None without prompts."""
        return None if known is None else measures.first_token_kl(edited.model, *known)


@metric("concept_mass", title="probability of its words", note="where texts have one", tile=False)
class ConceptMass(Metric):
    """The mean probability mass on the concept's words where texts have one."""

    def prepare(self, base: MeasuredModel) -> Reference | None:
        """The base's answers on the texts."""
        return reference_of(base)

    def measure(self, edited: MeasuredModel, base: MeasuredModel, known: Any) -> Measure | None:
        """None without texts."""
        return None if known is None else _mass(edited, known)


@metric("concept_probability", title="probability of its words", note="after neutral prompts", tile=False)
class ConceptProbability(Metric):
    """The mean probability of the concept's tokens as the first token after neutral prompts."""

    def prepare(self, base: MeasuredModel) -> Prompts | None:
        """The prompts, where the concept's tokens are known."""
        return prompts_of(base) if base.concept_ids is not None else None

    def measure(self, edited: MeasuredModel, base: MeasuredModel, known: Any) -> Measure | None:
        """None without prompts or tokens."""
        if known is None or base.concept_ids is None:
            return None
        return measures.concept_probability(edited.model, known[0], base.concept_ids, known[1])
