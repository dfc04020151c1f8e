"""The directions and closed forms of edits are what they claim to be."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_targets import CONCEPT, projection

from rotate_edit.edits import directions
from rotate_edit.edits.directions import Direction, key_coefficients

IDS = torch.tensor(CONCEPT)


def test_a_concepts_mean_is_taken_less_the_usable_vocabularys() -> None:
    rows = projection()
    torch.testing.assert_close(directions.concept_mean(rows, IDS), rows[IDS].mean(0) - rows.mean(0))
    usable = torch.arange(200) < 50
    torch.testing.assert_close(directions.concept_mean(rows, IDS, usable), rows[IDS].mean(0) - rows[:50].mean(0))


def test_the_covariance_is_the_mean_square_of_what_a_step_does_to_the_logits() -> None:
    rows = projection()
    covariance = directions.token_covariance(rows)
    step = torch.randn(16, generator=torch.Generator().manual_seed(2))
    logits = rows @ step
    assert float(step @ covariance @ step) == pytest.approx(float((logits - logits.mean()).square().mean()), rel=1e-4)
    # A vector that is added to every token changes no prediction.
    torch.testing.assert_close(directions.token_covariance(rows + step), covariance, rtol=1e-4, atol=1e-4)


def test_direction_is_a_pair() -> None:
    unit = directions.mean_direction(torch.tensor([3.0, 4.0]))
    assert isinstance(unit, Direction)
    torch.testing.assert_close(unit.read, torch.tensor([0.6, 0.8]))
    assert torch.equal(unit.read, unit.write)


def test_the_least_collateral_direction_beats_every_other_with_the_same_effect() -> None:
    rows = projection()
    mean, covariance = directions.concept_mean(rows, IDS), directions.token_covariance(rows)
    best = directions.least_collateral_direction(mean, covariance, ridge=1e-9)
    assert float(best.read @ best.write) == pytest.approx(1.0, abs=1e-5)
    cost = float(best.write @ covariance @ best.write)
    # The cost is the mean square change of all logits, which the closed form must minimise.
    centred = rows - rows.mean(0)
    assert cost == pytest.approx(float((centred @ best.write).square().mean()), rel=1e-4)
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        other = best.write + 0.05 * torch.randn(16, generator=generator)
        other = other / (mean @ other)
        assert float(other @ covariance @ other) >= cost * (1 - 1e-5)
    # The mean direction, scaled to the same effect, costs more on an anisotropic vocabulary.
    plain = mean / (mean @ mean)
    assert float(plain @ covariance @ plain) > 1.5 * cost


def test_kept_words_do_not_move_and_the_concept_still_does() -> None:
    rows = projection()
    mean, covariance = directions.concept_mean(rows, IDS), directions.token_covariance(rows)
    keep = torch.stack([directions.concept_mean(rows, torch.tensor(ids)) for ids in ([1], [9, 10])])
    found = directions.least_collateral_direction(mean, covariance, keep=keep)
    assert (keep @ found.write).abs().max() < 1e-4
    assert float(mean @ found.write) == pytest.approx(1.0, abs=1e-5)


def test_keeping_the_concept_itself_is_refused() -> None:
    rows = projection()
    mean, covariance = directions.concept_mean(rows, IDS), directions.token_covariance(rows)
    with pytest.raises(ValueError, match="own direction"):
        directions.least_collateral_direction(mean, covariance, keep=mean[None])


def test_a_kept_mean_direction_leaves_the_kept_words_alone() -> None:
    rows = projection()
    mean = directions.concept_mean(rows, IDS)
    keep = rows[[11, 12, 13]]
    found = directions.keeping(directions.mean_direction(mean), keep)
    assert (keep @ found.write).abs().max() < 1e-4 * keep.norm(dim=1).max() * found.write.norm()
    assert float(found.read @ found.write) == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="span the concept"):
        directions.keeping(directions.mean_direction(mean), torch.stack([mean, keep[0]]))


@given(seed=st.integers(0, 50))
@settings(max_examples=20, deadline=None)
def test_a_rotation_of_the_residual_stream_rotates_the_edit(seed: int) -> None:
    rows = projection(seed).double()
    vectors = torch.randn(5, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(seed + 1)).double()).Q
    ids = torch.tensor([2, 6])

    def edited(basis: torch.Tensor) -> torch.Tensor:
        turned = rows @ basis
        mean, covariance = directions.concept_mean(turned, ids), directions.token_covariance(turned)
        direction = directions.least_collateral_direction(mean, covariance)
        left, right = directions.subtract_direction(vectors @ basis, direction)
        return vectors @ basis + left @ right

    torch.testing.assert_close(edited(rotation), edited(torch.eye(16).double()) @ rotation, atol=1e-8, rtol=1e-8)


@given(st.integers(0, 10**6), st.integers(2, 12), st.floats(1e-3, 10))
def test_no_other_weights_with_the_same_mean_fire_less(seed: int, size: int, ridge: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    activations = torch.randn(40, size, generator=generator, dtype=torch.float64)
    second = activations.T @ activations / 40
    mean = torch.randn(size, generator=generator, dtype=torch.float64)
    key = key_coefficients(second, mean, ridge=ridge)
    assert float(mean @ key) == pytest.approx(1, abs=1e-9)

    def cost(weights: torch.Tensor) -> float:
        return float(weights @ second @ weights + ridge * second.diagonal().mean() * weights @ weights)

    for _ in range(5):
        step = torch.randn(size, generator=generator, dtype=torch.float64)
        step -= mean * (mean @ step) / (mean @ mean)
        assert cost(key + 0.1 * step) >= cost(key) * (1 - 1e-9)


@given(values=st.lists(st.floats(-10, 10, allow_nan=False), min_size=1, max_size=30), share=st.floats(0.01, 1))
@settings(deadline=None)
def test_coverage_is_the_smallest_set_that_holds_the_share(values: list[float], share: float) -> None:
    scores = torch.tensor(values, dtype=torch.float64)
    total = float(scores.abs().sum())
    found = directions.coverage(scores, share)
    if total > 1e-6:
        assert float(scores[found].abs().sum()) >= share * total * (1 - 1e-9)
        weakest = float(scores[found].abs().min())
        assert float(scores[found].abs().sum()) - weakest < share * total * (1 + 1e-9)


def test_coverage_of_nothing_is_nothing() -> None:
    assert directions.coverage(torch.tensor([]), 0.5).tolist() == []
    assert directions.coverage(torch.tensor([1.0, 2.0]), 0.0).tolist() == []


@given(seed=st.integers(0, 1000), count=st.integers(1, 12))
@settings(max_examples=20, deadline=None)
def test_the_nearest_tokens_have_the_largest_cosines_of_all_tables(seed: int, count: int) -> None:
    tables = [projection(seed), projection(seed + 1)]
    own, usable = torch.tensor(CONCEPT), torch.arange(200) % 7 != 0
    total = torch.zeros(200)
    for table in tables:
        mean = table[usable].mean(0)
        total += torch.nn.functional.cosine_similarity(table - mean, (table[own].mean(0) - mean)[None])
    total[own] = total[~usable] = -1
    found = directions.nearest_tokens(tables, own, usable, count)
    assert len(found) == count
    torch.testing.assert_close(total[found], total.topk(count).values, atol=1e-4, rtol=0)
    assert not torch.isin(found, own).any()
    assert bool(usable[found].all())


def test_tokens_against_the_direction_are_no_neighbours() -> None:
    table = torch.tensor([[1.0, 0.0], [0.9, 0.1], [-1.0, 0.0], [-0.9, -0.1]])
    found = directions.nearest_tokens([table], torch.tensor([0]), torch.ones(4, dtype=torch.bool), 3)
    assert found.tolist() == [1]
