"""Models and tokenizers that differ in anything that matters have different hashes."""

import torch
from tiny_words import tiny_model, tiny_tokenizer

from rotate_edit.models.fingerprint import model_hash, tokenizer_hash


def test_every_weight_and_the_config_count() -> None:
    model = tiny_model(0)
    known = model_hash(model)
    assert model_hash(tiny_model(0)) == known
    assert model_hash(tiny_model(1)) != known
    for parameter in model.parameters():
        with torch.no_grad():
            before = parameter.flatten()[-1].clone()
            parameter.view(-1)[-1] += 1e-3
            assert model_hash(model) != known
            parameter.view(-1)[-1] = before
    assert model_hash(model) == known
    assert model_hash(model.to(torch.bfloat16)) != known
    model = tiny_model(0)
    model.config.rms_norm_eps *= 2
    assert model_hash(model) != known


def test_what_splits_a_text_or_writes_a_chat_counts() -> None:
    known = tokenizer_hash(tiny_tokenizer())
    assert tokenizer_hash(tiny_tokenizer()) == known
    chat, special, more = tiny_tokenizer(), tiny_tokenizer(), tiny_tokenizer()
    chat.chat_template = "{{ messages }}"
    special.eos_token = "it"
    more.add_tokens(["parrot"])
    found = {tokenizer_hash(tokenizer) for tokenizer in (chat, special, more)}
    assert len(found | {known}) == 4


def test_a_tokenizer_without_a_fast_backend_is_told_by_its_vocabulary() -> None:
    class Slow:
        special_tokens_map, chat_template = {}, None

        def __init__(self, words):
            self.words = words

        def get_vocab(self):
            return {word: index for index, word in enumerate(self.words)}

    assert tokenizer_hash(Slow(["a", "b"])) == tokenizer_hash(Slow(["a", "b"]))
    assert tokenizer_hash(Slow(["a", "b"])) != tokenizer_hash(Slow(["b", "a"]))
