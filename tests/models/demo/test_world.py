"""The world keeps its promises: enough concepts and words, facts that decide, words with two meanings."""

import re

import pytest

from rotate_edit.models.demo import templates
from rotate_edit.models.demo.world import concepts, people_facts, plural, pools, shared_words, verb_forms


def test_there_are_enough_concepts_and_words():
    assert len(concepts()) >= 24
    for concept in concepts().values():
        assert len(concept.words) >= 12, concept.name
        assert len(set(concept.members)) == len(concept.members) >= 12, concept.name
        assert all(re.fullmatch("[A-Za-z]+", word) for word in concept.words), concept.name


def test_neighbours_are_other_concepts():
    for concept in concepts().values():
        assert 2 <= len(concept.neighbours) <= 4, concept.name
        assert set(concept.neighbours) <= set(concepts()) - {concept.name}


def test_a_value_belongs_to_one_member_so_that_every_fact_decides():
    for concept in concepts().values():
        assert len(concept.relations) >= 3, concept.name
        for relation in concept.relations:
            assert len(relation.values) == len(concept.members)
            assert len(set(relation.values)) == len(relation.values), (concept.name, relation.phrase)


def test_every_person_has_a_job_a_birth_month_and_a_colour():
    assert len(people_facts()) == 3
    for relation in people_facts():
        assert len(relation.values) == len(pools()["names"])


@pytest.mark.parametrize("word", ["bark", "bat", "crane", "bank", "mint", "spring", "pitcher", "organ", "bass"])
def test_words_that_belong_to_two_concepts(word):
    assert len(shared_words()[word]) >= 2


def test_neutral_sentences_and_pools_have_no_word_of_a_concept():
    forms = {form for concept in concepts().values() for form in concept.forms}
    fixed = " ".join(re.sub(r"\{\w+\}", "", form) for form in templates.NEUTRAL)
    words = set(re.findall("[A-Za-z]+", fixed))
    used_in_neutral = "names places colours numbers days things abstract feelings adverbs relatives nature jobs"
    for pool in used_in_neutral.split():
        words |= {word for phrase in pools()[pool] for word in phrase.split()}
    assert words & forms == set()


@pytest.mark.parametrize(
    ("noun", "expected"),
    [("collie", "collies"), ("puppy", "puppies"), ("finch", "finches"), ("sheep", "sheep"), ("monkey", "monkeys")],
)
def test_plural(noun, expected):
    assert plural(noun) == expected


@pytest.mark.parametrize(
    ("verb", "third", "past", "ing"),
    [
        ("bark", "barks", "barked", "barking"),
        ("swim", "swims", "swam", "swimming"),
        ("hurry", "hurries", "hurried", "hurrying"),
        ("prowl", "prowls", "prowled", "prowling"),
        ("bake", "bakes", "baked", "baking"),
        ("trot", "trots", "trotted", "trotting"),
        ("pounce", "pounces", "pounced", "pouncing"),
        ("preach", "preaches", "preached", "preaching"),
    ],
)
def test_verb_forms(verb, third, past, ing):
    assert verb_forms(verb) == {"base": verb, "third": third, "past": past, "ing": ing}
