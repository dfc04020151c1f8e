"""The fitted default: it silences words for less than its start, within its rank, and works once for all its rounds."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_material import group_of, material, token_set, word_checkpoint
from tiny_words import ids

from rotate_edit.edits.build import build_edits
from rotate_edit.edits.edit import Edit
from rotate_edit.edits.material import Concept, Material
from rotate_edit.edits.methods import Whole, make_method
from rotate_edit.edits.methods.silence_words import SEARCHED_RANKS, SEARCHED_ROUNDS, SilenceWords
from rotate_edit.edits.strength import cross
from rotate_edit.errors import BadInput
from rotate_edit.models.checkpoint import Checkpoint, read_unembedding
from rotate_edit.models.cost import ModelSize, size_of

# The last layer of a random model says little, so that no edit of it takes much more of a concept.
REMAINING = 0.7
DOGS = Concept((group_of(token_set("dogs", "dog", "cat")),), remaining=REMAINING)
SETTINGS = {"steps": 30, "rank": 4}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return word_checkpoint(tmp_path_factory.mktemp("words") / "model")


@pytest.fixture(scope="module")
def seen(checkpoint: Checkpoint) -> Material:
    return material(checkpoint, [DOGS], self_text_tokens=3200)


def made(seen: Material, concept: Concept = DOGS, **settings: Any) -> Any:
    (change,) = make_method("silence-words", SETTINGS | settings).build(seen, concept)
    return change


def divergence_and_mass(seen: Material, edit: Edit) -> tuple[float, float]:
    """On the model's own text: the mean divergence where the concept does not come next, and its mass that is left."""
    head, here = seen.output_head, seen.positions
    before = head.log_probabilities(here.residual)
    written = sum(
        here.neurons[:, change.rows] @ (change.strength * change.left @ change.right) for change in edit.changes
    )
    after = head.log_probabilities(head.moved(here, written))
    own, left = (values[:, DOGS.ids].exp().sum(1) for values in (before, after))
    divergence = ((1 - own) * (before.exp() * (before - after)).sum(1)).mean()
    return float(divergence), float((own * left).sum() / own.square().sum())


def strength_at(seen: Material, edit: Edit, remaining: float) -> float:
    """The strength that leaves so much of the concept."""
    found = cross(lambda strength: divergence_and_mass(seen, edit.at(strength))[1], remaining)
    assert found.reached
    return found.high


def test_it_does_less_damage_than_the_rank_one_edit_that_it_starts_from(seen: Material) -> None:
    edits = build_edits(seen, [make_method("silence-words", {"steps": 60}), make_method("rank-one")])
    fitted, start = (
        divergence_and_mass(seen, edit.at(strength_at(seen, edit, REMAINING)))[0]
        for edit in (edits["silence-words"], edits["rank-one"])
    )
    assert fitted < 0.9 * start


def test_the_change_is_of_the_last_matrix_and_of_the_rank_asked_for(seen: Material) -> None:
    change = made(seen)
    assert (change.matrix, change.layer, change.concept, change.strength) == ("out", 1, "dogs", 1.0)
    assert torch.equal(change.rows, torch.arange(24))
    assert int(torch.linalg.matrix_rank(change.delta())) == 4
    # A rank of 1 is the largest of its directions.
    assert torch.equal(made(seen, rank=1).right, change.right[:1])


def test_it_asks_for_no_single_matrix(seen: Material) -> None:
    method = make_method("silence-words")
    assert not method.changes_matrices_of(DOGS)
    assert method.about.last_layer_alone


def test_rounds_are_fitted_once_and_the_shorter_are_parts_of_the_longer(checkpoint: Checkpoint) -> None:
    longer, shorter = (material(checkpoint, [DOGS], self_text_tokens=640) for _ in range(2))
    three, one = made(longer, rounds=3), made(longer, rounds=1)
    assert not torch.equal(three.delta(), one.delta())
    # The same without the longer fit before it.
    assert torch.equal(made(shorter, rounds=1).delta(), one.delta())
    fits = [value for key, value in longer.kept.items() if isinstance(key, tuple) and key[0] == "low-rank fit"]
    assert [len(found) for found in fits] == [3]
    made(longer, rounds=2)
    assert len([key for key in longer.kept if isinstance(key, tuple) and key[0] == "low-rank fit"]) == 1
    assert not torch.equal(made(longer, steps=5).delta(), one.delta())


def test_what_is_kept_is_not_written_along(checkpoint: Checkpoint) -> None:
    concept = replace(DOGS, kept=(ids("bird"), ids("tree", "mat")))
    change = made(material(checkpoint, [concept], self_text_tokens=640), concept, rank=16)
    head = read_unembedding(checkpoint) * material(checkpoint, [concept]).gain
    rows = torch.stack([head[kept].mean(0) - head.mean(0) for kept in concept.kept])
    moved = change.delta() @ rows.T
    assert float(moved.abs().max()) < 1e-5 * float(change.delta().norm() * rows.norm())


@pytest.mark.parametrize("remaining", [0.85, 0.6])
def test_its_strength_means_what_it_means_for_its_start(checkpoint: Checkpoint, remaining: float) -> None:
    seen = material(checkpoint, [replace(DOGS, remaining=remaining)], self_text_tokens=640)
    edits = build_edits(seen, [make_method("silence-words", SETTINGS), make_method("rank-one")])
    strength = strength_at(seen, edits["rank-one"], remaining)
    # The price is what the start's last step towards the target costs, and the fit gets further for it.
    assert 0.1 * remaining < divergence_and_mass(seen, edits["silence-words"].at(strength))[1] < 1.1 * remaining


def test_an_amplified_concept_is_amplified_by_its_logits(seen: Material) -> None:
    loud = replace(DOGS, amplified=True)
    change = made(seen, loud)
    (logits,) = make_method("token-logits").build(seen, loud)
    assert change.matrix == logits.matrix == "unembedding"
    assert torch.equal(change.delta(), logits.delta())


def test_without_the_last_layer_it_says_what_to_do(checkpoint: Checkpoint) -> None:
    for wanted in ({"layers": [0]}, {"matrices": ("gate", "in")}):
        with pytest.raises(BadInput, match=r"locate\.layers: .* last layer, 1; .* rank-one"):
            made(material(checkpoint, [DOGS], **wanted))


def test_a_search_varies_rounds_and_rank_within_the_finest_fit() -> None:
    size = ModelSize(6, 512, 64, 1000, 10**6)
    method = make_method("silence-words", {"rank": 8})
    assert isinstance(method, SilenceWords)
    finest = method.finest(size)
    assert (finest.rank, finest.rounds) == (8 * SEARCHED_RANKS, SEARCHED_ROUNDS)
    assert finest.search_space(size) == {
        "rounds": Whole(1, SEARCHED_ROUNDS), "rank": Whole(1, 8 * SEARCHED_RANKS, log=True),
    }  # fmt: skip
    assert make_method("silence-words", {"rank": 60}).finest(size).settings["rank"] == 64
    assert make_method("silence-words", {"rounds": 5}).finest(size).settings["rounds"] == 5


def test_the_cost_grows_with_steps_rounds_and_text(checkpoint: Checkpoint) -> None:
    size = size_of(checkpoint)

    def operations(tokens: int = 1000, **settings: Any) -> float:
        return make_method("silence-words", settings).cost(size, tokens).operations

    fixed = operations(steps=1) - (operations(steps=2) - operations(steps=1))
    # So many operations a step, and as much before the first whatever their number.
    assert math.isclose(operations(steps=100) - fixed, 100 * (operations(steps=1) - fixed), rel_tol=1e-6)
    assert operations() < operations(rounds=2) < 2 * operations()
    assert operations(tokens=2000) > operations()
    assert make_method("silence-words").cost(size, 2000).memory > make_method("silence-words").cost(size, 1000).memory
