"""Locators choose exactly what they say, in order and without repeats, and ask for no more than they need."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rotate_edit.channels.locators import MatrixView, find_locator
from rotate_edit.edits.methods import declaration, method_names
from rotate_edit.errors import BadInput

NAMES = {"all": set(), "last-matrix": set(), "channels": {"channels"}, "lm-head": {"scores"}, "random": {"channels"}}


@st.composite
def views(draw: st.DrawFn) -> MatrixView:
    neurons = draw(st.integers(1, 60))
    located = sorted(draw(st.sets(st.integers(0, neurons - 1))))
    scores = draw(st.lists(st.floats(-5, 5, width=32), min_size=neurons, max_size=neurons))
    return MatrixView(
        neurons=neurons,
        is_last=draw(st.booleans()),
        by_channels=torch.tensor(located, dtype=torch.int64),
        scores=torch.tensor(scores),
        least_score=draw(st.floats(0, 6)),
        seed=draw(st.integers(0, 10**9)),
    )


def rows(name: str, view: MatrixView) -> list[int]:
    found: list[int] = find_locator(name).rows(view).tolist()
    return found


@pytest.mark.parametrize("name", NAMES)
@given(view=views())
def test_rows_are_neurons_in_order_without_repeats(name: str, view: MatrixView) -> None:
    found = rows(name, view)
    assert found == sorted(set(found))
    assert set(found) <= set(range(view.neurons))
    assert find_locator(name).rows(view).dtype == torch.int64


@given(view=views())
def test_each_chooses_what_its_title_says(view: MatrixView) -> None:
    assert rows("all", view) == list(range(view.neurons))
    assert rows("last-matrix", view) == (list(range(view.neurons)) if view.is_last else [])
    assert rows("channels", view) == view.by_channels.tolist()
    assert view.scores is not None
    high = [row for row, score in enumerate(view.scores) if abs(score) >= view.least_score]
    assert rows("lm-head", view) == high


@given(view=views())
def test_random_neurons_are_as_many_and_depend_on_the_seed_and_the_number_alone(view: MatrixView) -> None:
    found = rows("random", view)
    assert len(found) == len(view.by_channels)
    other = replace(view, scores=None, is_last=not view.is_last, least_score=0.0, by_channels=view.by_channels.flip(0))
    assert rows("random", other) == found


def test_random_neurons_are_drawn_from_all_alike() -> None:
    view = MatrixView(20, False, torch.arange(5), None, 1.0, 0)
    drawn = torch.zeros(20)
    for seed in range(2000):
        drawn[rows("random", replace(view, seed=seed))] += 1
    # Each is drawn in a quarter of the draws: 500 times, with a standard deviation of 19.
    assert float((drawn - 500).abs().max()) < 5 * 19.4


def test_drawing_leaves_torchs_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    rows("random", MatrixView(20, False, torch.arange(5), None, 1.0, 0))
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_locator_does_not_declare_it_does_not_use(name: str) -> None:
    found = find_locator(name)
    assert found.reads == NAMES[name]
    assert found.name == name
    view = MatrixView(12, True, torch.tensor([2, 7]), torch.linspace(-2, 2, 12), 1.0, 5)
    # Neither scores nor channels that it does not read change what it chooses.
    without = replace(
        view,
        scores=view.scores if "scores" in found.reads else None,
        by_channels=view.by_channels if "channels" in found.reads else torch.tensor([], dtype=torch.int64),
    )
    assert torch.equal(found.rows(without), found.rows(view))


def test_every_method_has_a_locator_and_every_locator_a_method() -> None:
    assert {declaration(method).locator for method in method_names()} == set(NAMES)


def test_an_unknown_locator_is_refused_by_name() -> None:
    with pytest.raises(BadInput, match="no locator 'nearest'; there are all, last-matrix"):
        find_locator("nearest")
