"""One concept at matched removal on a small model: the crossing is found, and sums by document are the sums by text."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from tiny_words import WORDS, ids, tiny_model, tiny_tokenizer

from rotate_edit.edits.apply import applied
from rotate_edit.edits.directions import concept_mean, mean_direction, subtract_direction
from rotate_edit.edits.edit import Edit, MatrixChange
from rotate_edit.errors import BadInput
from rotate_edit.evaluation import matched, measures

ABOUT = ["the dog ran under the dog", "a cat sat on the dog and the dog ate", "then the dog saw a dog under a tree"]
FREE = ["the bird sat on the mat", "a small fish ate and it was big", "it ran under the tree and then it sat"]
NEAR = ["the big cat sat under a cat", "a cat and a cat ran"]
TARGET = 0.5


@pytest.fixture(scope="module")
def model():
    # With this seed the direction in the MLPs carries enough of the word to halve it.
    return tiny_model(13)


@pytest.fixture(scope="module")
def proof(model) -> matched.Proof:
    tokenizer = tiny_tokenizer()

    def texts(found: list[str], first: int) -> matched.Texts:
        rows = [(first + place // 2, text) for place, text in enumerate(found)]
        return matched.texts_of(tokenizer, rows, len(WORDS), longest=16, limit=1000)

    return matched.prepare(model, ids("dog"), texts(ABOUT, 0), texts(FREE, 1), (ids("cat"), texts(NEAR, 0)), 4)


@pytest.fixture(scope="module")
def edit(model) -> Edit:
    direction = mean_direction(concept_mean(model.lm_head.weight.detach(), ids("dog")))

    def changes() -> Iterator[MatrixChange]:
        for layer, block in enumerate(model.model.layers):
            vectors = block.mlp.down_proj.weight.detach().T
            left, right = subtract_direction(vectors, direction)
            yield MatrixChange("out", layer, None, torch.arange(len(vectors)), left, right, 1.0, "dogs")

    return Edit("direction-everywhere", tuple(changes()))


def test_sums_by_document_add_up(model, proof):
    assert proof.base["mass"].shape == (4,)
    mass, positions = measures.mass_by_text(model, proof.concept.passages, proof.concept_ids)
    assert proof.base["mass"].sum() == pytest.approx(float(mass.sum()))
    assert proof.base["positions"].tolist() == [4.0, 2.0, 0.0, 0.0]
    assert proof.base["counts"].tolist() == [0.0, 14.0, 9.0, 0.0]
    assert float(positions.sum()) == 6


def test_the_crossing_leaves_the_target(model, proof, edit):
    found = matched.trace(model, proof, edit, target=TARGET)
    assert found["reached"]
    with applied(model, edit.at(found["strength"])):
        mass, _ = measures.mass_by_text(model, proof.concept.passages, proof.concept_ids)
        likelihood, predicted = measures.log_likelihood_by_text(model, proof.others.passages)
    assert float(mass.sum()) / proof.base["mass"].sum() == pytest.approx(TARGET, rel=0.1)
    assert [point["strength"] for point in found["points"]] == sorted(point["strength"] for point in found["points"])
    at = next(point for point in found["points"] if point["strength"] == found["strength"])
    assert at["damage"].sum() > 0
    rise = math.exp(float((proof.base["likelihood"].sum() - likelihood.sum()) / predicted.sum())) - 1
    assert matched.perplexity_rise(at["likelihood"], proof.base) == pytest.approx(rise, abs=1e-9)
    assert matched.kept_ratio(found["near"], proof.base["near"]) > 0


def test_the_damage_is_known_on_both_sides_of_the_crossing(model, proof, edit):
    found = matched.trace(model, proof, edit, target=TARGET)
    fractions = [point["fraction"] for point in found["points"] if "damage" in point]
    assert max(fractions) > TARGET >= min(fractions)


def test_one_step_beyond_the_target_is_measured_for_documents_that_need_more(model, proof, edit):
    found = matched.trace(model, proof, edit, target=TARGET)
    at = next(place for place, point in enumerate(found["points"]) if point["strength"] == found["strength"])
    beyond = [point for point in found["points"][at + 1 :] if "damage" in point]
    assert beyond[-1]["strength"] >= 2 * found["strength"]
    assert beyond[-1]["fraction"] < found["points"][at]["fraction"]


def test_a_target_out_of_reach_is_said_to_be(model, proof, edit):
    found = matched.trace(model, proof, edit, target=1e-30)
    assert not found["reached"]
    assert found["strength"] is None
    assert matched.trace(model, proof, Edit("channel-located", ()))["points"] == []


def test_the_model_is_as_it_was(model, proof, edit):
    before = model.model.layers[1].mlp.down_proj.weight.detach().clone()
    matched.trace(model, proof, edit, target=TARGET)
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, before)


def test_texts_without_the_concept_are_refused(model, proof):
    with pytest.raises(BadInput, match="hold none of its tokens"):
        matched.prepare(model, ids("dog"), proof.others, proof.others, None, 4)


def test_what_an_edit_changes_is_counted_once(edit):
    twice = Edit("direction-everywhere", (*edit.changes, *edit.changes))
    assert matched.describe(twice) == {"vectors": 48, "matrices": 2}


def test_nothing_to_compare_with_is_not_a_number():
    assert math.isnan(matched.kept_ratio(None, np.ones(2)))
    assert matched.kept_ratio(np.ones(2), np.full(2, 2.0)) == 0.5
