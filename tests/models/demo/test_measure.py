"""Scores of the demo model: exact log-probabilities, padding without influence, the floor."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rotate_edit.models.demo.corpus import documents
from rotate_edit.models.demo.measure import choices_correct, held_out_loss, token_log_probabilities
from rotate_edit.models.demo.tokens import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer((d.text for d in documents("tokens", 200)), 600, 128)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=600, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


def test_rows_of_different_length_score_as_they_do_alone(model):
    rows = [[1, 5, 9, 300], [1, 7], [1, 2, 3, 4, 5, 6, 7, 8]]
    together = token_log_probabilities(model, rows, 0)
    for row, score in zip(rows, together, strict=True):
        ids = torch.tensor([row])
        with torch.no_grad():
            alone = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        expected = alone[torch.arange(len(row) - 1), ids[0, 1:]]
        torch.testing.assert_close(score, expected, rtol=0, atol=1e-5)


def test_a_uniform_model_loses_the_logarithm_of_the_vocabulary(tokenizer, model):
    uniform = LlamaForCausalLM(model.config).eval()
    with torch.no_grad():
        uniform.lm_head.weight.zero_()
    found = held_out_loss(uniform, tokenizer, 20)
    assert found.loss == pytest.approx(math.log(600), rel=1e-5)
    assert 0 < found.floor < found.loss
    assert found.documents == 20


def test_the_option_with_the_largest_probability_is_chosen(tokenizer, model):
    items = [
        {"context": "The dog saw the", "options": [" cat", " ship", " king", " note"], "gold": g} for g in range(4)
    ]
    assert sum(choices_correct(model, tokenizer, items)) == 1
