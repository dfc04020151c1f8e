"""Scores made up by hand, and what is said of two readings of the same items."""

from collections.abc import Mapping, Sequence
from typing import Any

from rotate_edit.evaluation.compare import Part, Plan, compare_parts, conclusion
from rotate_edit.evaluation.evaluate import NOT_MEASURED
from rotate_edit.evaluation.harness import Scores
from rotate_edit.evaluation.metrics import MeasuredModel, all_metrics, find_metric
from rotate_edit.evaluation.statistics import Measure

Reading = Mapping[str, Scores]


def reading(
    values: Sequence[float], kind: str = "accuracy", task: str = "task", weights: Sequence[float] = ()
) -> Reading:
    """One task's scores, with a quarter right by guessing."""
    return {task: Scores(task, kind, "acc", 0.25, tuple(values), tuple(weights), {})}


def part(
    rows: Sequence[int], role: str = "concept", kind: str = "A", task: str = "task", title: str = "dogs",
    concept: str = "",
) -> Part:  # fmt: skip
    """Items of one task that are reported together."""
    return Part(task, role, title, kind, tuple(rows), concept)


def measured(name: str, before: Reading, after: Reading, parts: Sequence[Part], plan: Plan) -> Measure | None:
    """One metric of the second reading against the first."""
    _, kept = compare_parts(parts, before, after, plan)
    edited = MeasuredModel(plan, after, parts=parts, kept=kept)
    return find_metric(name).measure(edited, MeasuredModel(plan, before), None)


def compared(before: Reading, after: Reading, parts: Sequence[Part], plan: Plan) -> dict[str, Any]:
    """Rows, the headline metrics and the conclusion, as an evaluation has them."""
    rows, _ = compare_parts(parts, before, after, plan)
    summary = {
        metric.name: (measured(metric.name, before, after, parts, plan) or NOT_MEASURED).plain()
        for metric in all_metrics()
        if metric.headline
    }
    return {"rows": rows, "summary": summary, "words": conclusion(summary, rows, plan)}
