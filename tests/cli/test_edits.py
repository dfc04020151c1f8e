"""The commands that read and write edits and checkpoints: apply, diff, verify, revert, demo-model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file
from shell import Shell, contents, tiny
from tiny_models import random_edit

from rotate_edit.edits.edit_file import save_edit
from rotate_edit.models.checkpoint import open_checkpoint
from rotate_edit.models.demo import demo_model_folder


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


def test_the_demo_model_is_written_whole_and_not_over_anything(shell: Shell, tmp_path: Path) -> None:
    assert shell("demo-model", "demo") == 0
    assert "Written to demo" in shell.out
    assert contents(tmp_path / "demo") == contents(demo_model_folder())
    (tmp_path / "demo" / "config.json").write_text("{}")
    assert shell("demo-model", "demo") == 2
    assert "exists already" in shell.error
    assert shell("demo-model", "demo", "--overwrite") == 0
    assert contents(tmp_path / "demo") == contents(demo_model_folder())
