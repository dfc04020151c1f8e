"""Words that an edit was not told: what is left of them is their own mass over the base's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_edits import silencing
from tiny_words import WORDS, ids, tiny_model, tiny_tokenizer

from rotate_edit.edits.apply import applied
from rotate_edit.evaluation.measures import mass_by_text
from rotate_edit.evaluation.unlisted import halves, mass_left
from rotate_edit.models.batches import tokenise

TEXTS = ["the big dog saw the cat", "a small cat ate the dog", "the dog and the cat"]


@given(st.lists(st.text(min_size=1, max_size=3), min_size=2, max_size=9))
def test_each_word_is_given_once_and_held_out_once(words):
    (first, second), (third, fourth) = halves(words)
    assert sorted(first + second) == sorted(third + fourth) == sorted(words)
    assert (first, second) == (fourth, third)


def test_silencing_one_word_leaves_the_other_about_as_it_was():
    model = tiny_model(13)
    passages = tokenise(tiny_tokenizer(), TEXTS, vocabulary_size=len(WORDS))
    told, other = (mass_by_text(model, passages, ids(word)) for word in ("dog", "cat"))
    with applied(model, silencing(model, "dog").at(1.0)):
        own = mass_left(model, passages, ids("dog"), told)
        left = mass_left(model, passages, ids("cat"), other)
        expected = float(mass_by_text(model, passages, ids("cat"))[0].sum() / other[0].sum())
    assert left.value == pytest.approx(expected)
    # With this seed the word's logit is mostly positive: without it the word is less likely, and all others more.
    assert own.value < 1 < left.value
    assert (left.baseline, left.n) == (1, 3)
