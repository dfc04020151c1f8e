"""The command line in this process, and tiny models and edits for it."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import random_edit, save_tiny

from rotate_edit.cli import main as cli
from rotate_edit.edits.edit_file import save_edit
from rotate_edit.models.checkpoint import open_checkpoint


class Shell:
    """Calls the command line in this process and remembers what it printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.capsys, self.monkeypatch, self.out, self.error = capsys, monkeypatch, "", ""

    def __call__(self, *arguments: object) -> int:
        self.monkeypatch.setattr(sys, "argv", ["rotate-edit", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as exit:
            code = int(exit.code or 0)
        captured = self.capsys.readouterr()
        self.out, self.error = (" ".join(text.split()) for text in (captured.out, captured.err))
        assert "Traceback" not in self.error
        return code


def tiny(folder: Path, family: str = "llama", *, seed: int = 0, shard: str = "30KB") -> Path:
    """A tiny base and an edit of it beside it, in NAME-edit."""
    save_tiny(family, folder, tied=False, dtype=torch.float32, shard=shard)
    if seed:
        index = folder / "model.safetensors"
        tensors = load_file(index)
        tensors["model.norm.weight"] += seed
        save_file(tensors, index, {"format": "pt"})
    save_edit(random_edit(open_checkpoint(folder)), folder.with_name(f"{folder.name}-edit"))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file in a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
