"""Answers are scored as the model's own likelihoods say, whatever is read at once, and compared as the formulas say."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_edits import silencing
from tiny_words import WORDS, tiny_model, tiny_tokenizer

from rotate_edit.edits.apply import applied
from rotate_edit.errors import BadInput
from rotate_edit.evaluation import knowledge
from rotate_edit.evaluation.knowledge import Answers, read_answers
from rotate_edit.evaluation.questions import Question

QUESTIONS = [
    Question("the dog", (" cat ran", " mat", " big dog sat"), 1),
    Question("a", (" cat", " mat the"), 0),
    Question("the dog ate a fish under", (" cat ran on", " mat"), 1),
    Question("it was big and", (" small", " then it sat", " the", " a tree"), 2),
    Question("", ("the cat", "a dog", "it was"), 0),
]


def one_by_one(model, tokenizer, question, before=""):
    """The log-likelihood of each answer, read alone."""
    found = []
    for choice in question.choices:
        start = tokenizer(before + question.prompt)["input_ids"] or [tokenizer.bos_token_id]
        ids = start + tokenizer(choice)["input_ids"]
        with torch.no_grad():
            values = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)
        found.append(sum(float(values[place - 1, ids[place]]) for place in range(len(start), len(ids))))
    return found


@pytest.mark.parametrize("before", ["", "the bird saw it and "])
def test_likelihoods_are_the_models_own(before):
    model, tokenizer = tiny_model(0), tiny_tokenizer()
    asked = QUESTIONS[:-1] if before else QUESTIONS
    answers = read_answers(model, tokenizer, asked, before=before)
    for row, question in zip(answers.totals, asked):
        expected = one_by_one(model, tokenizer, question, before)
        assert row[: len(expected)] == pytest.approx(expected, abs=1e-5)
        assert np.isneginf(row[len(expected) :]).all()
    assert answers.tokens[0, :3].tolist() == [2, 1, 3]
    assert answers.characters[0, :3].tolist() == [7, 3, 11]


def test_a_text_before_that_is_too_long_is_cut_at_its_beginning():
    model, tokenizer = tiny_model(0), tiny_tokenizer()
    words = "the dog saw a cat and it ran under the big tree then " * 8
    # The context holds 64 tokens, and the question with its longest answer takes 5 of them.
    kept = " ".join(words.split()[-(64 - 5) :]) + " "
    cut, whole = (read_answers(model, tokenizer, QUESTIONS[:1], before=text) for text in (words, kept))
    assert cut.totals == pytest.approx(whole.totals, abs=1e-5)


@pytest.mark.parametrize("family", ["gemma3-text", "qwen2", "gpt2", "bloom", "opt", "phi3"])
def test_every_kind_of_cache_gives_the_likelihoods_of_whole_rows(family):
    from tiny_models import FAMILIES

    model, tokenizer = FAMILIES[family].build(tied=True), tiny_tokenizer()
    answers = read_answers(model, tokenizer, QUESTIONS[:-1], before="a big tree ")
    for row, question in zip(answers.totals, QUESTIONS):
        expected = one_by_one(model, tokenizer, question, "a big tree ")
        assert row[: len(expected)] == pytest.approx(expected, abs=2e-4)


def test_an_edit_of_one_word_shows_where_it_is_the_answer():
    model, tokenizer = tiny_model(0), tiny_tokenizer()
    asked = [Question("the dog", (" cat", " mat"), 0), Question("the dog", (" tree", " mat"), 0)]
    base = read_answers(model, tokenizer, asked)
    with applied(model, silencing(model, "cat")):
        edited = read_answers(model, tokenizer, asked)
    drops = base.log_odds() - edited.log_odds()
    assert abs(drops[0]) > 0.1
    # A row of the output head that is no choice changes nothing among the choices.
    assert drops[1] == pytest.approx(0, abs=1e-5)


tables = st.integers(1, 6).flatmap(
    lambda n: st.lists(st.lists(st.floats(-50, 0), min_size=4, max_size=4), min_size=n, max_size=n)
)


def planted(totals, gold=0, characters=1.0):
    values = np.array(totals, dtype=float)
    return Answers(values, np.full_like(values, characters), np.ones_like(values), np.full(len(values), gold))


@given(tables, st.floats(-20, 20))
def test_log_odds_are_those_of_a_choice_among_the_answers(totals, shift):
    answers = planted(totals)
    chances = np.exp(answers.totals - answers.totals.max(axis=1, keepdims=True))
    own = chances[:, 0] / chances.sum(axis=1)
    known = (own > 1e-9) & (own < 1 - 1e-9)
    expected = np.log(own[known]) - np.log1p(-own[known])
    assert answers.log_odds()[known] == pytest.approx(expected, abs=1e-5)
    # What makes all answers likelier alike changes nothing.
    assert planted(answers.totals + shift).log_odds() == pytest.approx(answers.log_odds(), abs=1e-9)


@given(tables)
def test_right_is_a_margin_above_nothing(totals):
    answers = planted(totals)
    assert (answers.right() == (answers.totals[:, 0] > answers.totals[:, 1:].max(axis=1))).all()
    assert set(knowledge.known_places(answers, 0.5)) == set(np.flatnonzero(answers.margins() >= 0.5))


def test_a_planted_drop_is_found():
    base = planted([[0.0, -2.0, -2.0, -2.0]] * 12)
    edited = planted([[-1.5, -2.0, -2.0, -2.0]] * 6 + [[-3.0, -2.0, -2.0, -2.0]] * 6)
    drop = knowledge.log_odds_drop(base, edited)
    assert (drop.value, drop.baseline, drop.n) == (pytest.approx(2.25), 0, 12)
    assert 1.5 <= drop.low <= 2.25 <= drop.high <= 3
    kept = knowledge.accuracy_kept(base, edited)
    # Half of the answers, where a quarter is chance: (0.5 - 0.25) / (1 - 0.25).
    assert (kept.value, kept.baseline) == (pytest.approx(1 / 3), 1)
    assert base.chance == 0.25


def test_units_divide_by_their_lengths():
    answers = Answers(np.array([[-6.0, -4.0]]), np.array([[12.0, 4.0]]), np.array([[3.0, 1.0]]), np.array([0]))
    assert answers.right("character").tolist() == [1]
    assert answers.right("token").tolist() == [1]
    assert answers.right("total").tolist() == [0]
    with pytest.raises(BadInput, match="character, token, total"):
        answers.scores("word")


def test_no_question_is_an_error():
    with pytest.raises(BadInput, match="no questions"):
        read_answers(tiny_model(0), tiny_tokenizer(), [])
    with pytest.raises(BadInput, match="text of its own"):
        read_answers(tiny_model(0), tiny_tokenizer(), QUESTIONS[-1:], before="the dog ")


def test_examples_hold_their_answers():
    text = knowledge.examples_text(QUESTIONS[:2])
    assert text == "the dog mat\n\na cat\n\n"
    assert set(text.split()) <= set(WORDS)
