"""Losses are the model's own, divided between listed words and the rest, and their rise is a mean over tokens."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_edits import silencing
from tiny_words import WORDS, tiny_model, tiny_tokenizer

from rotate_edit.edits.apply import applied
from rotate_edit.errors import BadInput
from rotate_edit.evaluation import statistics
from rotate_edit.evaluation.comprehension import Losses, mark_words, read_losses, rise, selectivity

TEXTS = ["the cat sat on the mat", "a dog", "it was a big cat and the cat ran", "fish"]


def marked(words=("cat",), **options):
    return mark_words(tiny_tokenizer(), TEXTS, words, vocabulary_size=len(WORDS), **options)


def test_losses_are_the_models_own_and_divided_by_word():
    model, tokenizer = tiny_model(0), tiny_tokenizer()
    losses = read_losses(model, marked())
    # The last text has one token, and nothing is predicted in it.
    for place, text in enumerate(TEXTS[:3]):
        ids = tokenizer(text)["input_ids"]
        with torch.no_grad():
            values = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)
        by_token = {"cat": [], "rest": []}
        for index, token in enumerate(ids[1:]):
            by_token["cat" if WORDS[token] == "cat" else "rest"].append(-float(values[index, token]))
        assert losses.listed[place] == pytest.approx(sum(by_token["cat"]), abs=1e-5)
        assert losses.rest[place] == pytest.approx(sum(by_token["rest"]), abs=1e-5)
        assert losses.listed_tokens[place] == len(by_token["cat"])
        assert losses.rest_tokens[place] == len(by_token["rest"])


def test_words_are_marked_whole_and_in_any_case():
    texts = mark_words(tiny_tokenizer(), ["the Cat cat catfish big"], ["cat"], vocabulary_size=len(WORDS))
    assert texts.listed[0].tolist() == [[False, True, True, False, False]]
    none = marked(())
    assert not any(bool(batch.any()) for batch in none.listed)


def test_limits_hold():
    assert marked(longest=3).passages.tokens() == 3 + 2 + 3
    assert marked(token_limit=4).passages.texts == 1
    for texts in ([], ["fish"]):
        with pytest.raises(BadInput, match="no text"):
            mark_words(tiny_tokenizer(), texts, ["cat"], vocabulary_size=len(WORDS))


def test_silencing_a_word_raises_its_loss_and_little_else():
    model = tiny_model(0)
    texts = marked()
    base = read_losses(model, texts)
    with applied(model, silencing(model, "cat")):
        edited = read_losses(model, texts)
    at_words, elsewhere = rise(base, edited, listed=True), rise(base, edited)
    assert abs(at_words.value) > 10 * abs(elsewhere.value)


numbers = st.lists(st.tuples(st.floats(0, 50), st.floats(-5, 5), st.integers(1, 30)), min_size=2, max_size=12)


@given(numbers)
def test_the_rise_is_a_mean_over_tokens(rows):
    sums, changes, counts = (np.array(column, dtype=float) for column in zip(*rows))
    zeros = np.zeros(len(rows))
    base, edited = Losses(zeros, zeros, sums, counts), Losses(zeros, zeros, sums + changes, counts)
    found = statistics.measure(rise(base, edited))
    assert found.value == pytest.approx(changes.sum() / counts.sum(), abs=1e-9)
    assert found.low - 1e-9 <= found.high + 1e-9
    assert np.isnan(rise(base, edited, listed=True).value)


def test_selectivity_is_the_difference():
    generator = np.random.default_rng(0)
    counts, zeros = np.full(200, 10.0), np.zeros(200)
    base = Losses(zeros, zeros, zeros, counts)
    own = rise(base, Losses(zeros, zeros, 10 * generator.normal(0.5, 0.1, 200), counts), seed=0)
    other = rise(base, Losses(zeros, zeros, 10 * generator.normal(0.1, 0.1, 200), counts), seed=1)
    found = selectivity(own, other)
    assert found.value == pytest.approx(0.4, abs=0.03)
    # The two standard errors add as squares.
    assert found.standard_error == pytest.approx(0.1 * np.sqrt(2 / 200), rel=0.15)
    assert found.low < 0.4 < found.high
    assert (found.baseline, found.n) == (0, 400)
