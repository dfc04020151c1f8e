"""The edit's algebra: what each method changes, and that the closed forms are what they claim to be."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rotate_edit.edits import edit as edits
from rotate_edit.edits.edit import METHODS, Direction, Target


def projection(seed: int = 0, vocabulary: int = 200, width: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Anisotropic on purpose: an isotropic vocabulary makes both directions the same.
    scales = torch.logspace(0, 1, width)
    return torch.randn(vocabulary, width, generator=generator) * scales + 0.5


def target(seed: int = 0, located: tuple[int, ...] = (1, 4, 7)) -> Target:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(12, 16, generator=generator)
    rows = projection(seed)
    mean = edits.concept_mean(rows, torch.tensor([3, 5, 8]))
    return Target(
        layer=2,
        expert=None,
        matrix="out",
        layers=6,
        vectors=vectors,
        located=torch.tensor(located, dtype=torch.int64),
        scored=torch.tensor([0, 4]),
        channel_vectors={row: torch.randn(2, 16, generator=generator) for row in located},
        direction=edits.least_collateral_direction(mean, edits.token_covariance(rows)),
        plain=edits.plain_direction(mean),
        seed=seed,
        evidence=edits.Evidence(
            difference=torch.randn(16, generator=generator),
            activation=torch.rand(12, generator=generator),
            feature=torch.randn(12, generator=generator) * torch.tensor([3.0, 0, 0, -2.0] + 7 * [0.0] + [0.01]),
        ),
        keyed={method: (torch.tensor([0, 4, 11]), torch.randn(3, generator=generator)) for method in edits.KEYED},
        fitted=(torch.randn(12, 3, generator=generator), torch.randn(3, 16, generator=generator)),
    )


def test_a_keyed_edit_writes_the_direction_by_its_coefficients() -> None:
    seen = target()
    for method in edits.KEYED[1:]:
        made = edits.change(method, seen, strength=2.0, concept="c")
        assert made is not None
        rows, coefficients = seen.keyed[method]
        assert torch.equal(made.rows, rows)
        torch.testing.assert_close(made.delta(), -2.0 * torch.outer(coefficients, seen.direction.write))
    assert edits.change("keyed", replace(seen, keyed={}), strength=1.0, concept="c") is None


def test_a_fitted_edit_is_the_change_that_was_fitted() -> None:
    seen = target()
    assert seen.fitted is not None
    made = edits.change("fitted", seen, strength=0.5, concept="c")
    assert made is not None
    assert torch.equal(made.rows, torch.arange(12))
    torch.testing.assert_close(made.delta(), 0.5 * seen.fitted[0] @ seen.fitted[1])
    assert edits.change("fitted", replace(seen, fitted=None), strength=1.0, concept="c") is None


def applied(method: str, seen: Target, strength: float) -> torch.Tensor:
    made = edits.change(method, seen, strength=strength, concept="c")
    assert made is not None
    after = seen.vectors.clone()
    after[made.rows] += made.delta()
    return after


@pytest.mark.parametrize(
    ("method", "rows", "direction"),
    [
        ("channel-located", [1, 4, 7], "direction"),
        ("lm-head-located", [0, 4], "direction"),
        ("direction-everywhere", list(range(12)), "plain"),
        ("least-collateral-everywhere", list(range(12)), "direction"),
    ],
)
def test_strength_one_removes_the_concept_from_exactly_the_chosen_rows(
    method: str, rows: list[int], direction: str
) -> None:
    seen = target()
    read = getattr(seen, direction).read
    after = applied(method, seen, 1.0)
    assert (after[rows] @ read).abs().max() < 1e-5 * (seen.vectors @ read).abs().max()
    others = [row for row in range(12) if row not in rows]
    assert torch.equal(after[others], seen.vectors[others])


@pytest.mark.parametrize("method", sorted(METHODS))
@given(strength=st.floats(-8, 8, allow_nan=False))
@settings(max_examples=20, deadline=None)
def test_every_method_is_linear_in_its_strength(method: str, strength: float) -> None:
    seen = target()
    unit = applied(method, seen, 1.0) - seen.vectors
    torch.testing.assert_close(applied(method, seen, strength) - seen.vectors, strength * unit, atol=2e-5, rtol=1e-4)


def test_amplifying_raises_the_reading_and_suppressing_lowers_it() -> None:
    seen = target()
    before = seen.vectors[seen.located] @ seen.direction.read
    torch.testing.assert_close(applied("channel-located", seen, -2.0)[seen.located] @ seen.direction.read, 3 * before)
    torch.testing.assert_close(applied("channel-located", seen, 2.0)[seen.located] @ seen.direction.read, -before)


def test_zero_neurons_makes_located_vectors_exactly_zero() -> None:
    seen = target()
    after = applied("zero-neurons", seen, 1.0)
    assert torch.equal(after[seen.located], torch.zeros(3, 16))


def test_project_channel_leaves_vectors_orthogonal_to_their_own_channels_only() -> None:
    seen = target()
    after = applied("project-channel", seen, 1.0)
    for row in seen.located.tolist():
        assert (seen.channel_vectors[row] @ after[row]).abs().max() < 1e-5
        # The other part of the vector, outside the channels' span, is untouched.
        basis = torch.linalg.qr(seen.channel_vectors[row].T).Q
        outside = torch.eye(16) - basis @ basis.T
        torch.testing.assert_close(outside @ after[row], outside @ seen.vectors[row], atol=1e-5, rtol=1e-5)


def test_random_neurons_draws_as_many_rows_and_the_same_ones_for_a_seed() -> None:
    first = edits.change("random-neurons", target(), strength=1.0, concept="c")
    again = edits.change("random-neurons", target(), strength=1.0, concept="c")
    assert first is not None
    assert again is not None
    assert len(first.rows) == 3
    assert torch.equal(first.rows, again.rows)


def test_a_method_without_rows_changes_nothing() -> None:
    assert edits.change("channel-located", target(located=()), strength=1.0, concept="c") is None


def test_the_least_collateral_direction_beats_every_other_with_the_same_effect() -> None:
    rows = projection()
    mean, covariance = edits.concept_mean(rows, torch.tensor([3, 5, 8])), edits.token_covariance(rows)
    best = edits.least_collateral_direction(mean, covariance, ridge=1e-9)
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
    # The plain direction, scaled to the same effect, costs more on an anisotropic vocabulary.
    plain = mean / (mean @ mean)
    assert float(plain @ covariance @ plain) > 1.5 * cost


def test_kept_words_do_not_move_and_the_concept_still_does() -> None:
    rows = projection()
    mean, covariance = edits.concept_mean(rows, torch.tensor([3, 5, 8])), edits.token_covariance(rows)
    keep = torch.stack([edits.concept_mean(rows, torch.tensor(ids)) for ids in ([1], [9, 10])])
    found = edits.least_collateral_direction(mean, covariance, keep=keep)
    assert (keep @ found.write).abs().max() < 1e-4
    assert float(mean @ found.write) == pytest.approx(1.0, abs=1e-5)


def test_keeping_the_concept_itself_is_refused() -> None:
    rows = projection()
    mean, covariance = edits.concept_mean(rows, torch.tensor([3, 5, 8])), edits.token_covariance(rows)
    with pytest.raises(ValueError, match="own direction"):
        edits.least_collateral_direction(mean, covariance, keep=mean[None])


@given(seed=st.integers(0, 50))
@settings(max_examples=20, deadline=None)
def test_a_rotation_of_the_residual_stream_rotates_the_edit(seed: int) -> None:
    rows = projection(seed).double()
    vectors = torch.randn(5, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(seed + 1)).double()).Q
    ids = torch.tensor([2, 6])

    def edited(basis: torch.Tensor) -> torch.Tensor:
        turned = rows @ basis
        direction = edits.least_collateral_direction(edits.concept_mean(turned, ids), edits.token_covariance(turned))
        left, right = edits.subtract_direction(vectors @ basis, direction)
        return vectors @ basis + left @ right

    torch.testing.assert_close(edited(rotation), edited(torch.eye(16).double()) @ rotation, atol=1e-8, rtol=1e-8)


def test_edited_vectors_report_what_happened() -> None:
    seen = target()
    made = edits.change("channel-located", seen, strength=1.0, concept="c")
    assert made is not None
    (first, *_) = edits.edited_vectors(
        made, seen.vectors[made.rows], ["L2.N1", "L2.N4", "L2.N7"], [("x",)] * 3, [1.0] * 3
    )
    after = applied("channel-located", seen, 1.0)[1]
    assert first.address == "L2.N1"
    assert first.norm_before == pytest.approx(float(seen.vectors[1].norm()), rel=1e-6)
    assert first.norm_after == pytest.approx(float(after.norm()), rel=1e-6)
    cosine = torch.nn.functional.cosine_similarity(after, seen.vectors[1], dim=0)
    assert first.cosine == pytest.approx(float(cosine), rel=1e-5)


def test_scaling_and_setting_the_strength() -> None:
    made = edits.change("channel-located", target(), strength=2.0, concept="c")
    assert made is not None
    edit = edits.Edit("channel-located", (made,))
    torch.testing.assert_close(edit.scaled(0.5).changes[0].delta(), edit.with_strength(1.0).changes[0].delta())


@given(values=st.lists(st.floats(-10, 10, allow_nan=False), min_size=1, max_size=30), share=st.floats(0.01, 1))
@settings(deadline=None)
def test_coverage_is_the_smallest_set_that_holds_the_share(values: list[float], share: float) -> None:
    scores = torch.tensor(values, dtype=torch.float64)
    total = float(scores.abs().sum())
    found = edits.coverage(scores, share)
    if total > 1e-6:
        assert float(scores[found].abs().sum()) >= share * total * (1 - 1e-9)
        weakest = float(scores[found].abs().min())
        assert float(scores[found].abs().sum()) - weakest < share * total * (1 + 1e-9)


def test_direction_is_a_pair() -> None:
    unit = edits.plain_direction(torch.tensor([3.0, 4.0]))
    assert isinstance(unit, Direction)
    torch.testing.assert_close(unit.read, torch.tensor([0.6, 0.8]))
    assert torch.equal(unit.read, unit.write)


def test_difference_of_means_takes_the_texts_direction_from_every_neuron() -> None:
    seen = target()
    unit = torch.nn.functional.normalize(seen.evidence.difference, dim=0)
    after = applied("difference-of-means", seen, 1.0)
    assert (after @ unit).abs().max() < 1e-6
    torch.testing.assert_close(after, seen.vectors - (seen.vectors @ unit)[:, None] * unit)
    assert edits.change("difference-of-means", replace(seen, matrix="in"), strength=1.0, concept="c") is None


def test_snmf_features_follow_embers_formula() -> None:
    seen = target()
    feature = seen.evidence.feature
    # Rows 0 and 3 hold 95 % of the squared feature.
    unit = torch.nn.functional.normalize(seen.vectors.T @ feature, dim=0)
    after = applied("snmf-features", seen, 4.0)
    expected = seen.vectors.clone()
    expected[[0, 3]] -= 4.0 * (expected[[0, 3]] @ unit)[:, None] * unit
    torch.testing.assert_close(after, expected)
    assert edits.change("snmf-features", replace(seen, matrix="gate"), strength=1.0, concept="c") is None


@pytest.mark.parametrize("method", ["difference-of-means", "snmf-features"])
def test_methods_that_need_text_say_so(method: str) -> None:
    with pytest.raises(ValueError, match="needs text"):
        edits.change(method, replace(target(), evidence=None), strength=1.0, concept="c")


def test_clamped_neurons_write_against_the_concept() -> None:
    seen = target()
    clamp = edits.clamp_neurons(seen, strength=2.0, concept="c")
    assert clamp is not None
    assert clamp.rows.tolist() == [0, 4]
    assert ((clamp.values[:, None] * seen.vectors[clamp.rows]) @ seen.plain.read <= 0).all()
    torch.testing.assert_close(clamp.values.abs(), seen.evidence.activation[[0, 4]])


def test_layer_kernel_is_a_triangle_as_heretic_writes_it() -> None:
    # Six layers: the peak lies at layer 4 (0.8 of 5), three layers (0.6 of 5) away the weight is zero.
    weights = []
    for layer in range(6):
        seen = replace(target(), layer=layer)
        change = applied("layer-kernel", seen, 1.0) - seen.vectors
        full = applied("direction-everywhere", seen, 1.0) - seen.vectors
        weights.append(float(change.norm() / full.norm()))
    assert weights == pytest.approx([0, 0, 1 / 3, 2 / 3, 1, 2 / 3], abs=1e-6)


def test_a_kept_plain_direction_leaves_the_kept_words_alone() -> None:
    rows = projection()
    mean = edits.concept_mean(rows, torch.tensor([3, 5, 8]))
    keep = rows[[11, 12, 13]]
    found = edits.keeping(edits.plain_direction(mean), keep)
    assert (keep @ found.write).abs().max() < 1e-4 * keep.norm(dim=1).max() * found.write.norm()
    assert float(found.read @ found.write) == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="span the concept"):
        edits.keeping(edits.plain_direction(mean), torch.stack([mean, keep[0]]))
