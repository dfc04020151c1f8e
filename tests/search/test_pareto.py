"""The front, its knee and a budget, on points whose answer is known."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rotate_edit.search.pareto import front, knee, savings, within_budget

numbers = st.floats(0, 1, allow_nan=False)


@given(st.lists(st.tuples(numbers, numbers), max_size=30))
def test_the_front_is_what_nothing_beats(points):
    kept = front(points)
    chosen = [points[place] for place in kept]
    assert chosen == sorted(chosen)
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(chosen))
    for place, point in enumerate(points):
        beaten = any(
            other[0] >= point[0] and other[1] <= point[1] and other != point for other in points
        ) or point in points[:place]  # fmt: skip
        assert beaten == (place not in kept)


def test_points_that_are_no_numbers_are_left_out():
    assert front([(0.5, math.nan), (math.inf, 0.1), (0.2, 0.3)]) == [2]


def test_the_knee_of_an_elbow():
    # Damage is flat up to a removal of 0.9 and then rises a hundredfold.
    points = [(0.1, 1e-4), (0.5, 1.2e-4), (0.9, 1.5e-4), (0.95, 4e-3), (0.99, 1e-2)]
    assert knee(points) == 2


def test_a_short_or_straight_front_gives_its_strongest_point():
    assert knee([(0.5, 0.1)]) == 0
    assert knee([(0.5, 0.1), (0.9, 0.2)]) == 1
    assert knee([(0.0, 1e-4), (0.1, 1e-2), (1.0, 2e-2)]) == 2
    with pytest.raises(ValueError, match="no knee"):
        knee([])


def test_a_budget_buys_the_most_removal():
    points = [(0.5, 0.01), (0.8, 0.02), (0.9, 0.05)]
    assert within_budget(points, 0.03) == 1
    assert within_budget(points, 0.001) is None


def test_savings_are_over_the_own_points_at_the_same_removal():
    # The own damage halves when the share that is left grows tenfold, and reaches from 0.01 to 0.1 left.
    own = [(0.99, 2e-3), (0.9, 1e-3)]
    found = savings([(0.5, 1e-4), (0.9, 5e-4), (1 - 10**-1.5, 1e-3), (0.999, 1e-4)], own)
    assert found == pytest.approx({1: 0.5, 2: 1 / math.sqrt(2)})
    assert savings([(0.9, 1e-3)], []) == {}
