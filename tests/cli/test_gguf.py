"""The command line takes GGUF files."""

from pathlib import Path

import pytest
import torch
from shell import Shell
from tiny_gguf import tiny_model, write_gguf
from tiny_models import random_edit

from rotate_edit.edits.edit_file import save_edit
from rotate_edit.models.checkpoint import load_model, open_checkpoint


def test_import_gguf_writes_a_checkpoint(shell: Shell) -> None:
    write_gguf(Path("model.gguf"), tiny_model("llama"), "llama")
    assert shell("import-gguf", "model.gguf", "folder", "--dtype", "float16") == 0
    assert "20 tensors" in shell.out
    assert "written to folder" in shell.out
    assert next(load_model("folder", dtype=torch.float16).parameters()).dtype == torch.float16
    assert open_checkpoint("folder").stored["model.norm.weight"].dtype == "F16"
    assert shell("import-gguf", "model.gguf", "folder") == 2
    assert "exists already" in shell.error
    assert shell("import-gguf", "model.gguf", "folder", "--overwrite") == 0
    assert open_checkpoint("folder").stored["model.norm.weight"].dtype == "BF16"


@pytest.mark.parametrize(("name", "sentence"), [("missing.gguf", "there is no file"), ("text.gguf", "no GGUF file")])
def test_what_is_no_gguf_file_is_refused(name: str, sentence: str, shell: Shell) -> None:
    Path("text.gguf").write_text("hello")
    for command in (("import-gguf", name, "folder"), ("inspect", name)):
        assert shell(*command) == 2
        assert sentence in shell.error
    assert not Path("folder").exists()


def test_a_file_stands_for_its_model_in_every_step(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path("cache").absolute()))
    file = write_gguf(Path("model.gguf"), tiny_model("llama", tied=False), "llama")
    assert shell("inspect", file) == 0
    assert "model.gguf" in shell.out
    base = open_checkpoint(file)
    save_edit(random_edit(base), Path("edit"))
    assert shell("apply", "edit", file, "--output", "edited") == 0
    assert shell("verify", "edited", "--edit", "edit", "--base", file) == 0
    assert shell("revert", "edited", "--edit", "edit", "--output", "reverted") == 0
    again, before = load_model("reverted").state_dict(), load_model(base).state_dict()
    assert all(torch.equal(values, again[name]) for name, values in before.items())
    assert shell("apply", "edit", file, "--adapter", "--output", "adapter") == 0
