"""Which items are asked and what they stand for, and which texts are about a concept."""

import pytest
from readings import reading
from tiny_items import write_items

from rotate_edit.evaluation.compare import Plan
from rotate_edit.evaluation.items import divide, texts_about, whole_task
from rotate_edit.evaluation.tasks import Items, Task, open_items

PLAN = Plan(concepts=("cat",), neighbours=("mat", "tree"), new_tokens=5)


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    return open_items(write_items(tmp_path_factory.mktemp("items")))


def test_items_are_divided_by_concept_and_taken_in_turn(items):
    chosen, parts = divide(items.tasks, Plan(concepts=("CAT",), neighbours=("mat", "tree"), items=6))
    titles = {part.title: part for part in parts}
    (choice,) = [task for task in chosen if task.name == "tiny_choice"]
    assert len(titles["cat: words (type A)"].rows) == 6
    near = [choice.rows[place]["concept"] for place in titles["neighbours: words (type A)"].rows]
    assert near == ["mat", "tree"] * 3 or near == ["tree", "mat"] * 3
    assert {choice.rows[place]["concept"] for place in titles["everything else: words (type A)"].rows} == {"dog"}
    assert sum(len(part.rows) for part in parts if part.task == "tiny_choice") == len(choice.rows)
    assert divide(items.tasks, PLAN) == divide(items.tasks, PLAN)


def test_embers_similar_domain_is_the_concepts_neighbourhood():
    rows = [
        {"concept": "Golf", "type": "QA", "role": "concept"},
        {"concept": "Golf", "type": "SimdomQA", "role": "neighbour"},
        {"concept": "Uranium", "type": "QA", "role": "concept"},
    ]
    task = Task("ember", {"output_type": "multiple_choice"}, {"test": tuple(rows)})
    _, parts = divide([task], Plan(concepts=("golf",)))
    assert [(part.role, part.title) for part in parts] == [
        ("concept", "Golf: QA (ember)"),
        ("neighbour", "neighbours: SimdomQA (ember)"),
        ("general", "everything else: QA (ember)"),
    ]


def test_a_task_without_concepts_is_general_and_keeps_its_name():
    part = whole_task(reading([1.0, 0.0, 1.0], task="arc")["arc"])
    assert (part.task, part.role, part.title, part.rows, part.concept) == ("arc", "general", "arc", (0, 1, 2), "")
    task = Task("plain", {"output_type": "multiple_choice"}, {"test": ({"context": "a"}, {"context": "b"})})
    (chosen,), (whole,) = divide([task], PLAN)
    assert (whole.role, whole.title, whole.rows) == ("general", "plain", (0, 1))
    assert chosen.rows == task.rows


def test_texts_without_a_concept_hold_none_of_its_words_and_take_turns():
    rows = [
        {"text": "a cat", "concept": "Cat", "contains": ["cat"]},
        {"text": "dog one", "concept": "dog", "contains": []},
        {"text": "dog two", "concept": "dog", "contains": []},
        {"text": "a dog beside a cat", "concept": "dog", "contains": ["CAT"]},
        {"text": "nothing", "concept": None},
    ]
    items = Items("x", (), {"test": tuple(rows), "validation": ()}, (), (), {})
    own, others = texts_about(items, ["cat"])
    assert own == ["a cat"]
    assert others == ["dog one", "nothing", "dog two"]
    assert texts_about(items, ["cat", "dog"])[1] == ["nothing"]
    assert texts_about(items, ["cat"], "validation") == texts_about(items, ["cat"], "nowhere") == ([], [])
