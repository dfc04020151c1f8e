"""The bundled checkpoint: small, whole, free of paths, and it knows its world."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rotate_edit.files import data_folder
from rotate_edit.models.demo import demo_model_folder
from rotate_edit.models.demo.measure import choices_correct, held_out_loss, read_lines
from rotate_edit.models.demo.tokens import single_token_share
from rotate_edit.models.demo.world import concepts


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(demo_model_folder(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo_model_folder())


def test_the_folder_is_small_and_holds_no_path():
    names = {path.name for path in demo_model_folder().iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert sum(path.stat().st_size for path in demo_model_folder().iterdir()) <= 12_000_000
    config = json.loads((demo_model_folder() / "config.json").read_text(encoding="utf-8"))
    assert "_name_or_path" not in config
    assert config["model_type"] == "llama"


def test_sizes(model, tokenizer):
    assert 3_000_000 <= model.num_parameters() <= 6_000_000
    assert 4 <= model.config.num_hidden_layers <= 8
    assert 3_000 <= len(tokenizer) == model.config.vocab_size <= 5_000
    assert None not in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_most_concept_words_are_one_token(tokenizer):
    words = [word for concept in concepts().values() for word in concept.words]
    assert single_token_share(tokenizer, words) > 0.95


@pytest.mark.parametrize("name", ["dogs", "ships", "money"])
def test_it_knows_its_concepts(model, tokenizer, name):
    folder = data_folder("evals") / "demo"
    # Every other item: all of them give the same to within two hundredths.
    type_a = choices_correct(model, tokenizer, read_lines(folder / f"choice-A-{name}.jsonl")[::2])
    type_b = choices_correct(model, tokenizer, read_lines(folder / f"choice-B-{name}.jsonl")[::2])
    assert sum(type_a) / len(type_a) > 0.9
    assert sum(type_b) / len(type_b) > 0.6


def test_its_loss_is_near_the_floor_of_the_generator(model, tokenizer):
    found = held_out_loss(model, tokenizer, 200)
    assert found.loss < found.floor + 0.25
