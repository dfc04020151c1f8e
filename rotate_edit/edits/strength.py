"""The one solver of a strength: where something that is measured crosses a target (maths only)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

STRONGEST = 64.0
BISECTIONS = 6


@dataclass(frozen=True)
class Goal:
    """What the strength of an edit is chosen by.

    Attributes:
        kind: "remaining" (the share of the concept's probability mass that is left), "budget" (nats of KL divergence
            on texts without the concept), "odds" (how many times as large the concept's odds become), or "strength"
            (the number itself, in the method's unit; below 0 it amplifies).
        value: The share, the nats, the factor or the strength.
    """

    kind: str
    value: float

    @property
    def amplifies(self) -> bool:
        """Whether the concept is amplified."""
        return self.kind == "odds" or (self.kind == "strength" and self.value < 0)


@dataclass(frozen=True)
class Crossing:
    """Two strengths around a crossing.

    Attributes:
        low: The strongest that was measured before the target.
        high: The weakest that was measured at or beyond the target. Infinite when none reached it.
        at: What was measured at `high`; at `low` when none reached it.
    """

    low: float
    high: float
    at: float

    @property
    def reached(self) -> bool:
        """Whether any strength reached the target."""
        return math.isfinite(self.high)


def cross(
    measured: Callable[[float], float],
    target: float,
    *,
    falling: bool = True,
    start: float = 1.0,
    near: float | None = None,
    limit: float = STRONGEST,
    steps: int = BISECTIONS,
) -> Crossing:
    """Find where a measure that falls (or rises) with the strength crosses a target.

    The strength is doubled from `start` until the target is reached. Then the bracket is narrowed by bisection. With
    `near` the logarithm of the measure is interpolated instead, which takes fewer measurements.

    Args:
        measured: The measure at a positive strength.
        target: What it is to cross. Positive.
        falling: Whether the measure falls with the strength.
        start: The first strength that is measured.
        near: Stop narrowing as soon as the measure is within this factor of the target. None bisects to the end.
        limit: The strongest strength that is measured.
        steps: How often the bracket is narrowed.

    Returns:
        The bracket. With 6 bisections its ends are within 1.6 % of each other above `start`, and `start / 64` apart
        below it.
    """

    def is_there(value: float) -> bool:
        return value <= target if falling else value >= target

    low, high = 0.0, start
    before, value = (1.0 if falling else 0.0), measured(start)
    while not is_there(value):
        if 2 * high > limit:
            return Crossing(high, math.inf, value)
        low, before, high = high, value, 2 * high
        value = measured(high)
    for _ in range(steps):
        if near is not None and 1 / near < value / target < near:
            break
        share = 0.5 if near is None else _share(before, value, target)
        middle = low + share * (high - low)
        found = measured(middle)
        if is_there(found):
            high, value = middle, found
        else:
            low, before = middle, found
            if near is not None and 1 / near < found / target < near:
                return Crossing(low, middle, found)
    return Crossing(low, high, value)


def _share(before: float, after: float, target: float) -> float:
    """How far into a bracket the logarithm crosses the target; never within a tenth of its ends."""
    if before <= 0 or after == before:
        return 0.5
    share = math.log(before / target) / math.log(before / max(after, 1e-12))
    return min(0.9, max(0.1, share))
