"""The command `chat`, driven like a person would: from a pipe, and in a terminal."""

import os
import pty
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny_folder import write_folder

from rotate_edit.cli.chat import chat


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("chat"))


def test_a_conversation_from_a_pipe(folder: Path) -> None:
    lines = [
        "the cat",
        "/strength 2",
        "/strength cat 0",
        "/strength nothing 1",
        "/strength x",
        "/off",
        "the mat",
        "/what",
    ]
    found = CliRunner().invoke(
        chat,
        [str(folder / "base"), str(folder / "edited"), "--new-tokens", "5"],
        input="\n".join([*lines, "/reset", "/quit"]) + "\n",
        catch_exceptions=False,
    )
    assert found.exit_code == 0
    assert "What you write is continued." in found.output
    assert "edited (x 2)" in found.output
    assert "edited (x 2, cat x 0)" in found.output
    assert "no edit here is of nothing; there are cat" in found.output
    assert "/strength takes a number, and 'x' is none" in found.output
    assert "edited (off): " in found.output
    said = [line for line in found.output.splitlines() if "base: " in line]
    assert len(said) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="a terminal of its own needs a Unix")
def test_in_a_terminal_the_models_stand_side_by_side(folder: Path) -> None:
    arguments = [sys.executable, "-m", "rotate_edit", "chat", str(folder / "base"), str(folder / "edited")]
    child, terminal = pty.fork()
    if child == 0:
        os.environ |= {"COLUMNS": "100", "LINES": "40", "TERM": "xterm"}
        os.execv(sys.executable, [*arguments, "--new-tokens", "3"])
    os.write(terminal, b"the cat\n/quit\n")
    shown = b""
    try:
        while part := os.read(terminal, 4096):
            shown += part
    except OSError:
        # The end of a terminal whose program is gone.
        pass
    _, status = os.waitpid(child, 0)
    text = shown.decode()
    assert os.waitstatus_to_exitcode(status) == 0
    assert any("base" in line and "edited" in line and "┃" in line for line in text.splitlines())
