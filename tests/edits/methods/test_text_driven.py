"""Baselines that read texts follow their papers' formulas on planted activations."""

from dataclasses import replace

import torch
from tiny_targets import NEURONS, SCORED, WIDTH, change_of, edited, target_of

from rotate_edit.edits.edit import Clamp
from rotate_edit.edits.methods import Target, declaration, make_method
from rotate_edit.edits.methods.text_driven import POSITIONS, concept_feature
from rotate_edit.models.hooks import LayerActivations


def test_methods_of_texts_say_so() -> None:
    for method in ("difference-of-means", "snmf-features", "clamp-neurons"):
        assert "text" in declaration(method).reads


def test_difference_of_means_takes_the_texts_direction_from_every_neuron() -> None:
    seen = target_of("difference-of-means")
    assert seen.text is not None
    own, rest = seen.text
    unit = torch.nn.functional.normalize(own.residual.mean(0) - rest.residual.mean(0), dim=0)
    after = edited("difference-of-means", seen)
    assert (after @ unit).abs().max() < 1e-6
    torch.testing.assert_close(after, seen.vectors - (seen.vectors @ unit)[:, None] * unit)
    assert declaration("difference-of-means").writes == {"out"}


def planted_text(seed: int = 0) -> tuple[LayerActivations, LayerActivations]:
    """Two groups of neurons that fire together, 0 and 3 where the concept is and 6 and 9 elsewhere."""
    generator = torch.Generator().manual_seed(seed)

    def part(pattern: torch.Tensor) -> LayerActivations:
        size = torch.rand(40, 1, generator=generator) + 0.5
        return LayerActivations(size * pattern, torch.randn(40, WIDTH, generator=generator))

    about, other = torch.zeros(NEURONS), torch.zeros(NEURONS)
    about[[0, 3]], other[[6, 9]] = torch.tensor([3.0, -2.0]), torch.tensor([1.0, 2.0])
    return part(about), part(other)


def with_text(method: str) -> Target:
    return replace(target_of(method), text=planted_text())


def test_the_concepts_feature_is_the_one_of_its_positions() -> None:
    own, rest = planted_text()
    for seed in (0, 1):
        # semi-NMF keeps 5 % of 12 neurons, that is one: the strongest of those that fire together.
        feature = concept_feature(own, rest, features=2, seed=seed)
        assert feature.nonzero()[:, 0].tolist() == [0]
        assert concept_feature(rest, own, features=2, seed=seed).nonzero()[:, 0].tolist() == [9]


def test_snmf_features_follow_embers_formula() -> None:
    seen = with_text("snmf-features")
    assert seen.text is not None
    feature = concept_feature(*seen.text, features=2, seed=0)
    # Row 0 holds all of the squared feature.
    unit = torch.nn.functional.normalize(seen.vectors.T @ feature, dim=0)
    after = edited("snmf-features", seen, 4.0, features=2)
    expected = seen.vectors.clone()
    expected[[0]] -= 4.0 * (expected[[0]] @ unit)[:, None] * unit
    torch.testing.assert_close(after, expected)
    assert declaration("snmf-features").writes == {"in", "out"}


def test_snmf_features_change_the_neurons_that_hold_95_percent_of_the_feature() -> None:
    """On 200 neurons semi-NMF keeps ten; of those the feature's squares decide."""
    generator = torch.Generator().manual_seed(3)
    pattern = torch.zeros(200)
    pattern[:10] = torch.tensor([3.0, -2.0, 2.0, 1.5, 0.05, 0.04, -0.03, 0.02, 0.02, 0.01])
    own = LayerActivations((torch.rand(40, 1, generator=generator) + 0.5) * pattern, torch.zeros(40, WIDTH))
    rest = LayerActivations((torch.rand(40, 1, generator=generator) + 0.5) * pattern.flip(0), torch.zeros(40, WIDTH))
    seen = replace(
        target_of("snmf-features"), vectors=torch.randn(200, WIDTH, generator=generator), rows=torch.arange(200),
        text=(own, rest),
    )  # fmt: skip
    made = change_of("snmf-features", seen, features=2)
    assert made.rows.tolist() == [0, 1, 2, 3]
    feature = concept_feature(own, rest, features=2, seed=0)
    cosine = torch.nn.functional.cosine_similarity(feature, pattern, dim=0)
    assert float(cosine.abs()) > 0.98
    unit = torch.nn.functional.normalize(feature @ seen.vectors, dim=0)
    torch.testing.assert_close(made.delta(), -(seen.vectors[:4] @ unit)[:, None] * unit)


def test_a_features_seed_and_number_are_settings() -> None:
    seen = target_of("snmf-features")
    deltas = [change_of("snmf-features", seen, features=3, fit_seed=seed).rows.tolist() for seed in (1, 1)]
    assert deltas[0] == deltas[1]
    assert make_method("snmf-features").settings == {"features": 50, "fit_seed": 0}


def test_at_most_so_many_positions_of_each_kind_are_factored() -> None:
    own, rest = planted_text()
    many = LayerActivations(own.neurons.repeat(POSITIONS // 40 + 1, 1), own.residual)
    flooded = LayerActivations(torch.cat([many.neurons[:POSITIONS], rest.neurons]), own.residual)
    torch.testing.assert_close(
        concept_feature(flooded, rest, features=2, seed=0),
        concept_feature(replace(many, neurons=many.neurons[:POSITIONS]), rest, features=2, seed=0),
    )


def test_clamped_neurons_write_against_the_concept() -> None:
    seen = target_of("clamp-neurons")
    assert seen.text is not None
    clamp = make_method("clamp-neurons").change(seen)
    assert isinstance(clamp, Clamp)
    assert (clamp.layer, clamp.strength) == (2, 1.0)
    assert clamp.rows.tolist() == list(SCORED)
    assert ((clamp.values[:, None] * seen.vectors[clamp.rows]) @ seen.mean_direction.read <= 0).all()
    torch.testing.assert_close(clamp.values.abs(), seen.text[0].neurons.abs().mean(0)[list(SCORED)])
    assert make_method("clamp-neurons").change(replace(seen, rows=torch.tensor([], dtype=torch.int64))) is None
