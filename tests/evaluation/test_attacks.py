"""Attacks do what they say and put every weight back; a planted removal comes back as the formulas say."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_words import WORDS, tiny_model, tiny_tokenizer

from rotate_edit.errors import BadInput
from rotate_edit.evaluation import attacks
from rotate_edit.evaluation.attacks import (
    Relearning,
    best_layer,
    quantised,
    relearn_steps,
    residual_means,
    rounded_to_bits,
    steered,
)
from rotate_edit.evaluation.measures import perplexity
from rotate_edit.models.batches import tokenise

PARAGRAPHS = ["the big saw the cat", "a small cat ate the cat", "the cat sat on the mat and the cat ran"]


@pytest.fixture
def model():
    return tiny_model(0)


@pytest.fixture
def passages():
    return tokenise(tiny_tokenizer(), PARAGRAPHS, vocabulary_size=len(WORDS))


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model, before):
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], value) for name, value in before.items())


@pytest.mark.parametrize("rank", [None, 4])
def test_relearning_learns_in_steps_and_leaves_no_trace(model, passages, rank):
    before = state(model)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    how = Relearning(rank=rank, learning_rate=1e-2, steps=(1, 5, 30))
    first, second = (
        relearn_steps(model, tiny_tokenizer(), PARAGRAPHS, how, lambda: perplexity(model, passages).value)
        for _ in range(2)
    )
    assert list(first) == [1, 5, 30]
    assert first == second
    assert first[30] < first[5] < perplexity(model, passages).value
    assert same(model, before)
    assert not model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("rank", [None, 4])
def test_weights_come_back_after_an_error(model, rank):
    before = state(model)

    def broken():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        relearn_steps(model, tiny_tokenizer(), PARAGRAPHS, Relearning(rank=rank, steps=(2,)), broken)
    assert same(model, before)
    assert not model.training


def test_the_first_step_is_adamws(model):
    before = state(model)
    how = Relearning(learning_rate=1e-3, weight_decay=0.0, steps=(1,))

    def moved():
        return max((value - before[name]).abs().max().item() for name, value in model.state_dict().items())

    assert relearn_steps(model, tiny_tokenizer(), PARAGRAPHS, how, moved)[1] == pytest.approx(1e-3, rel=1e-2)


def test_nothing_to_relearn_from_is_an_error(model):
    with pytest.raises(BadInput, match="no paragraphs"):
        relearn_steps(model, tiny_tokenizer(), [], attacks.FULL, lambda: 0)


def test_the_mean_residual_is_the_models_own(model, passages):
    means = residual_means(model, passages, [0, 1])
    rows = []
    for text in PARAGRAPHS:
        ids = torch.tensor([tiny_tokenizer()(text)["input_ids"]])
        with torch.no_grad():
            rows.append(model(ids, output_hidden_states=True).hidden_states[1][0, 1:].double())
    assert means[0] == pytest.approx(torch.cat(rows).mean(dim=0), abs=1e-5)


def test_a_bias_that_an_edit_took_away_is_steered_back(model, passages):
    # The removal is a constant vector in the residual stream, so one vector undoes it exactly.
    before = perplexity(model, passages).value
    base = residual_means(model, passages, [0])
    removed = 3 * torch.randn(16, generator=torch.Generator().manual_seed(0))
    with steered(model, 0, -removed):
        edited = residual_means(model, passages, [0])
        vector = base[0] - edited[0]
        assert vector == pytest.approx(removed.double(), abs=1e-4)
        assert perplexity(model, passages).value != pytest.approx(before, rel=0.01)
        with steered(model, 0, vector):
            assert perplexity(model, passages).value == pytest.approx(before, rel=1e-4)
    assert perplexity(model, passages).value == before


def test_the_attacker_takes_the_layer_that_helps_most(model, passages):
    before = perplexity(model, passages).value
    removed = torch.randn(16, generator=torch.Generator().manual_seed(0))
    with steered(model, 1, -removed):
        vectors = {0: torch.zeros(16), 1: removed}
        assert best_layer(model, vectors, lambda: abs(perplexity(model, passages).value - before)) == 1


@given(st.integers(1, 20), st.integers(1, 40), st.sampled_from([2, 4, 8]), st.sampled_from([3, 16, 64]))
def test_rounding_is_to_the_nearest_of_even_steps(rows, columns, bits, group):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns))
    found = rounded_to_bits(weight, bits, group)
    for start in range(0, columns, group):
        part, rounded = weight[:, start : start + group], found[:, start : start + group]
        step = part.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
        assert ((rounded - part).abs() <= step / 2 + 1e-6).all()
        assert (rounded / step - (rounded / step).round()).abs().max() < 1e-4
    assert torch.equal(rounded_to_bits(torch.zeros(2, 5)), torch.zeros(2, 5))


def test_quantising_leaves_the_tables_and_comes_back(model):
    before = state(model)
    with quantised(model, bits=4, group=8):
        now = state(model)
        changed = {name for name, value in now.items() if not torch.equal(value, before[name])}
    assert same(model, before)
    assert changed == {name for name in before if name.endswith("proj.weight")}
    assert len(now["model.layers.0.mlp.down_proj.weight"][0, :8].unique()) <= 15
