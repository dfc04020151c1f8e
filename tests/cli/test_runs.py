"""The commands that take a recipe: run, locate, edit, tune. And report."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from huge_checkpoint import write_huge, write_sparse
from shell import Shell, contents
from tiny_run import tiny_run

from rotate_edit.models.checkpoint import open_checkpoint
from rotate_edit.models.demo import demo_model_folder

RECIPE = """
model: demo
concepts: [{name: dogs, words: [dog], strength: 2}]
"""
SHIPS = {"name": "ships", "words": ["ship", "yacht", "schooner", "frigate", "sloop", "brig"], "strength": 2}
# The fewest neurons that still carry the concept, and a method that reads no text.
SMALL = {
    "concepts": [SHIPS],
    "locate": {"candidates": 40},
    "decompose": {"channels": 1},
    "select": {"share": 0.3, "fdr": 0.5},
    "edit": {"method": "channel-located"},
}


def test_estimates_are_printed_and_nothing_is_done(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    for arguments in (("run", "r.yaml"), ("edit", "r.yaml"), ("decompose", "demo", "--all")):
        assert shell(*arguments, "--estimate", "--output", "out") == 0
        for word in ("time", "memory", "GPU memory", "disk", "GB free", "about"):
            assert word in shell.out
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


def test_an_estimate_that_does_not_fit_ends_with_the_refusal(shell: Shell, tmp_path: Path) -> None:
    write_huge(tmp_path / "huge")
    recipe = {
        "model": "huge",
        "concepts": [{"name": "dogs", "words": ["dog"], "strength": 2}],
        "edit": {"method": "direction-everywhere"},
        "evaluate": {"controls": []},
        "save": {"checkpoint": False, "adapter": False},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    for command in ("run", "edit"):
        options = ("--no-checkpoint",) if command == "edit" else ()
        assert shell(command, "r.yaml", "--estimate", *options) == 2
        assert "time" in shell.out
        assert "GB of memory" in shell.error
    for arguments in (("run", "r.yaml"), ("edit", "r.yaml"), ("locate", "r.yaml")):
        assert shell(*arguments) == 2
        assert "GB of memory" in shell.error
        assert shell.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["huge", "r.yaml"]


def larger_demo(folder: Path) -> Path:
    """The demo with a tensor that nobody reads beside it, so large that not all of its bytes are hashed."""
    shutil.copytree(demo_model_folder(), folder)
    names = dict.fromkeys(open_checkpoint(folder).stored, "first.safetensors")
    (folder / "model.safetensors").rename(folder / "first.safetensors")
    write_sparse(folder / "rest.safetensors", {"rest.weight": [1 << 15, 1 << 14]})
    index = {"metadata": {}, "weight_map": names | {"rest.weight": "rest.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_the_changed_tensors_of_a_large_base_are_hashed_and_all_on_request(shell: Shell, tmp_path: Path) -> None:
    larger_demo(tmp_path / "large")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(SMALL | {"model": "large"}))
    assert shell("edit", "r.yaml", "--output", "made", "--no-checkpoint") == 0
    content = json.loads((tmp_path / "made" / "edit" / "edit.json").read_text())
    changed = {f"model.layers.{change['layer']}.mlp.down_proj.weight" for change in content["changes"]}
    assert set(content["base"]["tensors"]) == changed
    assert shell("edit", "r.yaml", "--output", "full", "--no-checkpoint", "--full-hash") == 0
    content = json.loads((tmp_path / "full" / "edit" / "edit.json").read_text())
    assert set(content["base"]["tensors"]) == set(open_checkpoint("large").stored)


def test_an_edit_without_undo_is_written_and_verified(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(SMALL | {"model": "demo"}))
    assert shell("edit", "r.yaml", "--output", "bare", "--no-undo") == 0
    assert "changed in" in shell.out
    assert set(contents(tmp_path / "bare" / "edit")) == {"edit.json", "edit.safetensors", "patch.json"}
    assert shell("verify", "bare", "--base", "demo") == 0
    assert shell("edit", "r.yaml", "--output", "bare") == 2
    assert "exists already" in shell.error


def test_what_is_located_is_printed_and_nothing_is_written(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(SMALL | {"model": "demo"}))
    assert shell("locate", "r.yaml") == 0
    assert "for 1 group of its tokens." in shell.out
    assert "ships: " in shell.out
    assert shell("locate", "r.yaml", "--json") == 0
    assert '"name": "L' in shell.out
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]
    (tmp_path / "none.yaml").write_text(yaml.safe_dump(SMALL | {"model": "demo", "select": {"fdr": 1e-9}}))
    assert shell("locate", "none.yaml") == 1
    assert "no channel carries the concepts" in shell.error


def test_a_report_is_written_again(shell: Shell, tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run")
    (run / "report.md").unlink()
    shell.capsys.readouterr()
    assert shell("report", "run") == 0
    assert shell.out == "Report: run/report.html"
    assert "efficacy" in (run / "report.md").read_text()
    assert shell("report", "nowhere") == 2
    assert "is not a run folder" in shell.error


@pytest.mark.parametrize("command", ["run", "edit", "locate", "tune"])
def test_a_recipe_that_is_not_there_is_named_beside_the_bundled_ones(shell: Shell, command: str) -> None:
    assert shell(command, "nowhere.yaml") == 2
    assert "there is no recipe at nowhere.yaml; the bundled ones are" in shell.error
