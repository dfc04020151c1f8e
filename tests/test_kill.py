"""SIGKILL at random moments of an edit and of a revert: the base is untouched, the output absent or whole."""

import hashlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from places import ROOT
from tiny_models import random_edit, save_tiny

from rotate_edit.edits.edit_file import load_edit, save_edit
from rotate_edit.edits.writing.patch import revert, verify, write_checkpoint
from rotate_edit.files import PARTIAL_PREFIX
from rotate_edit.models.checkpoint import open_checkpoint

# One process imports everything once and forks a child for each job, so that kills fall into the work.
SERVER = """
import os, signal, sys, time
from pathlib import Path
from rotate_edit.models.checkpoint import open_checkpoint
from rotate_edit.edits.edit_file import load_edit
from rotate_edit.edits.writing.patch import revert, write_checkpoint
os.fsync = lambda descriptor: None  # A killed process loses nothing that the kernel has, and the disk may be slow.
print("ready", flush=True)
for line in sys.stdin:
    what, base, edit, output, seconds = line.rstrip().split("|")
    begun = time.perf_counter()
    child = os.fork()
    if child == 0:
        if what == "edit":
            write_checkpoint(open_checkpoint(base), load_edit(Path(edit)), Path(output), edit_folder=Path(edit))
        else:
            revert(open_checkpoint(base), Path(edit), Path(output))
        os._exit(0)
    if seconds != "None":
        time.sleep(float(seconds))
        os.kill(child, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), time.perf_counter() - begun, flush=True)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen]:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def contents(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def run(server: subprocess.Popen, seconds: float | None, what: str, *paths: Path) -> float:
    """Let a child work and kill it after so many seconds, or let it finish; return how long it lived."""
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write("|".join([what, *map(str, paths), str(seconds)]) + "\n")
    server.stdin.flush()
    status, lived = server.stdout.readline().split()
    assert status == "0" or (status == str(-signal.SIGKILL) and seconds is not None)
    return float(lived)


def kill_loop(server: subprocess.Popen, what: str, kills: int, tmp_path: Path) -> tuple[int, int]:
    """Kill a job again and again; return how often it had not finished and how often it had."""
    base = save_tiny("llama", tmp_path / "base", tied=False, dtype=torch.float32, shard="10KB")
    checkpoint = open_checkpoint(base)
    edit, folder = random_edit(checkpoint), tmp_path / "edit"
    save_edit(edit, folder)
    write_checkpoint(checkpoint, edit, tmp_path / "patched", edit_folder=folder)
    source, output = (base if what == "edit" else tmp_path / "patched"), tmp_path / "out"
    before, base_before = contents(source), contents(base)
    edit_before = contents(folder)
    shortest = min(run(server, None, what, source, folder, tmp_path / f"timed{n}") for n in range(3))
    draw = random.Random(5)
    unfinished = finished = 0
    for _ in range(kills):
        run(server, draw.uniform(0, shortest * 1.2), what, source, folder, output)
        assert contents(source) == before
        assert contents(base) == base_before
        assert {name: digest for name, digest in contents(folder).items() if name in edit_before} == edit_before
        if not output.exists():
            unfinished += 1
            continue
        finished += 1
        if what == "edit":
            assert verify(open_checkpoint(output), load_edit(folder), checkpoint).problems == ()
        else:
            assert contents(output) == base_before
        for file in output.iterdir():
            file.unlink()
        output.rmdir()
    # The next run clears away what the killed ones left behind.
    if what == "edit":
        write_checkpoint(checkpoint, edit, output, edit_folder=folder)
    else:
        revert(open_checkpoint(source), folder, output)
    for place in (tmp_path, folder):
        assert [entry.name for entry in place.iterdir() if entry.name.startswith(PARTIAL_PREFIX)] == []
    return unfinished, finished


@pytest.mark.parametrize("what", ["edit", "revert"])
def test_killed_ten_times(server: subprocess.Popen, what: str, tmp_path: Path) -> None:
    unfinished, finished = kill_loop(server, what, 10, tmp_path)
    assert unfinished + finished == 10


@pytest.mark.slow
@pytest.mark.parametrize("what", ["edit", "revert"])
def test_killed_a_hundred_times(server: subprocess.Popen, what: str, tmp_path: Path) -> None:
    unfinished, finished = kill_loop(server, what, 100, tmp_path)
    print(f"{what}: killed 100 times, {unfinished} before the output stood there, {finished} after")
    assert unfinished >= 10
    assert unfinished + finished == 100
