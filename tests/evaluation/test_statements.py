"""Cloze items from statements: no listed word is asked for or offered, and the base knows those that are kept."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_words import tiny_model, tiny_tokenizer

from rotate_edit.evaluation.knowledge import known_places, read_answers
from rotate_edit.evaluation.statements import (
    blanks,
    cloze_questions,
    requests,
    self_made_questions,
    statements,
)

TEXT = """Dogs have lived with people for 15000 years. A dog hears sounds of 45000 hertz easily!
Dogs were first tamed in Siberia near glaciers. Dogs were later carried in ships to America.
Many dogs of Alaska pull heavy sledges through deep snow. Every whippet runs faster than most horses.
Short one. Puppies open their eyes after about 14 days. The beagle smells with 225 million receptors."""


def test_statements_are_whole_sentences():
    found = statements([TEXT, TEXT])
    assert "Dogs have lived with people for 15000 years." in found
    assert len(found) == len(set(found)) == 7
    assert not any(one.startswith(("A dog hears", "Short")) for one in found)


def test_blanks_are_content_words_names_and_numbers():
    found = {
        blank.word: blank for blank in blanks("Dogs were first tamed in Siberia by 200 people near glaciers.", ["dogs"])
    }
    assert set(found) == {"first", "tamed", "Siberia", "200", "people", "near", "glaciers"}
    assert (found["Siberia"].kind, found["200"].kind, found["glaciers"].kind) == ("name", "number", "word")
    siberia = found["Siberia"]
    assert (
        f"{siberia.before} {siberia.word}{siberia.after}"
        == "Dogs were first tamed in Siberia by 200 people near glaciers."
    )
    assert siberia.previous == "in"


def test_a_word_that_stands_there_twice_is_not_asked_for():
    assert {blank.word for blank in blanks("The small horse saw another small beagle.")} == {"horse", "beagle"}


SENTENCE_WORDS = [
    "the",
    "cat",
    "dogs",
    "Siberia",
    "Alaska",
    "14",
    "225",
    "hears",
    "sledges",
    "whippet",
    "beagle",
    "near",
]
sentences = st.lists(
    st.lists(st.sampled_from(SENTENCE_WORDS),
             min_size=6, max_size=12).map(lambda words: " ".join(words) + "."),
    min_size=1, max_size=12,
)  # fmt: skip


@given(sentences, st.integers(0, 5))
def test_every_question_is_its_statement_and_holds_no_listed_word(texts, seed):
    made = cloze_questions(texts, ["dogs", "beagle"], concept="dogs", seed=seed)
    assert made == cloze_questions(texts, ["dogs", "beagle"], concept="dogs", seed=seed)
    for question in made:
        assert question.statement in texts
        assert len(question.choices) == len({choice.casefold() for choice in question.choices}) == 4
        rest = question.statement[len(question.prompt) :]
        after = re.sub(r"^ [^\W_]+", "", rest)
        words = [choice[1 : len(choice) - len(after)] for choice in question.choices]
        assert not {"dogs", "beagle"} & {word.casefold() for word in words}
        # A wrong choice stands nowhere in the statement itself.
        wrong = [word for place, word in enumerate(words) if place != question.gold]
        inside = {word.casefold() for word in re.findall(r"\w+", question.statement)}
        assert not inside & {word.casefold() for word in wrong}


def test_right_answers_have_no_favourite_place():
    made = [question for seed in range(30) for question in cloze_questions([TEXT], ["dog", "dogs"], seed=seed)]
    places = np.bincount([question.gold for question in made], minlength=4) / len(made)
    assert places == pytest.approx([0.25] * 4, abs=0.1)


def test_the_models_own_statements_are_kept_where_it_knows_them():
    model, tokenizer = tiny_model(0), tiny_tokenizer()
    asked = []

    def write(prompts):
        asked.extend(prompts)
        return [
            "the tree under fish sat small.",
            "a bird under then tree bird big.",
            "it ran under fish then small tree.",
            "the mat under tree then fish big small.",
        ]

    found = self_made_questions(model, tokenizer, write, "cats", ["cat"], most=3)
    assert asked == requests("cats")
    assert all("cats" in prompt for prompt in asked)
    assert len(found) <= 3
    if found:
        assert len(known_places(read_answers(model, tokenizer, found))) == len(found)
    assert self_made_questions(model, tokenizer, lambda prompts: [], "cats", ["cat"]) == ()
