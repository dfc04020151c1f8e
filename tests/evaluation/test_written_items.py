"""What a model writes about a concept and about other things becomes items in two halves that share no text."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_words import tiny_model, tiny_tokenizer

from rotate_edit.errors import BadInput
from rotate_edit.evaluation.items import texts_about
from rotate_edit.evaluation.text_tasks import items_from_documents
from rotate_edit.evaluation.written_items import written_items

DOGS = [f"the dog ran under the tree {number} and it was a big dog that ate" for number in range(12)]
OTHERS = [f"the bird sat on the mat {number} and then it ate a small fish" for number in range(24)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def items(about: dict[str, list[str]], others: list[str] = OTHERS, near: dict[str, list[str]] | None = None) -> Any:
    words = {name: ["dog"] for name in about}
    return items_from_documents(about, others, words, near or {}, tiny_tokenizer(), source="the text")


def test_the_halves_share_no_text_and_a_concept_s_texts_hold_its_words() -> None:
    found = items({"dogs": DOGS})
    halves = {split: texts_about(found, ["dogs"], split) for split in ("validation", "test")}
    for own, free in halves.values():
        assert own
        assert free
        assert all("dog" in text for text in own)
        assert not any("dog" in text for text in free)
    for one, other in zip(halves["validation"], halves["test"], strict=True):
        assert not set(one) & set(other)


def test_text_about_a_concept_that_does_not_name_it_is_not_neutral() -> None:
    unnamed = [f"the {number} big one ran under the tree and then it ate" for number in range(8)]
    found = items({"dogs": DOGS + unnamed})
    texts = {row["text"] for split in ("validation", "test") for row in found.texts[split]}
    assert not texts & set(unnamed)


def test_neighbours_are_looked_for_in_all_texts() -> None:
    free = [f"the bird sat under the tree {number} and then it ran" for number in range(12)]
    found = items({"dogs": DOGS}, [*OTHERS, *free], near={"dogs": ["fish"]})
    roles = [row["role"] for task in found.tasks if task.name == "text_cloze" for row in task.rows]
    assert "neighbour" in roles
    # A text that names a neighbour is not free of the concept's surroundings.
    assert not any("fish" in text for text in texts_about(found, ["dogs"])[1])


def test_a_model_that_does_not_name_the_concept_is_refused_with_the_way_out() -> None:
    torch.manual_seed(0)
    with pytest.raises(BadInput, match=r"^the text that the model wrote itself .*; or give your own text with eval"):
        written_items(tiny_model(0), tiny_tokenizer(), {"ships": ["schooner"]}, {}, texts=6, seed=0)
