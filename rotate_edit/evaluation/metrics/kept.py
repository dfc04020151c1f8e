"""What is gone and what is kept of the items that were asked."""

from typing import Any

from rotate_edit.evaluation import statistics
from rotate_edit.evaluation.metrics.base import HIGHER, MeasuredModel, Metric, metric
from rotate_edit.evaluation.statistics import Estimate, Measure


@metric(
    "efficacy", title="removed", note="of what the base knew of it above chance", unit="share", better=HIGHER,
    headline=True,
)  # fmt: skip
class Efficacy(Metric):
    """`1 - kept` on the suppressed concepts' own items."""

    def measure(self, edited: MeasuredModel, base: MeasuredModel, known: Any) -> Measure | None:
        """The base against itself has removed nothing: 0."""
        return _against(_removal(edited), 0)


@metric(
    "specificity", title="kept elsewhere", note="of everything else that was asked", unit="share", better=HIGHER,
    headline=True,
)  # fmt: skip
class Specificity(Metric):
    """Harmonic mean of what is kept of general items and of the neighbours'."""

    def measure(self, edited: MeasuredModel, base: MeasuredModel, known: Any) -> Measure | None:
        """The base against itself has kept everything: 1."""
        return _against(_rest(edited), 1)


@metric("harmonic", title="both together", note="harmonic mean of the two", unit="share", better=HIGHER, headline=True)
class Harmonic(Metric):
    """Harmonic mean of efficacy and specificity."""

    def measure(self, edited: MeasuredModel, base: MeasuredModel, known: Any) -> Measure | None:
        """None unless both were measured."""
        removal, rest = _removal(edited), _rest(edited)
        return _against(statistics.harmonic(removal, rest) if removal and rest else None, 0)


def _against(estimate: Estimate | None, baseline: float) -> Measure | None:
    return statistics.measure(estimate).against(baseline) if estimate else None


def _kept(edited: MeasuredModel, role: str) -> list[int]:
    return [number for number in edited.kept if edited.parts[number].role == role]


def _removal(edited: MeasuredModel) -> Estimate | None:
    """From the concept's own parts: those of type A, else any accuracy, else cloze."""
    own = [number for number in _kept(edited, "concept") if not edited.plan.amplifies(edited.parts[number].concept)]
    accurate = [number for number in own if edited.scores[edited.parts[number].task].kind == "accuracy"]
    chosen = [number for number in accurate if edited.parts[number].type == "A"] or accurate or own
    if not chosen:
        return None
    return statistics.efficacy(statistics.mean_kept([edited.kept[number] for number in chosen]))


def _rest(edited: MeasuredModel) -> Estimate | None:
    general = [edited.kept[number] for number in _kept(edited, "general")]
    neighbours = [edited.kept[number] for number in _kept(edited, "neighbour")]
    return statistics.specificity(general, neighbours) if general or neighbours else None
