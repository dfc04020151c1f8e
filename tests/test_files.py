"""Files and folders appear whole or not at all, leftovers are cleared, and no name leads out of its folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rotate_edit import files
from rotate_edit.errors import BadInput


def dead_process() -> int:
    """The number of a process that is over."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_folder_appears_only_when_its_block_ends_well(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    with pytest.raises(FileNotFoundError), files.whole_folder(output) as folder:
        (folder / "half").write_bytes((folder / "missing").read_bytes())
    assert list((tmp_path / "deep").iterdir()) == []
    with files.whole_folder(output) as folder:
        (folder / "whole").write_text("whole")
        assert not output.exists()
    assert (output / "whole").read_text() == "whole"
    assert [entry.name for entry in (tmp_path / "deep").iterdir()] == ["out"]


def test_existing_output_is_refused_and_replaced_whole(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").write_text("old")
    with pytest.raises(BadInput, match="exists already"), files.whole_folder(output):
        pass
    with pytest.raises(KeyError), files.whole_folder(output, overwrite=True):
        raise KeyError
    assert (output / "old").exists()
    with files.whole_folder(output, overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert [entry.name for entry in output.iterdir()] == ["new"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_link_a_file_and_the_own_folder_are_never_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "file").write_text("content")
    monkeypatch.chdir(tmp_path / "target")
    for name in ("link", "file", "target"):
        with pytest.raises(BadInput), files.whole_folder(tmp_path / name, overwrite=True):
            pass
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "link", "target"]


def test_leftovers_of_dead_runs_are_cleared_and_those_of_live_ones_kept(tmp_path: Path) -> None:
    dead = dead_process()
    (tmp_path / f"{files.PARTIAL_PREFIX}aa-{dead}").mkdir()
    (tmp_path / f"{files.PARTIAL_PREFIX}ab-{dead}").write_text("half")
    (tmp_path / f"{files.PARTIAL_PREFIX}ac-{os.getpid()}").mkdir()
    (tmp_path / f"{files.PARTIAL_PREFIX}ad-{dead}").symlink_to(tmp_path)
    held = tmp_path / f"{files.PARTIAL_PREFIX}ae-{dead}"
    held.mkdir()
    with files._held(held), files.whole_folder(tmp_path / "out"):
        pass
    names = {entry.name.removeprefix(files.PARTIAL_PREFIX)[:2] for entry in tmp_path.iterdir()}
    assert names == {"ac", "ad", "ae", "ou"}


def test_a_folder_moved_aside_by_a_killed_run_is_put_back(tmp_path: Path) -> None:
    dead = dead_process()
    for name in ("my-model", "other"):
        aside = tmp_path / f"{files.REPLACED_PREFIX}{name}-0f-{dead}"
        aside.mkdir()
        (aside / "content").write_text(name)
    (tmp_path / "other").mkdir()
    files.remove_leftovers(tmp_path)
    assert (tmp_path / "my-model" / "content").read_text() == "my-model"
    assert list((tmp_path / "other").iterdir()) == []
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["my-model", "other"]


def test_whole_file_is_old_or_new(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(FileNotFoundError), files.whole_file(path) as temporary:
        temporary.write_bytes((tmp_path / "missing").read_bytes())
    assert list(tmp_path.iterdir()) == []
    with files.whole_file(path) as temporary:
        temporary.write_text("one")
    with pytest.raises(BadInput), files.whole_file(path):
        pass
    files.write_atomically(path, "two")
    assert path.read_text() == "two"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the names of open files are read from /proc")
def test_everything_is_flushed_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    real_rename, real_replace, real_link = os.rename, os.replace, os.link

    def spy(descriptor: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "fsync", spy)
    monkeypatch.setattr(os, "rename", lambda a, b: (flushed.append("rename"), real_rename(a, b)))
    monkeypatch.setattr(os, "replace", lambda a, b: (flushed.append("rename"), real_replace(a, b)))
    monkeypatch.setattr(os, "link", lambda a, b: (flushed.append("rename"), real_link(a, b)))
    with files.whole_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("a")
        (folder / "sub").mkdir()
        (folder / "sub" / "b").write_text("b")
    names = [path.rsplit("/", 1)[1] for path in flushed if path != "rename"]
    assert sorted(names[:-2]) == ["a", "b", "sub"]
    assert names[-2].startswith(files.PARTIAL_PREFIX)
    assert flushed[-2:] == ["rename", str(tmp_path)]
    for write in (lambda: files.write_atomically(tmp_path / "c", "c"), lambda: write_file(tmp_path / "d")):
        flushed.clear()
        write()
        assert flushed[0].rsplit("/", 1)[1].startswith(files.PARTIAL_PREFIX)
        assert flushed[1:] == ["rename", str(tmp_path)]


def write_file(path: Path) -> None:
    with files.whole_file(path) as temporary:
        temporary.write_text("d")


def test_copy_is_byte_for_byte_and_never_over_another_file(tmp_path: Path) -> None:
    content = os.urandom(3_000_001)
    (tmp_path / "a").write_bytes(content)
    files.copy_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == content
    with pytest.raises(FileExistsError):
        files.copy_file(tmp_path / "a", tmp_path / "b")
    (tmp_path / "empty").touch()
    files.copy_file(tmp_path / "empty", tmp_path / "empty-copy")
    assert (tmp_path / "empty-copy").read_bytes() == b""


def test_copy_falls_back_when_the_kernel_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def refused(*arguments: object) -> int:
        raise OSError(errno.EXDEV, "another filesystem")

    monkeypatch.setattr(os, "copy_file_range", refused)
    content = os.urandom(100_000)
    (tmp_path / "a").write_bytes(content)
    files.copy_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == content


def test_free_space_is_asked_for_first(tmp_path: Path) -> None:
    files.check_free_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(BadInput, match="GB free"):
        files.check_free_space(tmp_path / "not" / "yet", 10**18)


@given(st.text(max_size=40))
def test_no_name_leads_out_of_its_folder(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    folder = tmp_path_factory.getbasetemp()
    try:
        path = files.file_inside(folder, name)
    except BadInput:
        return
    assert path.parent == folder.resolve()


@pytest.mark.parametrize("name", ["..", ".", "", "../x", "/etc/passwd", "a/b", "a\\b", "a\0b", "a\ud800"])
def test_names_that_are_no_plain_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInput):
        files.file_inside(tmp_path, name)


def test_links_stay_inside_or_in_the_cache_entry(tmp_path: Path) -> None:
    entry = tmp_path / "models--a--b"
    snapshot, blobs = entry / "snapshots" / "c0ffee", entry / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1234").write_text("{}")
    (tmp_path / "secret").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/1234")
    (snapshot / "evil.json").symlink_to(tmp_path / "secret")
    (snapshot / "chain.json").symlink_to("config.json")
    assert files.file_inside(snapshot, "config.json") == (blobs / "1234").resolve()
    assert files.file_inside(snapshot, "chain.json") == (blobs / "1234").resolve()
    with pytest.raises(BadInput, match="leads out"):
        files.file_inside(snapshot, "evil.json")
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "up.json").symlink_to("../models--a--b/blobs/1234")
    (plain / "loop.json").symlink_to("loop.json")
    with pytest.raises(BadInput, match="leads out"):
        files.file_inside(plain, "up.json")
    with pytest.raises(BadInput):
        files.read_json(plain, "loop.json")


@pytest.mark.parametrize(
    "text", ["", "[1]", "{", '"text"', "nul", "{" * 100_000, '{"a": 1' + "0" * 30 + "}", "\xff", '{"a": NaN}']
)
def test_json_that_is_no_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(BadInput):
        files.read_json(tmp_path, "x.json", strict=True)
    with pytest.raises(BadInput):
        files.read_json(tmp_path, "missing.json")
