"""Training: the same settings give the same weights, and the loss falls."""

import logging
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rotate_edit.models.demo.corpus import documents
from rotate_edit.models.demo.tokens import train_tokenizer
from rotate_edit.models.demo.train import Settings, build_model, parameter_groups, token_windows, train

TEXTS = [found.text for found in documents("texts", 100)]
SMALL = replace(
    Settings(),
    documents=300,
    tokenizer_documents=100,
    vocabulary_size=600,
    hidden_size=32,
    intermediate_size=64,
    layers=2,
    heads=2,
    warm_up_steps=2,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train(SMALL, folder)
    return folder


def test_the_same_settings_give_the_same_weights(trained, tmp_path):
    train(SMALL, tmp_path)
    first, second = (load_file(folder / "model.safetensors") for folder in (trained, tmp_path))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_checkpoint_is_bfloat16_tied_and_opens(trained):
    tensors = load_file(trained / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in tensors
    model = AutoModelForCausalLM.from_pretrained(trained)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert len(tokenizer) == model.config.vocab_size == 600


def test_the_loss_falls(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        train(replace(SMALL, documents=600), tmp_path, save_every=5)
    losses = [record.args[2] for record in caplog.records if str(record.msg).startswith("step")]
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    windows = token_windows(replace(SMALL, documents=50), AutoTokenizer.from_pretrained(tmp_path))
    with torch.no_grad():
        after = float(model(input_ids=windows, labels=windows).loss)
    assert after < losses[0] - 0.3


def test_windows_hold_every_token_of_the_corpus_once():
    tokenizer = train_tokenizer(TEXTS, 400, 128)
    windows = token_windows(replace(SMALL, documents=20), tokenizer)
    assert windows.shape[1] == SMALL.context_length
    assert 18 <= int((windows == tokenizer.bos_token_id).sum()) <= 20
    # Fewer tokens than one window are cut off at the end.
    other = token_windows(replace(SMALL, documents=20, seed=1), tokenizer)
    assert torch.equal(windows.flatten().sort().values, other.flatten().sort().values)


def test_only_matrices_decay():
    tokenizer = train_tokenizer(TEXTS, 400, 128)
    model = build_model(SMALL, tokenizer)
    decayed, free = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    counted = sum(parameter.numel() for group in (decayed, free) for parameter in group["params"])
    assert counted == model.num_parameters()
    assert all(parameter.ndim == 2 for parameter in decayed["params"])
    assert any(parameter is model.get_input_embeddings().weight for parameter in free["params"])
