"""Questions are read as they stand in files, found by keyword, and taken from evaluation items without listed words."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_items import write_items

from rotate_edit.errors import BadInput
from rotate_edit.evaluation import questions
from rotate_edit.evaluation.compare import Plan
from rotate_edit.evaluation.questions import (
    FORMS,
    by_keyword,
    ember_questions,
    make_question,
    questions_of,
    read_facts,
    read_questions,
    reworded,
    without_words,
)
from rotate_edit.evaluation.tasks import open_items


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_lines_are_read_as_they_are(tmp_path):
    rows = [
        {"query": "Question: What barks?", "choices": ["a dog", "a cat"], "gold": 0, "concept": "dogs"},
        {"query": "What purrs?", "choices": ["a dog", "a cat", "a tree"], "gold": 1},
    ]
    first, second = read_questions(written(tmp_path / "own.jsonl", rows))
    assert first.prompt == "Question: What barks?\nAnswer:"
    assert (first.choices, first.answer, first.concept) == ((" a dog", " a cat"), "a dog", "dogs")
    assert (second.gold, second.concept) == (1, "")
    assert second.statement == "Question: What purrs?\nAnswer: a cat"
    plain = read_questions(tmp_path / "own.jsonl", "{query}")
    assert plain[1].prompt == "What purrs?"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"choices": "a dog"}, "list of 2 to 26"),
        ({"choices": ["a dog"]}, "list of 2 to 26"),
        ({"choices": ["a dog", " "]}, "empty"),
        ({"choices": ["a dog", 3]}, "not a text"),
        ({"gold": 2}, "place of the right choice"),
        ({"gold": True}, "place of the right choice"),
        ({"gold": "a dog"}, "place of the right choice"),
        ({"query": 3}, "query"),
    ],
)
def test_a_line_that_cannot_be_asked_is_named(tmp_path, change, why):
    row = {"query": "What barks?", "choices": ["a dog", "a cat"], "gold": 0}
    path = written(tmp_path / "own.jsonl", [row, row | change])
    with pytest.raises(BadInput, match=why):
        read_questions(path)
    if "query" not in change:
        assert len(read_questions(path, skip_unusable=True)) == 1


def test_ember_divides_the_concept_from_its_neighbours(tmp_path):
    def item(number):
        return {"q": f"Question {number}?", "correct_answer": "x", "options": ["x", "y", "z", "w"]}

    content = {"Golf": {"QA_train": [item(1)], "QA_test": [item(2)], "SimdomQA_test": [item(3)]}}
    path = tmp_path / "mc_questions.json"
    path.write_text(json.dumps(content))
    assert {one.query for one in ember_questions(path, "Golf")} == {"Question 1?", "Question 2?"}
    assert [one.query for one in ember_questions(path, "Golf", neighbours=True)] == ["Question 3?"]
    assert all(one.answer == "x" for one in ember_questions(path, "Golf"))
    with pytest.raises(BadInput, match="no questions about Uranium"):
        ember_questions(path, "Uranium")


def test_keywords_are_whole_words_and_never_the_answer():
    asked = [
        make_question("How old is the oldest dog?", ["29", "3"], 0),
        make_question("Who invented dogma?", ["Ann", "Ben"], 0),
        make_question("Which animal is a DOG?", ["a dog", "a cat"], 0),
        make_question("Do dogs chase a cat?", ["yes", "no"], 0),
    ]
    assert [one.query for one in by_keyword(asked, ["dog", "dogs"])] == [asked[0].query, asked[3].query]
    assert [one.query for one in by_keyword(asked, ["dog", "dogs"], without=["cat"])] == [asked[0].query]
    assert without_words(asked, ["dog"]) == (asked[0], asked[1], asked[3])
    assert without_words(asked, []) == tuple(asked)


@given(st.lists(st.from_regex(r"[a-z.+*()]{1,8}", fullmatch=True), min_size=1, max_size=5))
def test_words_are_found_literally(words):
    pattern = questions.word_pattern(words)
    assert all(pattern.fullmatch(word.upper()) for word in words)


def test_another_form_keeps_question_and_answers():
    asked = make_question("What barks?", ["a dog", "a cat"], 0)
    again = reworded(asked, FORMS[1])
    assert again.prompt == "What barks? The answer is"
    assert (again.choices, again.gold) == (asked.choices, asked.gold)
    assert all("{query}" in form for form in FORMS)


def test_facts_compare_whole_sentences_in_every_language(tmp_path):
    head = "Prompt\tAns\tCandidate Ans\tSubject\n"
    english = head + "Bonn lies in <mask> today.\tGermany\tFrance, Spain, Germany\tBonn\nX is <mask>.\tq\tq, r\tX\n"
    german = (
        head
        + "Bonn liegt heute in <mask>.\tDeutschland\tFrankreich, Spanien, Deutschland\tBonn\n"
        + "X ist <mask>.\tq\tq, r\tX\n"
    )
    chinese = head + "波恩位于<mask>。\t德国\t法国, 德国\t波恩\nX是<mask>。\tq\tq, r\tX\n"
    for name, text in (("en", english), ("de", german), ("zh", chinese)):
        (tmp_path / f"{name}.tsv").write_text(text, encoding="utf-8")
    (fact,) = read_facts(tmp_path, "en", ["Bonn"])
    assert fact.prompt == "Bonn lies in"
    assert sorted(fact.choices) == [" France today.", " Germany today.", " Spain today."]
    assert fact.choices[fact.gold] == " Germany today."
    (fact,) = read_facts(tmp_path, "de", ["Bonn"], choices=2)
    assert len(fact.choices) == 2
    assert fact.choices[fact.gold] == " Deutschland."
    (fact,) = read_facts(tmp_path, "zh", ["Bonn"])
    assert fact.prompt + fact.choices[fact.gold] == "波恩位于德国。"
    (tmp_path / "fr.tsv").write_text(head)
    with pytest.raises(BadInput, match="aligned"):
        read_facts(tmp_path, "fr", ["Bonn"])
    with pytest.raises(BadInput, match=r"ja\.tsv"):
        read_facts(tmp_path, "ja", ["Bonn"])


def test_items_give_questions_by_role_without_the_concepts_words(tmp_path):
    folder = write_items(tmp_path / "items")
    plan = Plan(concepts=("cat",), neighbours=("bird",))
    # Items of type A ask for words.
    assert questions_of(open_items(folder), plan, "concept") == ()
    lines = (folder / "choice-all.jsonl").read_text().replace('"type": "A"', '"type": "B"')
    (folder / "choice-all.jsonl").write_text(lines)
    items = open_items(folder)
    own = questions_of(items, plan, "concept")
    assert own
    assert all(one.answer == "cat" for one in own)
    # An answer that is a listed word says nothing about knowledge.
    assert questions_of(items, Plan(concepts=("cat",), words=("cat",)), "concept") == ()
    assert all(one.answer == "bird" for one in questions_of(items, plan, "neighbour"))
    assert not {one.answer for one in questions_of(items, plan, "general")} & {"cat", "bird"}
    assert questions_of(items, Plan(concepts=("cat",), amplified=("cat",)), "concept") == ()


def test_a_draw_is_seeded():
    asked = [make_question(f"Question {number}?", ["a", "b"], 0) for number in range(30)]
    assert questions.drawn(asked, 5, 3) == tuple(random.Random(3).sample(asked, 5))
    assert len(questions.drawn(asked, 99, 3)) == 30
