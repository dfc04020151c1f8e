"""Relearning: trained as stated, put back exactly, and counted against the base."""

import json
import math

import pytest
import torch
from tiny_items import write_items
from tiny_words import ids, tiny_model, tiny_tokenizer

from rotate_edit.edits.edit import Edit, MatrixChange
from rotate_edit.errors import BadInput
from rotate_edit.evaluation.compare import Plan
from rotate_edit.evaluation.relearn import Training, relearn, relearned
from rotate_edit.evaluation.statistics import regained
from rotate_edit.evaluation.tasks import open_items
from rotate_edit.evaluation.variants import Variant

PARAGRAPHS = ["the big saw the cat", "a small cat ate the cat", "the cat sat on the mat and the cat ran"]
PLAN = Plan(concepts=("cat",))


@pytest.fixture
def model():
    return tiny_model(0)


@pytest.fixture
def items(tmp_path):
    folder = write_items(tmp_path / "items")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in PARAGRAPHS)
    (folder / "relearn-cat.jsonl").write_text(lines)
    return open_items(folder)


def silenced(model):
    row = model.lm_head.weight.detach()[ids("cat")]
    left, right = -row.norm().reshape(1, 1), row / row.norm()
    return Edit("test", (MatrixChange("unembedding", None, None, ids("cat"), left, right, 2.0, "cat"),))


def test_the_first_step_is_adamws_and_the_weights_come_back(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    training = Training(paragraphs=1, epochs=1, learning_rate=1e-3, weight_decay=0.0)
    with relearned(model, tiny_tokenizer(), PARAGRAPHS[:1], training) as losses:
        moved = {name: (value - before[name]).abs().max().item() for name, value in model.state_dict().items()}
    # Adam's first step has the size of the learning rate wherever there is a gradient.
    assert max(moved.values()) == pytest.approx(1e-3, rel=1e-2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    tokens = tiny_tokenizer()(PARAGRAPHS[0])["input_ids"]
    with torch.no_grad():
        logits = torch.log_softmax(model(torch.tensor([tokens])).logits[0].double(), -1)
    expected = -sum(logits[place, token].item() for place, token in enumerate(tokens[1:])) / (len(tokens) - 1)
    assert losses[0] == pytest.approx(expected, rel=1e-5)


def test_training_is_seeded_and_learns(model):
    training = Training(epochs=12, learning_rate=3e-3)
    with relearned(model, tiny_tokenizer(), PARAGRAPHS, training) as first:
        pass
    with relearned(model, tiny_tokenizer(), PARAGRAPHS, training) as second:
        pass
    assert first == second
    assert first[-1] < 0.5 * first[0]
    with pytest.raises(ZeroDivisionError), relearned(model, tiny_tokenizer(), PARAGRAPHS, training):
        raise ZeroDivisionError
    assert not model.training


def test_what_comes_back_is_counted_against_what_was_lost(model, items):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    training = Training(epochs=10, learning_rate=1e-2)
    found = relearn(model, tiny_tokenizer(), [Variant("removed", silenced(model))], PLAN, items, training=training)
    removed = found["models"]["removed"]
    assert removed["before"]["value"] == 0
    assert removed["after"]["value"] > 0.5
    assert removed["regained"]["value"] == pytest.approx(removed["after"]["value"])
    assert removed["losses"][-1] < removed["losses"][0]
    assert found["models"]["base"]["before"]["value"] == 1
    assert found["models"]["base"]["regained"]["value"] is None
    assert found["paragraphs"] == 3
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    json.dumps(found, allow_nan=False)


def test_every_epoch_is_asked_and_probed(model, items):
    training = Training(epochs=3, learning_rate=1e-2)
    seen = []

    def probe(model):
        seen.append(model.training)
        return float(model.lm_head.weight.detach()[ids("cat")].norm())

    variant = Variant("removed", silenced(model))
    found = relearn(model, tiny_tokenizer(), [variant], PLAN, items, training=training, probe=probe)
    removed = found["models"]["removed"]
    assert len(removed["epochs"]) == 3
    assert removed["epochs"][-1] == removed["after"]
    assert len(removed["probe"]) == 4
    assert len(set(removed["probe"])) == 4
    assert seen == [False] * 8


def test_the_papers_settings_are_the_defaults():
    settings = Training()
    assert (settings.paragraphs, settings.epochs, settings.tokens) == (100, 2, 256)
    assert settings.learning_rate == 1e-5


def test_missing_items_or_paragraphs_are_named(model, items):
    with pytest.raises(BadInput, match="no multiple-choice items about ships"):
        relearn(model, tiny_tokenizer(), [], Plan(concepts=("ships",)), items)
    with pytest.raises(BadInput, match="no paragraphs"):
        relearn(model, tiny_tokenizer(), [], Plan(concepts=("mat",)), items)


def test_regained_by_hand():
    # Base 10 of 10, edited 2, after 6: half of what was lost came back.
    found = regained([1] * 10, [1] * 2 + [0] * 8, [1] * 6 + [0] * 4)
    assert found.value == pytest.approx(0.5)
    assert math.isnan(regained([1, 0], [1, 0], [1, 1]).value)
