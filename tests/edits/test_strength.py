"""The one solver of a strength: its bracket holds the crossing, whichever way the measure goes."""

import math
from collections.abc import Callable

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rotate_edit.edits.strength import BISECTIONS, STRONGEST, Goal, cross

RATES = st.floats(0.01, 20)
TARGETS = st.floats(0.02, 0.95)


class Counted:
    """A measure, and the strengths that it was asked for."""

    def __init__(self, measure: Callable[[float], float]) -> None:
        self.measure = measure
        self.asked: list[float] = []

    def __call__(self, strength: float) -> float:
        self.asked.append(strength)
        return self.measure(strength)


@given(rate=RATES, target=TARGETS, start=st.floats(0.05, 4))
def test_the_bracket_holds_a_falling_crossing(rate: float, target: float, start: float) -> None:
    crossing = math.log(1 / target) / rate
    assume(crossing < STRONGEST / 2)
    found = cross(Counted(lambda strength: math.exp(-rate * strength)), target, start=start)
    assert found.reached
    assert found.low <= crossing * (1 + 1e-9)
    assert found.high >= crossing * (1 - 1e-9)
    assert math.exp(-rate * found.high) <= target
    assert found.at == math.exp(-rate * found.high)
    assert found.high - found.low <= max(start, crossing) * 2.0**-BISECTIONS * (1 + 1e-9)


@given(power=st.floats(0.5, 3), target=st.floats(1e-3, 1e3), start=st.floats(0.05, 4))
def test_the_bracket_holds_a_rising_crossing(power: float, target: float, start: float) -> None:
    crossing = target ** (1 / power)
    assume(crossing < STRONGEST / 2)
    found = cross(Counted(lambda strength: strength**power), target, falling=False, start=start)
    assert found.reached
    assert found.low <= crossing * (1 + 1e-9)
    assert found.high >= crossing * (1 - 1e-9)
    assert found.at >= target


@given(crossing=st.floats(1.01, 31), target=TARGETS)
def test_six_bisections_leave_a_bracket_of_under_two_per_cent(crossing: float, target: float) -> None:
    measured = Counted(lambda strength: target ** (strength / crossing))
    found = cross(measured, target)
    assert found.high / found.low <= 1 + 2.0**-BISECTIONS
    doubled = next(place for place in range(7) if measured.measure(2.0**place) <= target)
    assert measured.asked[: doubled + 1] == [2.0**place for place in range(doubled + 1)]
    assert len(measured.asked) == doubled + 1 + BISECTIONS


@given(rate=RATES, target=TARGETS, steps=st.integers(0, 20))
def test_every_further_step_halves_the_bracket(rate: float, target: float, steps: int) -> None:
    crossing = math.log(1 / target) / rate
    assume(crossing < STRONGEST / 2)

    def width(count: int) -> float:
        found = cross(lambda strength: math.exp(-rate * strength), target, steps=count)
        return found.high - found.low

    assert width(steps) == pytest.approx(width(0) / 2**steps, rel=1e-9)


@given(rate=st.floats(1e-4, 0.9), falling=st.booleans(), limit=st.sampled_from([8.0, 64.0, 100.0]))
def test_what_no_strength_reaches_is_said_with_what_was_reached(rate: float, falling: bool, limit: float) -> None:
    bounded = Counted(lambda strength: 0.5 + 0.4 * math.exp(-rate * strength) * (1 if falling else -1))
    found = cross(bounded, 0.4 if falling else 0.6, falling=falling, limit=limit)
    assert not found.reached
    assert found.high == math.inf
    # The strongest that the limit allows was tried, and is what is told of.
    assert found.low == max(bounded.asked) <= limit < 2 * found.low
    assert found.at == bounded.measure(found.low)


@given(rate=st.floats(0.05, 5), target=st.floats(0.02, 0.5), near=st.sampled_from([1.02, 1.1, 1.5]))
def test_near_stops_as_soon_as_the_measure_is_near_enough(rate: float, target: float, near: float) -> None:
    crossing = math.log(1 / target) / rate
    assume(crossing < STRONGEST / 2)
    measured = Counted(lambda strength: math.exp(-rate * strength))
    found = cross(measured, target, near=near, steps=20)
    assert found.reached
    assert 1 / near < found.at / target < near
    assert measured.measure(measured.asked[-1]) == found.at
    # Nothing measured before in narrowing was near enough, so that it did stop as soon as it could.
    reached = next(place for place, strength in enumerate(measured.asked) if measured.measure(strength) <= target)
    assert not any(1 / near < measured.measure(strength) / target < near for strength in measured.asked[reached:-1])
    assert found.low <= crossing * near


@given(rate=st.floats(0.05, 5), target=st.floats(0.02, 0.5))
def test_an_exponential_is_interpolated_in_fewer_measurements_than_it_is_bisected(rate: float, target: float) -> None:
    crossing = math.log(1 / target) / rate
    assume(crossing < STRONGEST / 2)
    straight, halved = (Counted(lambda strength: math.exp(-rate * strength)) for _ in range(2))
    cross(straight, target, near=1.016, steps=20)
    cross(halved, target)
    # The logarithm is a line, so that one guess meets it unless the end of the bracket is too near.
    assert len(straight.asked) <= len(halved.asked)


def test_a_jump_is_bracketed_from_both_sides() -> None:
    found = cross(lambda strength: 1.0 if strength < 3 else 0.0, 0.5, steps=20)
    assert found.low < 3 <= found.high
    assert found.high - found.low < 1e-5
    assert found.at == 0
    # With `near`, and with a measure of zero beyond the jump, every step still narrows the bracket.
    guessed = cross(lambda strength: 1.0 if strength < 3 else 0.0, 0.5, near=1.1, steps=60)
    assert guessed.low < 3 <= guessed.high
    assert guessed.high - guessed.low < 0.1


def test_a_target_that_is_met_at_once_is_narrowed_from_zero() -> None:
    measured = Counted(lambda strength: math.exp(-100 * strength))
    found = cross(measured, 0.5, start=1.0)
    assert found.low == 0
    assert found.high == 2.0**-BISECTIONS
    assert measured.asked[:2] == [1.0, 0.5]


@pytest.mark.parametrize(
    ("goal", "amplifies"),
    [
        (Goal("remaining", 0.1), False),
        (Goal("budget", 0.02), False),
        (Goal("odds", 5), True),
        (Goal("strength", 2), False),
        (Goal("strength", -2), True),
    ],
)
def test_goals_that_amplify(goal: Goal, amplifies: bool) -> None:
    assert goal.amplifies == amplifies
