"""Damaged and hostile files, thousands of them: one sentence each, no traceback, nothing read outside the folder."""

import copy
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import random_edit, save_tiny

from rotate_edit.edits.diff import diff
from rotate_edit.edits.edit_file import load_edit, save_edit
from rotate_edit.edits.writing.patch import revert, verify, write_checkpoint
from rotate_edit.errors import BadInput, Failure
from rotate_edit.models.checkpoint import (
    identity,
    open_checkpoint,
    read_embedding,
    read_matrix,
    read_norm,
    read_unembedding,
)

HOSTILE = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    2**64,
    10**30,
    -(2**63),
    1.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "F32",
    "BF16",
    "I64",
    "../../etc/passwd",
    "/etc/passwd.safetensors",
    "../secret.safetensors",
    "\0",
    "\ud800",
    "a" * 3000,
    "two\nlines",
    [],
    {},
    [[]],
    [0, 0],
    [2**40, 2**40],
    [-1, 5],
    {"a": {"a": {}}},
]
opened: list[str] | None = None


def watch(event: str, arguments: tuple) -> None:
    if opened is not None and event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        opened.append(os.fsdecode(arguments[0]))


sys.addaudithook(watch)


class Place:
    """A checkpoint, its edit and its patched copy on disk; files are damaged one at a time and put right again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "secret.safetensors").write_bytes(b"secret")
        self.base = save_tiny("llama", folder / "base", tied=False, dtype=torch.bfloat16)
        checkpoint = open_checkpoint(self.base)
        self.edit, self.out = folder / "edit", folder / "out"
        save_edit(random_edit(checkpoint), self.edit)
        write_checkpoint(checkpoint, load_edit(self.edit), self.out, edit_folder=self.edit)
        shard = sorted(file.name for file in self.base.glob("*.safetensors"))[1]
        self.targets: list[tuple[Path, Callable[[], object]]] = [
            (self.base / "config.json", self.use_base),
            (self.base / "model.safetensors.index.json", self.use_base),
            (self.base / shard, self.use_base),
            (self.edit / "edit.json", self.use_edit),
            (self.edit / "edit.safetensors", self.use_edit),
            (self.edit / "patch.json", self.use_patched),
            (self.edit / "undo.safetensors", self.use_undo),
            (self.out / "rotate_edit.json", self.use_undo),
            (self.out / shard, self.use_patched),
        ]

    def use_base(self) -> None:
        checkpoint = open_checkpoint(self.base)
        identity(checkpoint, full=True)
        for matrix in checkpoint.matrices:
            read_matrix(checkpoint, checkpoint.layers - 1, matrix)
        read_embedding(checkpoint)
        read_unembedding(checkpoint)
        read_norm(checkpoint, "final")
        write_checkpoint(checkpoint, load_edit(self.edit), self.folder / "new", force_base=True)

    def use_edit(self) -> None:
        edit = load_edit(self.edit)
        diff(edit, open_checkpoint(self.base))
        write_checkpoint(open_checkpoint(self.base), edit, self.folder / "new", edit_folder=None)

    def use_patched(self) -> None:
        out, edit = open_checkpoint(self.out), load_edit(self.edit)
        verify(out, edit, edit_folder=self.edit)
        verify(out, edit, open_checkpoint(self.base))

    def use_undo(self) -> None:
        revert(open_checkpoint(self.out), self.edit, self.folder / "new")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("hostile"))


def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Flip, cut, insert, truncate; mostly near the beginning, where the headers are."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        where = draw(st.integers(0, min(len(changed), 400)) | st.integers(0, len(changed)))
        how = draw(st.sampled_from(["flip", "insert", "cut", "truncate"]))
        if how == "flip" and where < len(changed):
            changed[where] ^= 1 << draw(st.integers(0, 7))
        elif how == "insert":
            changed[where:where] = draw(st.binary(min_size=1, max_size=9))
        elif how == "cut":
            del changed[where : where + draw(st.integers(1, 9))]
        else:
            del changed[where:]
    return bytes(changed)


def damaged_json(draw: st.DrawFn, content: object) -> object:
    """Put a hostile value, a renamed key or nothing at all in some places of a JSON document."""
    changed = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 2))):
        node = changed
        while isinstance(node, (dict, list)) and node:
            keys = sorted(node) if isinstance(node, dict) else range(len(node))
            key = draw(st.sampled_from(keys))
            below = node[key]  # type: ignore[index]
            if isinstance(below, (dict, list)) and below and draw(st.booleans()):
                node = below
                continue
            how = draw(st.sampled_from(["value", "value", "value", "drop", "rename", "number"]))
            if how == "drop":
                del node[key]  # type: ignore[arg-type]
            elif how == "rename" and isinstance(node, dict):
                node[draw(st.sampled_from(["../x", "x", "__metadata__", "a\0b", "a\nb", "b" * 999, "1.rows"]))] = (
                    node.pop(key)
                )
            elif how == "number":
                node[key] = draw(st.integers(-3, 2**65))  # type: ignore[index]
            else:
                node[key] = copy.deepcopy(draw(st.sampled_from(HOSTILE)))  # type: ignore[index]
            break
    return changed


@st.composite
def damaged(draw: st.DrawFn, name: str, content: bytes) -> bytes:
    """A damaged copy of a file: its bytes, its JSON, or its safetensors header."""
    if draw(st.integers(0, 3)) == 0:
        return damaged_bytes(draw, content)
    if name.endswith(".json"):
        return json.dumps(damaged_json(draw, json.loads(content))).encode()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    inner = header.get("__metadata__", {}).get("rotate_edit")
    if inner is not None and draw(st.booleans()):
        header["__metadata__"]["rotate_edit"] = json.dumps(damaged_json(draw, json.loads(inner)))
    else:
        header = damaged_json(draw, header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def try_one(place: Place, data: st.DataObject) -> None:
    """Damage one file, use it, and see that it either works or is refused in one sentence."""
    global opened
    file, use = data.draw(st.sampled_from(place.targets))
    whole = file.read_bytes()
    content = data.draw(damaged(file.name, whole))
    try:
        file.write_bytes(content)
        opened, sentence = [], None
        try:
            use()
        except (BadInput, Failure) as error:
            sentence = str(error)
        finally:
            paths, opened = opened, None
        assert sentence is None or ("\n" not in sentence and 10 < len(sentence) < 1500)
        inside = str(place.folder)
        allowed = (inside, sys.prefix, sys.base_prefix, "/dev", "/proc", "/sys")
        outside = [path for path in paths if os.path.isabs(path) and not path.startswith(allowed)]
        assert outside == []
        assert not any(path.endswith("secret.safetensors") for path in paths)
    finally:
        file.write_bytes(whole)
        shutil.rmtree(place.folder / "new", ignore_errors=True)


COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@given(data=st.data())
@settings(max_examples=1000, **COMMON)
def test_a_thousand_damaged_files(place: Place, data: st.DataObject) -> None:
    try_one(place, data)


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=10_000, **COMMON)
def test_ten_thousand_damaged_files(place: Place, data: st.DataObject) -> None:
    try_one(place, data)


def test_undamaged_files_are_used_without_complaint(place: Place) -> None:
    for _, use in place.targets:
        use()
        shutil.rmtree(place.folder / "new", ignore_errors=True)


def test_a_header_of_a_hundred_megabytes(place: Place) -> None:
    """At the limit the header is read and refused as JSON; above it, it is not read at all."""
    shard = place.targets[2][0]
    whole = shard.read_bytes()
    try:
        for size in (100_000_000, 100_000_001):
            with open(shard, "wb") as stream:
                stream.write(size.to_bytes(8, "little"))
                stream.truncate(8 + size)
            with pytest.raises(BadInput, match="safetensors"):
                open_checkpoint(place.base)
    finally:
        shard.write_bytes(whole)
