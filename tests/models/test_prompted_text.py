"""Every subject is asked about in every way; what a model wrote is read again and never another's."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_words import tiny_model, tiny_tokenizer

from rotate_edit.models.prompted_text import OPENINGS, QUESTIONS, prompted_text, prompts_about

SUBJECTS = ["dog", "cat", "tree"]


class Spelling:
    """A tokenizer that keeps its texts whole, with a chat template or without."""

    def __init__(self, chat: bool) -> None:
        self.chat_template = "turns" if chat else None

    def __call__(self, texts: Any, add_special_tokens: bool) -> dict[str, Any]:
        assert add_special_tokens is not bool(self.chat_template)
        if isinstance(texts, str):
            return {"input_ids": [texts]}
        return {"input_ids": [[text] for text in texts]}

    def apply_chat_template(self, turns: Any, **_how: Any) -> str:
        return f"<user>{turns[0]['content']}<model>"


@given(count=st.integers(1, 60), size=st.integers(1, 9), chat=st.booleans())
def test_subjects_and_ways_of_asking_come_up_in_turn(count: int, size: int, chat: bool) -> None:
    subjects = [f"subject{number}" for number in range(size)]
    prompts: list[Any] = [prompt[0] for prompt in prompts_about(Spelling(chat), subjects, count)]
    forms = [f"<user>{form}<model>" for form in QUESTIONS] if chat else list(OPENINGS)
    every = [form.format(subject=subject) for form in forms for subject in subjects]
    assert len(prompts) == count
    assert set(prompts) <= set(every)
    # No prompt comes twice before all have come once.
    assert len(set(prompts)) == min(count, len(every))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "rotate-edit"


def test_text_is_written_once_and_a_damaged_cache_is_written_again(cache: Path) -> None:
    model, tokenizer = tiny_model(0), tiny_tokenizer()
    passes: list[int] = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    prompts = [tokenizer(text)["input_ids"] for text in ("the dog", "a cat sat")]
    first = prompted_text(model, tokenizer, prompts, seed=0)
    written = len(passes)
    assert len(first) == 2
    assert prompted_text(model, tokenizer, prompts, seed=0) == first
    assert len(passes) == written
    (file,) = cache.iterdir()
    for damaged in (b"[", json.dumps(["one"]).encode(), json.dumps([1, 2]).encode(), b"\xff"):
        file.write_bytes(damaged)
        assert prompted_text(model, tokenizer, prompts, seed=0) == first
    assert prompted_text(model, tokenizer, prompts, seed=1) != first
    assert prompted_text(tiny_model(1), tokenizer, prompts, seed=0) != first
    assert len(list(cache.iterdir())) == 3
