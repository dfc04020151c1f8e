"""Text that a model wrote is read again and never another's; a damaged cache costs time and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_words import tiny_model, tiny_tokenizer

from rotate_edit.models.batches import Passages
from rotate_edit.models.self_text import self_text, write_samples


def text(model: Any, tokens: int = 640, seed: int = 0) -> Passages:
    return self_text(model, tiny_tokenizer(), tokens=tokens, seed=seed)


def same(one: Passages, other: Passages) -> bool:
    pairs = zip((*one.batches, *one.lengths, *one.order), (*other.batches, *other.lengths, *other.order), strict=True)
    return all(torch.equal(first, second) for first, second in pairs) and one.texts == other.texts


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "rotate-edit"


def test_it_is_written_once_and_read_as_it_was(cache: Path) -> None:
    model = tiny_model(0)
    passes: list[int] = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    first = text(model)
    written = len(passes)
    assert written > 0
    assert same(text(model), first)
    assert len(passes) == written
    # It is the file that is read: what stands in it is what comes back.
    (file,) = cache.iterdir()
    rows = json.loads(file.read_text())
    rows[0][1] = rows[0][1] % 20 + 1
    file.write_text(json.dumps(rows))
    assert not same(text(model), first)
    assert len(passes) == written


def test_the_model_writes_the_same_samples_again_and_leaves_torch_alone() -> None:
    model = tiny_model(0)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = write_samples(model, tiny_tokenizer(), tokens=1000, seed=3)
    assert torch.equal(torch.rand(3), expected)
    again = write_samples(model, tiny_tokenizer(), tokens=1000, seed=3)
    other = write_samples(model, tiny_tokenizer(), tokens=1000, seed=4)
    assert all(torch.equal(one, two) for one, two in zip(first.batches, again.batches, strict=True))
    assert not all(torch.equal(one, two) for one, two in zip(first.batches, other.batches, strict=True))
    # The model's context holds 64 tokens, so that is a sample's length.
    assert first.batches[0].shape[1] == 64
    assert first.tokens() == 1000 // 64 * 64
    assert bool((first.batches[0][:, 0] == 1).all())


def test_another_model_amount_or_seed_writes_its_own(cache: Path) -> None:
    model = tiny_model(0)
    first = text(model)
    assert not same(text(model, seed=1), first)
    assert text(model, tokens=1280).texts == 2 * first.texts
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    text(model)
    assert len(list(cache.iterdir())) == 4


@pytest.mark.parametrize("content", ["", "[]", "[[1, 2], []]", "[[1, 9000000]]", '[["1"]]', "[[true]]", '{"a": 1}'])
def test_a_damaged_cache_is_written_anew(cache: Path, content: str) -> None:
    model = tiny_model(0)
    first = text(model)
    (file,) = cache.iterdir()
    file.write_text(content)
    assert same(text(model), first)
    assert file.read_text() != content


def test_a_cache_that_cannot_be_written_costs_nothing_else(cache: Path) -> None:
    cache.parent.mkdir(exist_ok=True)
    cache.write_text("a file in the folder's place")
    assert text(tiny_model(0)).texts == 10
