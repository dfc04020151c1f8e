"""Items made from text: by document, deterministic, and usable by the tokenizer that is asked."""

import json

import datasets
import pytest
from tiny_words import tiny_tokenizer

from rotate_edit.errors import BadInput
from rotate_edit.evaluation.tasks import open_items
from rotate_edit.evaluation.text_tasks import items_from_text, read_documents, save_items

STORIES = [
    f'It was a big and small tree number {number}. "Then the cat sat on the mat," said Ann number {number}. '
    f"On the small mat under a tree the dog ran and the dog ate {number}. A bird saw the big bird then {number}."
    for number in range(60)
]
NEUTRAL = [f"Then it was big and it was small and then it was big again, {number} times." for number in range(60)]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "stories.json"
    path.write_text(json.dumps(STORIES + NEUTRAL))
    return path


def made(source):
    return items_from_text(source, {"dogs": ["dog"]}, {"dogs": ["cat"]}, tiny_tokenizer())


def test_cloze_items_stop_before_the_word(source):
    items = made(source)
    (cloze,) = [task for task in items.tasks if task.name == "text_cloze"]
    own = [row for row in cloze.rows if row["role"] == "concept"]
    near = [row for row in cloze.rows if row["role"] == "neighbour"]
    assert {row["word"] for row in own} == {" dog"}
    assert {row["word"] for row in near} == {" cat"}
    assert all("dog" not in row["context"] for row in own)
    assert all(any(story.find(row["context"] + row["word"]) >= 0 for story in STORIES) for row in own)


def test_every_concept_is_asked_about_in_the_prompts(source):
    items = items_from_text(source, {"dogs": ["dog"], "birds": ["bird"]}, {}, tiny_tokenizer())
    asked = [row["concept"] for row in items.generation if row["concept"]]
    assert asked == ["dogs"] * 5 + ["birds"] * 5


def test_the_two_splits_share_no_document(source):
    items = made(source)
    numbers = {
        split: {int(row["text"].rstrip(".").split()[-1]) for row in rows if row["concept"]}
        for split, rows in items.texts.items()
    }
    assert numbers["validation"]
    assert numbers["test"]
    assert not numbers["validation"] & numbers["test"]
    for rows in items.texts.values():
        assert all("dog" not in row["text"] and "cat" not in row["text"] for row in rows if row["concept"] is None)


def test_the_same_text_gives_the_same_items_in_any_order(source):
    first = made(source)
    source.write_text(json.dumps((STORIES + NEUTRAL)[::-1]))
    assert made(source) == first


def test_saved_items_are_read_back(source, tmp_path):
    items = made(source)
    save_items(items, tmp_path / "items")
    back = open_items(tmp_path / "items")
    assert {task.name: task.rows for task in back.tasks} == {task.name: task.rows for task in items.tasks}
    assert back.texts == items.texts
    assert (back.prompts, back.generation) == (items.prompts, items.generation)


def test_sources_of_every_kind(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.txt").write_text("First.\n\nSecond.")
    (tmp_path / "a" / "two.jsonl").write_text('{"text": "Third."}\n{"text": "Fourth."}\n')
    assert read_documents(tmp_path / "a" / "one.txt") == ["First.", "Second."]
    assert read_documents(tmp_path / "a") == ["First.\n\nSecond.", "Third.", "Fourth."]
    (tmp_path / "lines.txt").write_text("One.\nTwo.\n")
    assert read_documents(tmp_path / "lines.txt") == ["One.", "Two."]


@pytest.mark.parametrize("name", ["missing.txt", "./nowhere", "/nowhere/at/all"])
def test_a_missing_source_is_named_without_asking_the_network(name):
    with pytest.raises(BadInput, match="no text file or folder"):
        read_documents(name)


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("owner/books", ("owner/books", None, "train")),
        ("owner/books:small", ("owner/books", "small", "train")),
        ("owner/books::test", ("owner/books", None, "test")),
        ("Salesforce/wikitext:wikitext-2-raw-v1:test", ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")),
    ],
)
def test_a_dataset_is_asked_for_by_name_configuration_and_split(name, asked, monkeypatch):
    calls = []

    def load(path, configuration, *, split, streaming):
        calls.append((path, configuration, split))
        assert streaming
        return datasets.Dataset.from_list([{"text": "one"}, {"text": "two"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_documents(name) == ["one", "two"]
    assert calls == [asked]


def test_a_text_without_the_concept_or_without_anything_else_is_refused(tmp_path):
    path = tmp_path / "t.json"
    path.write_text(json.dumps(NEUTRAL))
    with pytest.raises(BadInput, match="no passage about dogs"):
        made(path)
    path.write_text(json.dumps([f"Then the small dog ran under the tree {number}." for number in range(40)]))
    with pytest.raises(BadInput, match="neutral text"):
        made(path)
    path.write_text('{"a": 1}')
    with pytest.raises(BadInput, match="list of texts"):
        made(path)


def test_words_are_whole_and_plurals_are_asked_for(tmp_path):
    path = tmp_path / "t.json"
    texts = [f"It was small and then the hotdog and the dog-house and the dogs ran {number}." for number in range(40)]
    path.write_text(json.dumps(texts + NEUTRAL))
    with pytest.raises(BadInput, match="no passage"):
        made(path)
    items = items_from_text(path, {"dogs": ["dog"]}, {}, tiny_tokenizer(), plurals=True)
    assert {row["word"] for row in items.tasks[0].rows} == {" dogs"}


@pytest.mark.parametrize("length", [2, 3, 5])
def test_a_context_that_ends_inside_a_token_is_left_out(source, length):
    def pieces(text, add_special_tokens=True):
        return {"input_ids": [text[start : start + length] for start in range(0, len(text), length)]}

    def cloze(items):
        return [row for task in items.tasks if task.name == "text_cloze" for row in task.rows]

    every = cloze(items_from_text(source, {"dogs": ["dog"]}, {}, tiny_tokenizer()))
    found = cloze(items_from_text(source, {"dogs": ["dog"]}, {}, pieces))
    assert found == [row for row in every if len(row["context"]) % length == 0]
