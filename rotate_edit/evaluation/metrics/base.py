"""What a metric is: an object that measures an edited model against its base, found by its name.

A metric is a class in one file of this package, or of anybody's, under the decorator `metric`. It declares its title,
its unit and which way is better. Reports, cards, gates and the command line ask for nothing else.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from rotate_edit.errors import BadInput
from rotate_edit.evaluation.compare import Part, Plan
from rotate_edit.evaluation.harness import Scores
from rotate_edit.evaluation.statistics import Estimate, Measure
from rotate_edit.evaluation.tasks import Items

Value = TypeVar("Value")
HIGHER, LOWER = "higher", "lower"


@dataclass(frozen=True)
class MeasuredModel:
    """One model as metrics see it: the base, or an edited one.

    Attributes:
        plan: What is asked.
        scores: By task, what lm-eval found.
        model: The loaded model as it stands now. None where a backend of lm-eval holds it.
        tokenizer: Its tokenizer.
        items: What it is asked, or None.
        concept_ids: The tokens of the suppressed concepts (of all concepts, where every one is amplified), int64.
        amplified_ids: The tokens of the amplified concepts, int64. None where none is.
        texts: Its greedy continuation of each prompt.
        samples: Its sampled continuations of each prompt.
        about: Whether each prompt is about a concept. None for a concept that is amplified beside suppressed ones.
        parts: The items that are reported together.
        kept: By the place of a part, the share of the base's result that is kept. Empty for the base.
        values: What was computed on it so far.
    """

    plan: Plan
    scores: Mapping[str, Scores]
    model: Any = None
    tokenizer: Any = None
    items: Items | None = None
    concept_ids: Tensor | None = None
    amplified_ids: Tensor | None = None
    texts: tuple[str, ...] = ()
    samples: tuple[list[str], ...] = ()
    about: tuple[bool | None, ...] = ()
    parts: Sequence[Part] = ()
    kept: Mapping[int, Estimate] = field(default_factory=dict)
    values: dict[Hashable, Any] = field(default_factory=dict)

    def once(self, key: Hashable, compute: Callable[[], Value]) -> Value:
        """A value that several metrics use, computed when the first asks for it."""
        if key not in self.values:
            self.values[key] = compute()
        value: Value = self.values[key]
        return value


class Metric:
    """A metric. Its name, title and so on are set by the decorator.

    Attributes:
        name: What results and gates call it.
        title: What stands beside its figure.
        note: What it is taken over, in a few words.
        unit: "share" is written in per cent. "nats", "times" and others are written as they are.
        better: `HIGHER` or `LOWER`, which is what a gate asks for. Empty where neither is.
        headline: Whether it belongs to the summary.
        tile: Whether a report gives it a tile.
    """

    name: str
    title: str
    note: str
    unit: str
    better: str
    headline: bool
    tile: bool

    def prepare(self, base: MeasuredModel) -> Any:
        """What is kept of the base, measured with nothing switched on."""
        return None

    def measure(self, edited: MeasuredModel, base: MeasuredModel, known: Any) -> Measure | None:
        """Measure the edited model while it is switched on.

        Args:
            edited: The edited model.
            base: The base, as it was measured before. Its model is the same object, edited now.
            known: What `prepare` kept.

        Returns:
            The measure with its interval and the base's value as its baseline. None where there is nothing to measure.
        """
        raise TypeError(f"the metric {self.name} measures nothing")


_METRICS: dict[str, Metric] = {}
Kind = TypeVar("Kind", bound=type[Metric])


def metric(
    name: str,
    *,
    title: str,
    note: str,
    unit: str = "",
    better: str = "",
    headline: bool = False,
    tile: bool = True,
) -> Callable[[Kind], Kind]:
    """Register a class as a metric.

    Args:
        name: What results and gates call it.
        title: What stands beside its figure.
        note: What it is taken over, in a few words.
        unit: "share" is written in per cent.
        better: `HIGHER` or `LOWER`.
        headline: Whether it belongs to the summary.
        tile: Whether a report gives it a tile.
    """

    def register(kind: Kind) -> Kind:
        made = kind()
        made.name, made.title, made.note, made.unit = name, title, note, unit
        made.better, made.headline, made.tile = better, headline, tile
        _METRICS[name] = made
        return kind

    return register


def all_metrics() -> tuple[Metric, ...]:
    """Every metric, in the order in which reports show them."""
    return tuple(_METRICS.values())


def find_metric(name: str) -> Metric:
    """The metric of a name.

    Raises:
        BadInput: There is none of that name.
    """
    if name not in _METRICS:
        raise BadInput(f"there is no metric {name!r}; there are {', '.join(_METRICS)}.")
    return _METRICS[name]


def failed_gates(measures: Mapping[str, Any], bounds: Mapping[str, float]) -> list[str]:
    """The gates that fail, one sentence each.

    Every named metric must have been measured, and lie on the better side of its bound.

    Args:
        measures: Measures as plain JSON, by the metric's name.
        bounds: By the metric's name.

    Raises:
        BadInput: There is no such metric, neither side of it is better, or a bound is not a finite number.
    """
    failures = []
    for name, bound in bounds.items():
        better = find_metric(name).better
        if not math.isfinite(bound):
            raise BadInput(f"the bound {bound} of {name} is not a finite number, so it cannot be a gate.")
        if not better:
            raise BadInput(f"the metric {name} has no better side, so it cannot be a gate.")
        wanted = f"at {'least' if better == HIGHER else 'most'} {bound:g}"
        value = (measures.get(name) or {}).get("value")
        if value is None:
            failures.append(f"{name} was not measured, and {wanted} is asked for.")
        elif value < bound if better == HIGHER else value > bound:
            failures.append(f"{name} is {value:.4g}, and {wanted} is asked for.")
    return failures
