"""Every command that reads or writes model files, through the command line on tiny checkpoints."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import random_edit, save_tiny

from rotate_edit import machine as estimate
from rotate_edit import repeat
from rotate_edit.cli import main as cli
from rotate_edit.edits.edit_file import save_edit
from rotate_edit.models.checkpoint import open_checkpoint
from rotate_edit.reporting.reproduce import Difference


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


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Shell:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return Shell(capsys, monkeypatch)


def tiny(folder: Path, family: str = "llama", *, seed: int = 0, shard: str = "30KB") -> Path:
    """A tiny base and an edit of it beside it, in NAME-edit."""
    save_tiny(family, folder, tied=False, dtype=torch.float32, shard=shard)
    if seed:
        index = folder / "model.safetensors"
        tensors = load_file(index)
        tensors["model.norm.weight"] += seed
        from safetensors.torch import save_file

        save_file(tensors, index, {"format": "pt"})
    save_edit(random_edit(open_checkpoint(folder)), folder.with_name(f"{folder.name}-edit"))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_apply_verify_revert(shell: Shell, tmp_path: Path) -> None:
    base = tiny(tmp_path / "base")
    before = contents(base)
    assert shell("apply", "base-edit", "base", "--output", "out") == 0
    assert "Written to out" in shell.out
    assert {"undo.safetensors", "patch.json"} <= set(contents(tmp_path / "base-edit"))
    assert shell("verify", "out", "--edit", "base-edit") == 0
    assert shell("verify", "out", "--edit", "base-edit", "--base", "base") == 0
    assert "as they should be" in shell.out
    assert shell("apply", "base-edit", "base", "--output", "out") == 2
    assert "pass --overwrite" in shell.error
    assert shell("apply", "base-edit", "base", "--output", "out", "--overwrite") == 0
    assert shell("revert", "out", "--edit", "base-edit", "--output", "back") == 0
    assert shell("revert", "out", "--edit", "base-edit", "--output", "back") == 2
    assert shell("revert", "out", "--edit", "base-edit", "--output", "back", "--overwrite") == 0
    assert contents(tmp_path / "back") == before == contents(base)


@pytest.mark.parametrize("command", ["verify", "revert"])
def test_a_folder_without_its_edit_asks_for_it(shell: Shell, tmp_path: Path, command: str) -> None:
    tiny(tmp_path / "base")
    assert shell(command, "base") == 2
    assert "name the edit's folder with --edit" in shell.error


def test_without_undo_nothing_can_be_reverted(shell: Shell, tmp_path: Path) -> None:
    tiny(tmp_path / "base")
    assert shell("apply", "base-edit", "base", "--output", "out", "--no-undo") == 0
    assert "undo.safetensors" not in contents(tmp_path / "base-edit")
    assert shell("revert", "out", "--edit", "base-edit", "--output", "back") == 2
    assert "has no undo.safetensors" in shell.error
    assert not (tmp_path / "back").exists()


def test_links(shell: Shell, tmp_path: Path) -> None:
    base = tiny(tmp_path / "base")
    edit = random_edit(open_checkpoint(base))
    save_edit(replace(edit, changes=edit.changes[:1]), tmp_path / "small")
    assert shell("apply", "small", "base", "--output", "out", "--link") == 0
    linked = [path.name for path in base.glob("*.safetensors") if (tmp_path / "out" / path.name).samefile(path)]
    assert linked
    assert "writing into one in place changes the base too" in shell.error
    assert shell("apply", "base-edit", "base", "--output", "adapter", "--adapter", "--link") == 2
    assert "--link is for a checkpoint" in shell.error


def test_another_base_only_by_force(shell: Shell, tmp_path: Path) -> None:
    tiny(tmp_path / "base", shard="1GB")
    tiny(tmp_path / "other", shard="1GB", seed=1)
    assert shell("apply", "base-edit", "other", "--output", "out") == 2
    assert "the tensor model.norm.weight" in shell.error
    assert "--force-base" in shell.error
    assert shell("apply", "base-edit", "other", "--output", "out", "--force-base") == 0
    assert "Warning: other is not the base the edit was made for; different: the tensor model.norm.weight" in (
        shell.error
    )
    assert shell("apply", "base-edit", "other", "--output", "adapter", "--adapter", "--force-base") == 0


def test_adapters(shell: Shell, tmp_path: Path) -> None:
    tiny(tmp_path / "base", "qwen2")
    assert shell("apply", "base-edit", "base", "--output", "adapter", "--adapter") == 0
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["rank_pattern"]
    assert shell("apply", "base-edit", "base", "--output", "uniform", "--adapter", "--uniform-rank") == 0
    config = json.loads((tmp_path / "uniform" / "adapter_config.json").read_text())
    assert not config["rank_pattern"]
    ranks = {len(side) for name, side in load_file(tmp_path / "uniform" / "adapter_model.safetensors").items()
             if name.endswith("lora_A.weight")}  # fmt: skip
    assert ranks == {config["r"]}
    assert shell("apply", "base-edit", "base", "--output", "no", "--uniform-rank") == 2
    assert "--uniform-rank is for an --adapter" in shell.error


@pytest.mark.parametrize("output", ["base", "base/inside", "run", "run/edit"])
@pytest.mark.parametrize("kind", [(), ("--adapter",)])
def test_overwriting_takes_neither_base_nor_edit_away(
    shell: Shell, tmp_path: Path, output: str, kind: tuple[str, ...]
) -> None:
    tiny(tmp_path / "base")
    (tmp_path / "run").mkdir()
    (tmp_path / "base-edit").rename(tmp_path / "run" / "edit")
    before = {path: path.is_dir() or path.read_bytes() for path in tmp_path.rglob("*")}
    assert shell("apply", "run", "base", "--output", output, "--overwrite", *kind) == 2
    assert "lie one inside the other" in shell.error
    assert {path: path.is_dir() or path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_reverting_does_not_take_the_edit_away(shell: Shell, tmp_path: Path) -> None:
    tiny(tmp_path / "base")
    assert shell("apply", "base-edit", "base", "--output", "out") == 0
    before = contents(tmp_path / "base-edit")
    assert shell("revert", "out", "--edit", "base-edit", "--output", "base-edit", "--overwrite") == 2
    assert "the edit's folder lie one inside the other" in shell.error
    assert contents(tmp_path / "base-edit") == before


def test_edits_stack_and_come_off_in_order(shell: Shell, tmp_path: Path) -> None:
    tiny(tmp_path / "base")
    assert shell("apply", "base-edit", "base", "--output", "once") == 0
    save_edit(random_edit(open_checkpoint(tmp_path / "once"), strength=0.5), tmp_path / "second")
    assert shell("apply", "second", "once", "--output", "twice") == 0
    assert shell("inspect", "twice") == 0
    assert "edits in it" in shell.out
    assert "2 by this package" in shell.out
    assert shell("revert", "twice", "--edit", "base-edit", "--output", "back") == 2
    assert "a later edit must be reverted first" in shell.error
    assert shell("verify", "twice", "--edit", "base-edit") == 1
    assert "twice has a later edit in it" in shell.out
    assert shell("verify", "once", "--edit", "second", "--base", "once") == 1
    assert "this edit was never written into once" in shell.out
    assert shell("revert", "twice", "--edit", "second", "--output", "back") == 0
    assert shell("revert", "back", "--edit", "base-edit", "--output", "first") == 0
    assert contents(tmp_path / "back") == contents(tmp_path / "once")
    assert contents(tmp_path / "first") == contents(tmp_path / "base")


def test_verify_names_what_differs(shell: Shell, tmp_path: Path) -> None:
    tiny(tmp_path / "base")
    assert shell("apply", "base-edit", "base", "--output", "out") == 0
    (tmp_path / "out" / "config.json").write_text((tmp_path / "base" / "config.json").read_text() + " ")
    assert shell("verify", "out", "--edit", "base-edit") == 1
    assert "config.json is not that of the base." in shell.out
    assert "1 difference" in shell.error


def test_diff_shows_matrices_and_neurons(shell: Shell, tmp_path: Path) -> None:
    tiny(tmp_path / "base")
    assert shell("diff", "base-edit", "--base", "base") == 0
    assert "L1.out" in shell.out
    assert "%" in shell.out


def test_a_tied_table_is_counted_once(shell: Shell, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "tied", tied=True, dtype=torch.float32)
    assert shell("inspect", "tied") == 0
    assert "96 rows of the embedding" in shell.out
    assert "rows of the unembedding" not in shell.out


@pytest.mark.parametrize("family", ["gpt2", "granite", "qwen3_moe", "gemma3"])
def test_inspect_in_words_and_as_json(shell: Shell, tmp_path: Path, family: str) -> None:
    tiny(tmp_path / "base", family)
    assert shell("inspect", "base") == 0
    assert "are two tables (untied)" in shell.out
    assert "an edit can reach" in shell.out
    for word in ("None", "True", "["):
        assert word not in shell.out
    assert shell("inspect", "base", "--json") == 0
    assert json.loads(shell.out)["layers"] == 2


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "gpt_oss"}, "MXFP4"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}, '"gptq"'),
        ({"model_type": "mamba"}, "a row in rotate_edit/architectures.py"),
    ],
)
def test_what_cannot_be_edited_is_refused_by_name(shell: Shell, tmp_path: Path, config: dict, words: str) -> None:
    base = tiny(tmp_path / "base")
    (base / "config.json").write_text(json.dumps(config))
    for command in ("inspect", "scan", "decompose"):
        assert shell(command, "base") == 2
        assert words in shell.error


RECIPE = """
model: demo
concepts: [{name: dogs, words: [dog], strength: 2}]
"""


def test_estimates_are_printed_and_nothing_is_done(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    for arguments in (("run", "r.yaml"), ("edit", "r.yaml"), ("decompose", "demo", "--all")):
        assert shell(*arguments, "--estimate", "--output", "out") == 0
        for word in ("time", "memory", "GPU memory", "disk", "GB free", "about"):
            assert word in shell.out
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


def test_an_estimate_that_does_not_fit_ends_with_the_refusal(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "available_memory", lambda: 1000)
    monkeypatch.setattr(estimate, "held_memory", lambda: 0)
    (tmp_path / "r.yaml").write_text(RECIPE)
    assert shell("run", "r.yaml", "--estimate") == 2
    assert "time" in shell.out
    assert "GB of memory" in shell.error
    for arguments in (
        ("run", "r.yaml"), ("edit", "r.yaml"), ("locate", "r.yaml"), ("scan", "demo"), ("decompose", "demo"),
        ("evaluate", "demo", "demo"), ("compare", "demo", "demo", "--prompt", "A dog"),
    ):  # fmt: skip
        assert shell(*arguments) == 2
        assert "GB of memory" in shell.error or arguments[0] == "evaluate"
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


def test_the_changed_tensors_of_a_large_base_are_hashed_and_all_on_request(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rotate_edit.models.checkpoint.SMALL", 0)
    model = {"model": "demo", "locate": {"candidates": 40}, "decompose": {"channels": 1}, "select": {"share": 0.3}}
    ships = ["ship", "yacht", "schooner", "frigate", "sloop", "brig"]
    recipe = model | {"concepts": [{"name": "ships", "words": ships, "strength": 2}]}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    assert shell("edit", "r.yaml", "--output", "made", "--no-checkpoint") == 0
    content = json.loads((tmp_path / "made" / "edit" / "edit.json").read_text())
    changed = {f"model.layers.{change['layer']}.mlp.down_proj.weight" for change in content["changes"]}
    assert set(content["base"]["tensors"]) == changed
    assert shell("edit", "r.yaml", "--output", "full", "--no-checkpoint", "--full-hash") == 0
    content = json.loads((tmp_path / "full" / "edit" / "edit.json").read_text())
    assert set(content["base"]["tensors"]) == set(open_checkpoint("demo").stored)
    assert shell("edit", "r.yaml", "--output", "bare", "--no-undo") == 0
    assert set(contents(tmp_path / "bare" / "edit")) == {"edit.json", "edit.safetensors", "patch.json"}
    assert shell("verify", "bare", "--base", "demo") == 0


def test_reproduce_names_differences_and_fails_on_serious_ones(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Difference("serious", "efficacy", "1", "0.5"), Difference("note", "torch", "2.13", "3.0")]
    monkeypatch.setattr(repeat, "repeat", lambda *given, **options: (found, 40))
    assert shell("reproduce", "reproduce.json") == 1
    for word in ("2 differences", "serious", "efficacy", "0.5", "torch"):
        assert word in shell.out
    assert "1 serious difference: this is not the same result." in shell.error
    found.pop(0)
    assert shell("reproduce", "reproduce.json") == 0
    assert "Reproduced: 40 hashes, numbers and settings agree." in shell.out


def test_push_and_reproduce_refuse_what_is_not_there(shell: Shell, tmp_path: Path) -> None:
    assert shell("push", "nothing", "me/model") == 2
    assert "holds no model/" in shell.error
    assert shell("push", "nothing", "model") == 2
    assert "owner/name" in shell.error
    assert shell("reproduce", "nothing.json") == 2
    assert "has no readable nothing.json" in shell.error
    assert list(tmp_path.iterdir()) == []
