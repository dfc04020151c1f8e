"""Generation continues token by token with the likeliest, or repeatably at random."""

import pytest
import torch
from tiny_words import tiny_model, tiny_tokenizer

from rotate_edit.models.generation import first_token, generate, padding_token


@pytest.fixture(scope="module")
def model():
    return tiny_model(0)


def test_greedy_continues_token_by_token_with_the_likeliest(model):
    tokenizer = tiny_tokenizer()
    prompts = ["the dog", "a cat sat on the mat", "it"]
    written = generate(model, tokenizer, prompts, new_tokens=6)
    for prompt, texts in zip(prompts, written):
        tokens = tokenizer(prompt)["input_ids"]
        for _ in range(6):
            with torch.no_grad():
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        assert texts == [tokenizer.decode(tokens[-6:], skip_special_tokens=True)]


def test_sampling_is_seeded_and_leaves_torchs_generator_alone(model):
    tokenizer = tiny_tokenizer()
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first = generate(model, tokenizer, ["the", "a"], samples=5, seed=3)
    assert torch.equal(torch.rand(3), expected)
    assert [len(texts) for texts in first] == [5, 5]
    assert first == generate(model, tokenizer, ["the", "a"], samples=5, seed=3)
    assert first != generate(model, tokenizer, ["the", "a"], samples=5, seed=4)


def test_what_is_written_does_not_depend_on_how_many_rows_run_at_once(model):
    tokenizer = tiny_tokenizer()
    prompts = ["the dog", "a cat sat on the mat", "it", ""]
    whole = generate(model, tokenizer, prompts, new_tokens=5)
    assert generate(model, tokenizer, prompts, new_tokens=5, rows_at_once=1) == whole
    assert generate(model, tokenizer, prompts[::-1], new_tokens=5, rows_at_once=3) == whole[::-1]


def test_a_near_zero_temperature_is_greedy_and_defaults_of_the_checkpoint_do_not_count(model):
    tokenizer = tiny_tokenizer()
    greedy = generate(model, tokenizer, ["the", "a big"], new_tokens=5)
    assert generate(model, tokenizer, ["the", "a big"], new_tokens=5, seed=2, temperature=1e-4) == greedy
    other = tiny_model(0)
    other.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=3.0, num_beams=1, top_k=2)
    assert generate(other, tokenizer, ["the", "a big"], new_tokens=5) == greedy


def test_the_first_token_and_the_padding_are_what_the_tokenizer_has():
    class Tokens:
        def __init__(self, pad, end, begin):
            self.pad_token_id, self.eos_token_id, self.bos_token_id = pad, end, begin

    assert [padding_token(Tokens(*ids)) for ids in ((5, 6, 7), (None, 6, 7), (None, None, 7), (None, None, None))] == [
        5, 6, 7, 0,
    ]  # fmt: skip
    assert [first_token(Tokens(*ids)) for ids in ((5, 6, 7), (5, 6, None), (None, None, None))] == [7, 5, 0]
    assert first_token(Tokens(5, 6, 0)) == 0
