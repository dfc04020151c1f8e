"""Support against chance: what is drawn looks like the layer, p-values say what they mean, and the rate is kept."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planted_neurons import locate_planted, write_planted
from scipy.stats import binom

from rotate_edit.channels.locate import SearchSettings, choose_channels
from rotate_edit.channels.null import Null, draw_neurons, kept_null, largest_p_value, p_values
from rotate_edit.channels.solver import SolverSettings
from rotate_edit.files import cache_folder


def test_drawn_neurons_have_the_mean_and_covariance_of_the_directions() -> None:
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(6, 6, generator=generator)
    vectors = torch.randn(40_000, 6, generator=generator) @ mixing + torch.randn(6, generator=generator)
    unit = torch.nn.functional.normalize(vectors, dim=1)
    # Lengths do not count, nor do neurons of length 0.
    longer = torch.cat([vectors * torch.rand(len(vectors), 1, generator=generator) * 100, torch.zeros(7, 6)])
    drawn = draw_neurons(longer, generator)
    assert drawn.shape == longer.shape
    torch.testing.assert_close(drawn.mean(0), unit.mean(0), rtol=0, atol=0.02)
    torch.testing.assert_close(drawn.T.cov(), unit.T.cov(), rtol=0, atol=0.01)


def test_few_neurons_and_dead_ones_can_be_drawn_from() -> None:
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(3, 8, generator=generator)
    drawn = draw_neurons(few, generator)
    assert bool(drawn.isfinite().all())
    unit = torch.nn.functional.normalize(few, dim=1)
    span = torch.linalg.svd(unit - unit.mean(0), full_matrices=False).Vh[:2]
    outside = (drawn - unit.mean(0)) @ (torch.eye(8) - span.T @ span)
    assert float(outside.abs().max()) < 0.01
    assert bool((draw_neurons(torch.zeros(4, 8), generator) == 0).all())


def made_null(supports: torch.Tensor, without: int = 0) -> Null:
    return Null(len(supports) + without, tuple(supports.sort(descending=True).values.tolist()))


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 10**6))
def test_p_values_fall_with_support_and_are_ranks_inside(carrying: int, without: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    null = made_null(2 + 0.3 * torch.randn(carrying, generator=generator).double(), without)
    found = torch.linspace(-1, 9, 200).double()
    p = p_values(null, found)
    assert bool((p[1:] <= p[:-1] + 1e-12).all())
    assert bool((p > 0).all() and (p <= 1).all())
    # One who has less support than all of them is as good as those who have the concept at all.
    assert float(p[0]) == pytest.approx((carrying + 1) / (carrying + without + 1), rel=1e-12)


def test_the_tail_is_exact_for_an_exponential_and_cautious_for_a_normal_one() -> None:
    """Of fresh supports, a share of at most x has a p-value of at most x, in the mean over many small nulls."""
    generator = torch.Generator().manual_seed(0)
    levels = (0.1, 0.01, 0.001, 1e-4)
    nulls, size = 600, 200
    # The supports that are reached with these probabilities.
    reached = torch.logspace(-14, 0, 1200, dtype=torch.float64)[:-1]
    exact = {"exponential": -reached.log(), "normal": -torch.special.ndtri(reached)}
    shares = {kind: dict.fromkeys(levels, 0.0) for kind in exact}
    for _ in range(nulls):
        drawn = torch.rand(size, generator=generator, dtype=torch.float64)
        for kind, values in (("exponential", -drawn.log()), ("normal", -torch.special.ndtri(drawn))):
            p = p_values(made_null(values), exact[kind])
            for level in levels:
                shares[kind][level] += float((reached * (p <= level)).max()) / nulls
    for level in levels:
        assert shares["exponential"][level] == pytest.approx(level, rel=0.15), level
        assert shares["normal"][level] < 1.05 * level, level


def test_where_hardly_any_null_channel_carries_the_concept_all_of_them_bound_the_p_value() -> None:
    generator = torch.Generator().manual_seed(3)
    every = torch.empty(600, dtype=torch.float64).exponential_(generator=generator) + 1
    sorted_ = tuple(every.sort(descending=True).values.tolist())
    rare = Null(600, sorted_[5:6], sorted_)
    found = torch.tensor([0.5, sorted_[5], 4.0, 12.0], dtype=torch.float64)
    p, alone = p_values(rare, found), p_values(Null(600, sorted_), found)
    # Never above either bound, and far beyond what one null channel in 600 could tell.
    assert bool((p <= p_values(Null(600, sorted_[5:6]), found)).all())
    assert bool((p <= alone).all())
    assert float(p[3]) == pytest.approx(float(alone[3]))
    assert float(p[3]) < 1e-3
    assert float(p_values(Null(600, sorted_[5:6]), found)[3]) == 1 / 601
    # An exponential tail that begins at 1: the p-value is of the size of the true chance.
    assert 0.2 < float(p[3]) / math.exp(-11) < 5


@given(st.lists(st.floats(0, 1), max_size=30), st.floats(0.01, 1.0))
def test_the_limit_is_that_of_benjamini_and_hochberg(values: list[float], rate: float) -> None:
    ordered = sorted(values)
    passing = [p for place, p in enumerate(ordered, 1) if p <= rate * place / len(values) * (1 - 1e-9)]
    limit = largest_p_value(torch.tensor(values, dtype=torch.float64), rate)
    assert limit >= (passing[-1] if passing else -1.0)
    assert sum(p <= limit for p in values) == 0 or limit <= rate * sum(p <= limit for p in values) / len(values) + 1e-9


def test_a_null_is_kept_and_a_damaged_one_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []

    def make() -> Null:
        made.append(1)
        return Null(5, (2.5, 2.0), (3.0, 2.5, 2.0))

    assert kept_null({"a": 1}, 5, make) == kept_null({"a": 1}, 5, make) == Null(5, (2.5, 2.0), (3.0, 2.5, 2.0))
    assert len(made) == 1
    kept_null({"a": 2}, 5, make)
    kept_null({"a": 1}, 6, make)
    assert len(made) == 3
    damaged = ["", "[]", "{", '{"count": 5}', "[" * 100_000]
    damaged += [json.dumps({"count": 5, "supports": bad}) for bad in (3, ["a"], [True], [1.0] * 6, [math.nan])]
    for content in damaged:
        before = len(made)
        for one in cache_folder().iterdir():
            one.write_text(content)
        assert kept_null({"a": 1}, 5, make) == Null(5, (2.5, 2.0), (3.0, 2.5, 2.0))
        assert len(made) == before + 1


FDR, DRAWS, PLANTED = 0.2, 10, 10


def test_among_planted_neurons_the_rate_is_kept_and_most_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over all draws the false ones are no more than the rate allows, within the error of so many draws."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    false = located = true = 0
    search = replace(SearchSettings(SolverSettings()), fdr=FDR)
    for seed in range(DRAWS):
        folder = tmp_path / f"m{seed}"
        truth = write_planted(folder, layers=3, neurons=200, planted=PLANTED, strength=1.0, seed=seed)
        group = locate_planted(folder, candidates=40, seed=seed)
        chosen = choose_channels(group.channels, group.tokens, group.ids, search)
        neurons = {(one.layer, one.neuron) for one in chosen}
        false, located, true = false + len(neurons - truth), located + len(neurons), true + len(neurons & truth)
    assert true >= 0.8 * PLANTED * DRAWS
    assert false <= binom.ppf(0.999, located, FDR)


@pytest.mark.parametrize("tilted_start", [True, False])
def test_where_nothing_is_planted_hardly_anything_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tilted_start: bool
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    search = replace(SearchSettings(SolverSettings()), fdr=0.05)
    with_some = 0
    for seed in range(4):
        folder = tmp_path / f"m{seed}"
        write_planted(folder, layers=2, neurons=150, planted=0, strength=0.0, seed=seed)
        group = locate_planted(folder, candidates=20, seed=seed, tilted_start=tilted_start)
        with_some += bool(choose_channels(group.channels, group.tokens, group.ids, search))
    # Each draw has at most one chance in twenty.
    assert with_some <= binom.ppf(0.999, 4, 0.05)
