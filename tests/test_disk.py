"""Full, read-only and forbidden disks: a clear error, nothing half-written, the base untouched."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import random_edit, save_tiny

from rotate_edit.edits.edit import Edit
from rotate_edit.edits.edit_file import save_edit
from rotate_edit.edits.writing.adapter import write_adapter
from rotate_edit.edits.writing.patch import revert, write_checkpoint
from rotate_edit.errors import BadInput, Failure
from rotate_edit.models.checkpoint import Checkpoint, open_checkpoint

SMALL_DISK = 300 * 1024


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(save_tiny("llama", tmp_path / "base", tied=False, dtype=torch.float32))


@pytest.fixture
def edit(base: Checkpoint, tmp_path: Path) -> Edit:
    edit = random_edit(base)
    save_edit(edit, tmp_path / "edit")
    return edit


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "tmpfs", str(disk)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small disk can be mounted by root alone")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_no_room_is_seen_before_anything_is_written(base: Checkpoint, edit: Edit, small_disk: Path) -> None:
    with pytest.raises(BadInput, match="GB free"):
        write_checkpoint(base, edit, small_disk / "out")
    assert list(small_disk.iterdir()) == []


def plenty(patch: pytest.MonkeyPatch) -> None:
    """Say that every disk has room, as one does that only fills up later."""
    known = shutil.disk_usage("/")
    patch.setattr(shutil, "disk_usage", lambda path: known._replace(free=1 << 40))


def test_a_disk_that_fills_up_on_the_way(
    base: Checkpoint, edit: Edit, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(base, edit, tmp_path / "out", edit_folder=tmp_path / "edit")
    (small_disk / "ballast").write_bytes(b"0" * (SMALL_DISK - 60_000))
    before = {file.name: file.read_bytes() for file in base.folder.iterdir()}
    with monkeypatch.context() as patch:
        plenty(patch)
        with pytest.raises(Failure, match="No space left"):
            write_checkpoint(base, edit, small_disk / "out")
        with pytest.raises(Failure, match="No space left"):
            revert(open_checkpoint(tmp_path / "out"), tmp_path / "edit", small_disk / "back")
    (small_disk / "more").write_bytes(b"0" * 50_000)
    with pytest.raises(BadInput, match="GB free"):
        write_adapter(base, edit, small_disk / "adapter")
    plenty(monkeypatch)
    with pytest.raises(Failure, match="No space left"):
        write_adapter(base, edit, small_disk / "adapter")
    with pytest.raises(Failure, match="No space left"):
        save_edit(replace(edit, settings={"long": "x" * 40_000}), small_disk / "edit")
    assert sorted(entry.name for entry in small_disk.iterdir()) == ["ballast", "more"]
    assert {file.name: file.read_bytes() for file in base.folder.iterdir()} == before


def test_an_undo_file_that_does_not_fit_leaves_no_output(
    base: Checkpoint, edit: Edit, small_disk: Path, tmp_path: Path
) -> None:
    save_edit(edit, small_disk / "edit")
    free = shutil.disk_usage(small_disk).free
    (small_disk / "ballast").write_bytes(b"0" * (free - 4096))
    with pytest.raises(Failure, match="No space left"):
        write_checkpoint(base, edit, tmp_path / "out", edit_folder=small_disk / "edit")
    assert not (tmp_path / "out").exists()
    assert sorted(entry.name for entry in (small_disk / "edit").iterdir()) == ["edit.json", "edit.safetensors"]


def test_a_read_only_disk(base: Checkpoint, edit: Edit, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for write in (
        lambda: write_checkpoint(base, edit, small_disk / "out"),
        lambda: write_adapter(base, edit, small_disk / "adapter"),
        lambda: save_edit(edit, small_disk / "edit"),
    ):
        with pytest.raises(BadInput, match=r"cannot be written|GB free"):
            write()
    assert list(small_disk.iterdir()) == []


NOBODY = 65534


@contextmanager
def without_power() -> Iterator[None]:
    """Be a user who owns nothing for a while, since root may write everywhere."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(before)


def test_no_permission(base: Checkpoint, edit: Edit, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    ours = [path for path in tmp_path.parents if path.name.startswith(("pytest-", "popen-"))]
    for path in (tmp_path, *ours, *base.folder.iterdir()):
        path.chmod(path.stat().st_mode | 0o055)
    with without_power():
        for write in (
            lambda: write_checkpoint(base, edit, closed / "out"),
            lambda: write_adapter(base, edit, closed / "adapter"),
            lambda: save_edit(edit, closed / "edit"),
        ):
            with pytest.raises(BadInput, match="cannot be written"):
                write()
    assert list(closed.iterdir()) == []


def test_a_file_where_the_folder_should_be(base: Checkpoint, edit: Edit, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    with pytest.raises(BadInput, match="cannot be written"):
        write_checkpoint(base, edit, tmp_path / "file" / "out")
    assert (tmp_path / "file").read_text() == "content"
