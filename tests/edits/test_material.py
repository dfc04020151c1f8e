"""Material is computed when it is asked for, once, and is what the tables and the live model say."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tiny_material import ABOUT, FREE, group_of, material, token_set, tokenised, word_checkpoint
from tiny_words import WORDS, ids

from rotate_edit.edits import directions
from rotate_edit.edits.key_moments import even_reading, fit_keys, key_moments
from rotate_edit.edits.material import Concept, Material, joined_rows
from rotate_edit.errors import BadInput
from rotate_edit.models.checkpoint import Checkpoint, load_model, read_embedding, read_norm, read_unembedding
from rotate_edit.models.hooks import record
from rotate_edit.models.output_head import positions

DOGS = Concept((group_of(token_set("dogs", "dog", "cat")),))
# One concept in two groups, after another concept.
APART = Concept((group_of(token_set("beasts", "bird", "fish"), 0, ["bird"]),
                 group_of(token_set("beasts", "bird", "fish"), 1, ["fish"])))  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return word_checkpoint(tmp_path_factory.mktemp("words") / "model")


def test_what_was_computed_is_kept_by_its_key(checkpoint: Checkpoint) -> None:
    seen, computed = material(checkpoint, [DOGS]), []

    def compute(value: int) -> Callable[[], int]:
        return lambda: computed.append(value) or value

    assert [seen.once("a", compute(1)), seen.once("a", compute(2)), seen.once(("a", 1), compute(3))] == [1, 1, 3]
    assert computed == [1, 3]
    # None and other empty values count as computed.
    assert seen.once("none", lambda: None) is None
    assert seen.once("none", compute(4)) is None
    # Material with other settings, but the same store, shares what does not depend on them.
    assert replace(seen, settings=replace(seen.settings, ridge=9.0)).once("a", compute(5)) == 1


def test_the_model_is_loaded_when_it_is_asked_for_and_once(checkpoint: Checkpoint) -> None:
    loads = []
    seen = replace(material(checkpoint, [DOGS]), load=lambda: loads.append(1) or load_model(checkpoint))
    site = seen.last_written
    assert site is not None
    seen.direction(DOGS, DOGS.groups[0], site)
    assert seen.gain.shape == (16,)
    assert loads == []
    first = seen.self_text
    assert seen.self_text is first
    assert seen.positions is seen.positions
    assert seen.even_reading is seen.even_reading
    assert loads == [1]


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("matrix", ["out", "in"])
def test_a_direction_is_the_closed_form_of_the_matrices_own_table(
    checkpoint: Checkpoint, matrix: str, fold: bool
) -> None:
    seen = material(checkpoint, [DOGS], matrices=("in", "out"), fold_norm=fold, ridge=0.1)
    table = read_unembedding(checkpoint) if matrix == "out" else read_embedding(checkpoint)
    for site in [site for site in seen.sites if site.matrix == matrix]:
        norm = read_norm(checkpoint, "final" if matrix == "out" else ("mlp", site.layer))
        assert norm is not None
        folded = table * norm if fold else table
        mean = directions.concept_mean(folded, DOGS.ids)
        expected = directions.least_collateral_direction(mean, directions.token_covariance(folded), ridge=0.1)
        found = seen.direction(DOGS, DOGS.groups[0], site)
        torch.testing.assert_close(found.read, expected.read, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.write, expected.write, rtol=1e-3, atol=1e-5)
        unit = seen.mean_direction(DOGS, site)
        torch.testing.assert_close(unit.read, mean / mean.norm(), rtol=1e-5, atol=1e-6)
    plain = material(checkpoint, [DOGS], matrices=("in", "out"), fold_norm=fold, direction="mean")
    torch.testing.assert_close(plain.direction(DOGS, DOGS.groups[0], site).write, unit.write)


def test_the_groups_direction_is_its_own_and_the_mean_direction_the_whole_concepts(checkpoint: Checkpoint) -> None:
    seen = material(checkpoint, [DOGS, APART], direction="mean")
    site = seen.sites[0]
    gain, table = seen.gain, read_unembedding(checkpoint)
    for group, word in zip(APART.groups, ("bird", "fish"), strict=True):
        own = gain * directions.concept_mean(table, ids(word))
        torch.testing.assert_close(seen.direction(APART, group, site).read, own / own.norm())
    whole = gain * directions.concept_mean(table, ids("bird", "fish"))
    torch.testing.assert_close(seen.mean_direction(APART, site).read, whole / whole.norm())


def test_untrained_tokens_are_in_no_mean(checkpoint: Checkpoint) -> None:
    untrained = torch.zeros(len(WORDS), dtype=torch.bool)
    untrained[ids("on", "under", "mat")] = True
    seen = replace(material(checkpoint, [DOGS], direction="mean"), untrained=untrained)
    rows = read_unembedding(checkpoint) * seen.gain
    mean = rows[DOGS.ids].mean(0) - rows[~untrained].mean(0)
    torch.testing.assert_close(seen.mean_direction(DOGS, seen.sites[0]).read, mean / mean.norm())


@pytest.mark.parametrize("direction", ["mean", "least-collateral", "least-divergence"])
def test_kept_tokens_do_not_move_along_any_direction(checkpoint: Checkpoint, direction: str) -> None:
    concept = Concept(DOGS.groups, (ids("bird"), ids("tree", "mat")))
    seen = material(checkpoint, [concept], direction=direction)
    found = seen.direction(concept, concept.groups[0], seen.sites[-1])
    rows = read_unembedding(checkpoint) * seen.gain
    for kept in concept.kept:
        mean = rows[kept].mean(0) - rows.mean(0)
        assert abs(float(mean @ found.write)) < 1e-4 * float(mean.norm() * found.write.norm())
    assert float(found.read @ found.write) == pytest.approx(1, abs=1e-4)
    free = seen.direction(DOGS, DOGS.groups[0], seen.sites[-1])
    assert abs(float((rows[ids("bird")].mean(0) - rows.mean(0)) @ free.write)) > 1e-3


def test_keeping_the_concept_is_refused_by_its_name(checkpoint: Checkpoint) -> None:
    for direction in ("mean", "least-collateral"):
        concept = Concept(DOGS.groups, (DOGS.ids,))
        seen = material(checkpoint, [concept], direction=direction)
        with pytest.raises(BadInput, match=r"concepts\.dogs: .* neighbour_words"):
            seen.direction(concept, concept.groups[0], seen.sites[0])


def test_the_models_own_predictions_set_the_cost_of_the_write_side_alone(checkpoint: Checkpoint) -> None:
    costs = ("least-divergence", "least-collateral")
    by_text, by_table = (material(checkpoint, [DOGS], matrices=("in", "out"), direction=cost) for cost in costs)
    read, written = by_text.sites[0], by_text.sites[-1]
    assert (read.matrix, written.matrix) == ("in", "out")
    one, other = (seen.direction(DOGS, DOGS.groups[0], read) for seen in (by_text, by_table))
    assert torch.equal(one.write, other.write)
    metric = by_text.moments({1: torch.arange(24)}).metric
    assert metric is not None
    mean = by_text.gain * directions.concept_mean(read_unembedding(checkpoint), DOGS.ids)
    cost = by_text.gain[:, None] * metric * by_text.gain
    expected = directions.least_collateral_direction(mean, cost, ridge=by_text.settings.ridge)
    torch.testing.assert_close(by_text.direction(DOGS, DOGS.groups[0], written).write, expected.write)
    assert not torch.allclose(by_table.direction(DOGS, DOGS.groups[0], written).write, expected.write, rtol=1e-2)


def test_moments_are_read_once_for_rows_that_were_read_before(checkpoint: Checkpoint) -> None:
    seen = material(checkpoint, [DOGS, APART])
    wide = seen.moments({0: torch.tensor([1, 5, 7]), 1: torch.arange(24)})
    assert seen.moments({1: torch.tensor([3])}) is wide
    assert seen.moments({0: torch.tensor([1, 7]), 1: torch.tensor([], dtype=torch.int64)}) is wide
    other = seen.moments({0: torch.tensor([2])})
    assert other is not wide
    groups = [DOGS.ids, ids("bird"), ids("fish")]
    again = key_moments(seen.model, seen.self_text, {0: torch.tensor([1, 5, 7]), 1: torch.arange(24)}, groups)
    torch.testing.assert_close(wide.second, again.second)
    torch.testing.assert_close(wide.means, again.means)
    # Each group finds its own place in them.
    assert [seen.group_place(APART, group) for group in APART.groups] == [1, 2]
    assert seen.group_place(DOGS, DOGS.groups[0]) == 0
    (key,) = fit_keys(wide, 2, {1: torch.arange(24)}, ridge=0.03).values()
    alone = key_moments(seen.model, seen.self_text, {1: torch.arange(24)}, [ids("fish")])
    torch.testing.assert_close(key[1], fit_keys(alone, 0, {1: torch.arange(24)}, ridge=0.03)[1][1])


def test_the_last_layer_and_the_even_reading_are_those_of_its_own_text(checkpoint: Checkpoint) -> None:
    seen = material(checkpoint, [DOGS])
    assert len(seen.positions.residual) == seen.self_text.tokens() == 640
    again = positions(seen.model, seen.self_text)
    assert torch.equal(seen.positions.neurons, again.neurons)
    assert torch.equal(seen.positions.residual, again.residual)
    assert torch.equal(seen.even_reading, even_reading(seen.model, seen.self_text))


def test_activations_are_those_of_the_texts(checkpoint: Checkpoint) -> None:
    seen = material(checkpoint, [DOGS])
    found = seen.activations(DOGS)
    own, rest = (
        record(seen.model, tokenised(ABOUT), [0, 1], DOGS.ids),
        record(seen.model, tokenised(FREE), [0, 1], None),
    )
    for layer in (0, 1):
        assert torch.equal(found[layer][0].neurons, own[layer].neurons)
        assert torch.equal(found[layer][1].residual, rest[layer].residual)
    assert seen.activations(DOGS) is found
    assert set(material(checkpoint, [DOGS], layers=[1]).activations(DOGS)) == {1}


def test_texts_without_the_concept_are_refused(checkpoint: Checkpoint) -> None:
    seen = replace(material(checkpoint, [DOGS]), texts=lambda name: (tokenised(FREE), tokenised(FREE)))
    with pytest.raises(BadInput, match="none of the concept's tokens"):
        seen.activations(DOGS)


def test_the_last_written_matrix_is_the_last_that_may_be_edited(checkpoint: Checkpoint) -> None:
    def last(**wanted: object) -> tuple[int, str] | None:
        site = material(checkpoint, [DOGS], **wanted).last_written  # type: ignore[arg-type]
        return None if site is None else (site.layer, site.matrix)

    assert last(matrices=("gate", "in", "out")) == (1, "out")
    assert last(layers=[0]) == (0, "out")
    assert last(matrices=("gate", "in")) is None


def test_the_gain_is_the_final_norms_where_it_is_folded(checkpoint: Checkpoint) -> None:
    assert torch.equal(material(checkpoint, [DOGS]).gain, load_model(checkpoint).model.norm.weight.detach())
    assert torch.equal(material(checkpoint, [DOGS], fold_norm=False).gain, torch.ones(16))


def test_rows_of_several_parts_are_joined_by_layer() -> None:
    joined = joined_rows([{1: torch.tensor([4, 2]), 3: torch.tensor([0])}, {}, {1: torch.tensor([2, 9])}])
    assert {layer: rows.tolist() for layer, rows in joined.items()} == {1: [2, 4, 9], 3: [0]}
    assert joined_rows([]) == {}


def test_a_concept_is_named_by_its_groups_and_holds_all_their_tokens() -> None:
    assert APART.name == "beasts"
    assert torch.equal(APART.ids, ids("bird", "fish"))
    assert isinstance(DOGS, Concept)
    assert Material.__dataclass_params__.frozen  # type: ignore[attr-defined]
