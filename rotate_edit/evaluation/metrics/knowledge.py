"""What is left of what the base knew: about the concept, about its neighbours, and in general."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rotate_edit.evaluation import knowledge
from rotate_edit.evaluation.knowledge import Answers
from rotate_edit.evaluation.metrics.base import HIGHER, LOWER, MeasuredModel, Metric, metric
from rotate_edit.evaluation.questions import Question, questions_of
from rotate_edit.evaluation.statistics import Measure
from rotate_edit.evaluation.text_tasks import TEXT_ITEMS

# Fewer questions that the base knows say nothing about an edit.
FEWEST = 10


class _OfQuestions(Metric):
    """A metric on multiple-choice questions of one role that the base knows by a margin.

    Attributes:
        role: "concept", "neighbour" or "general".
        shots: How many answered general questions stand before each question.
    """

    role: str
    shots = 0

    def prepare(self, base: MeasuredModel) -> NDArray[np.int64] | None:
        """The places of the known questions, or None where there are too few."""
        if base.model is None or base.items is None:
            return None
        asked = self._asked(base)
        if len(asked) < FEWEST or (self.shots and len(_examples(base, self.shots)) < self.shots):
            return None
        places = knowledge.known_places(self._answers(base, asked, base))
        return places if len(places) >= FEWEST else None

    def measure(self, edited: MeasuredModel, base: MeasuredModel, known: Any) -> Measure | None:
        """None where the base knows too few questions."""
        if known is None:
            return None
        asked = self._asked(base)
        before, after = (self._answers(model, asked, base).of(known) for model in (base, edited))
        return self.compared(before, after)

    def compared(self, before: Answers, after: Answers) -> Measure:
        """The measure of two models' answers to the known questions."""
        return knowledge.accuracy_kept(before, after)

    def _asked(self, base: MeasuredModel) -> tuple[Question, ...]:
        items = base.items
        assert items is not None
        return base.once(("questions", self.role), lambda: questions_of(items, base.plan, self.role))

    def _answers(self, model: MeasuredModel, asked: tuple[Question, ...], base: MeasuredModel) -> Answers:
        examples = knowledge.examples_text(_examples(base, self.shots)) if self.shots else ""
        return model.once(
            ("answers", self.role, self.shots),
            lambda: knowledge.read_answers(model.model, model.tokenizer, asked, before=examples),
        )


def _examples(base: MeasuredModel, number: int) -> tuple[Question, ...]:
    items = base.items
    assert items is not None
    return base.once(("questions", "general"), lambda: questions_of(items, base.plan, "general"))[:number]


@metric(
    "knowledge_kept", title="of its knowledge left", note="answers above chance on questions that the base knows",
    unit="share", better=LOWER, tile=False,
)  # fmt: skip
class KnowledgeKept(_OfQuestions):
    """The share of the accuracy above chance that is left on questions about the concept."""

    role = "concept"


@metric(
    "knowledge_drop", title="nats of log-odds lost", note="right answers to questions about it", unit="nats",
    better=HIGHER, tile=False,
)  # fmt: skip
class KnowledgeDrop(_OfQuestions):
    """The mean fall of the right answer's log-odds among the choices."""

    role = "concept"

    def compared(self, before: Answers, after: Answers) -> Measure:
        """The fall in nats."""
        return knowledge.log_odds_drop(before, after)


@metric(
    "knowledge_drop_5shot", title="nats of log-odds lost, five shots", note="the same after five answered questions",
    unit="nats", better=HIGHER, tile=False,
)  # fmt: skip
class KnowledgeDropFiveShot(KnowledgeDrop):
    """The same with five answered general questions before each. Blanked statements are no questions to answer."""

    shots = knowledge.SHOTS

    def prepare(self, base: MeasuredModel) -> NDArray[np.int64] | None:
        """None for items that were made from text."""
        return None if base.items is not None and base.items.name == TEXT_ITEMS else super().prepare(base)


@metric(
    "neighbours_kept", title="of its neighbours' knowledge left", note="on questions that the base knows",
    unit="share", better=HIGHER, tile=False,
)  # fmt: skip
class NeighboursKept(_OfQuestions):
    """The share of the accuracy above chance that is left on questions about the neighbours."""

    role = "neighbour"


@metric(
    "neighbours_drop", title="nats of log-odds lost", note="right answers to questions about its neighbours",
    unit="nats", better=LOWER, tile=False,
)  # fmt: skip
class NeighboursDrop(KnowledgeDrop):
    """The mean fall of the right answer's log-odds on questions about the neighbours."""

    role = "neighbour"


@metric(
    "general_kept", title="of other knowledge left", note="on general questions that the base knows", unit="share",
    better=HIGHER, tile=False,
)  # fmt: skip
class GeneralKept(_OfQuestions):
    """The share of the accuracy above chance that is left on general questions."""

    role = "general"
