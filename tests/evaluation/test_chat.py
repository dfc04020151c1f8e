"""A conversation: each model remembers its own answers, and an edit's strength can be changed while it goes on."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tiny_folder import write_folder

from rotate_edit.edits.apply import applied
from rotate_edit.edits.edit import Edit
from rotate_edit.edits.edit_file import load_edit
from rotate_edit.errors import BadInput
from rotate_edit.evaluation.chat import Speaker, answer, scaled, with_factor
from rotate_edit.evaluation.variants import Variant
from rotate_edit.models.checkpoint import load_model, load_tokenizer
from rotate_edit.models.generation import generate


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load_model(folder / "base")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return load_tokenizer(folder / "base")


@pytest.fixture(scope="module")
def edit(folder: Path) -> Edit:
    found = load_edit(folder / "edited")
    return replace(found, changes=tuple(change.at(8.0) for change in found.changes))


def said(model: Any, tokenizer: Any, speaker: Speaker, message: str = "the big cat", **how: Any) -> str:
    return answer(model, tokenizer, speaker, message, new_tokens=12, **how).turns[-1][1]


def test_an_answer_is_what_the_model_generates_and_grows_while_it_is_written(model: Any, tokenizer: Any) -> None:
    grown: list[str] = []
    text = said(model, tokenizer, Speaker("base"), tell=grown.append)
    assert text == generate(model, tokenizer, ["the big cat"], new_tokens=12)[0][0]
    assert grown[-1] == text
    assert all(later.startswith(earlier) for earlier, later in pairwise(grown))
    drawn = [said(model, tokenizer, Speaker("base"), seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_edit_speaks_at_its_strength_and_the_base_is_untouched(model: Any, tokenizer: Any, edit: Edit) -> None:
    base, speaker = Speaker("base"), Speaker("edited", Variant("edited", edit))
    before = said(model, tokenizer, base)
    with applied(model, edit):
        wanted = generate(model, tokenizer, ["the big cat"], new_tokens=12)[0][0]
    assert said(model, tokenizer, speaker) == wanted
    (off,) = with_factor([speaker], 0)
    assert (said(model, tokenizer, off), off.title) == (before, "edited (off)")
    assert said(model, tokenizer, base) == before


def test_strengths_are_multiplied_for_all_or_for_one_concept(edit: Edit) -> None:
    speaker, concept = Speaker("edited", Variant("edited", edit)), edit.concepts[0]
    (twice,) = with_factor([speaker], 2)
    assert twice.now is not None
    assert twice.now.edit is not None
    assert [change.strength for change in twice.now.edit.changes] == [16.0] * len(edit.changes)
    base, one = with_factor([Speaker("base"), speaker], -1, concept)
    assert base == Speaker("base")
    assert one.title == f"edited ({concept} x -1)"
    assert {change.strength for change in scaled(edit, 1, one.factors).changes if change.concept == concept} == {-8.0}
    with pytest.raises(BadInput, match=f"no edit here is of weather; there are {concept}"):
        with_factor([speaker], 2, "weather")
    with pytest.raises(BadInput, match="can only be switched on and off"):
        with_factor([Speaker("adapter", Variant("adapter", adapter=Path("x")))], 2)


def test_what_was_said_before_is_read_again(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = answer(model, tokenizer, Speaker("base"), "the cat", new_tokens=4)
    second = answer(model, tokenizer, first, "the mat", new_tokens=4)
    text = f"the cat{first.turns[0][1]}\nthe mat"
    assert second.turns[-1] == ("the mat", generate(model, tokenizer, [text], new_tokens=4)[0][0])
    template = "{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }} {% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    third = answer(model, tokenizer, first, "the mat", new_tokens=4)
    text = f"u the cat a {first.turns[0][1]} u the mat "
    assert third.turns[-1][1] == generate(model, tokenizer, [text], new_tokens=4, special_tokens=False)[0][0]
    assert answer(model, tokenizer, first, "the mat", chat=False, new_tokens=4).turns[-1] == second.turns[-1]


def test_a_template_that_fails_is_said(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no') }}")
    with pytest.raises(BadInput, match=r"chat template cannot be filled in .*go without it with --plain"):
        said(model, tokenizer, Speaker("base"))


def test_an_interrupted_answer_counts_as_far_as_it_came(model: Any, tokenizer: Any) -> None:
    def stop(text: str) -> None:
        if len(text.split()) > 2:
            raise KeyboardInterrupt

    text = said(model, tokenizer, Speaker("base"), tell=stop)
    assert text.endswith(" …")
    assert len(text.split()) < 12
