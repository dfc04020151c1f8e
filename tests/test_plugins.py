"""A method, a control, a metric, a locator and a family need one file each: the examples of docs/methods.md, run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from documents import blocks
from places import ROOT

from rotate_edit.models.demo import demo_model_folder

RECIPE = {
    "model": "demo",
    "concepts": [{"name": "dogs", "words": ["dog", "puppy", "terrier", "kennel"], "plurals": True, "strength": 2}],
    "locate": {"candidates": 60, "layers": [3, 4]},
    "decompose": {"channels": 1},
    "select": {"share": 0.2, "fdr": 0.9},
    "edit": {"method": "strongest-half", "self_text": 1000},
    "save": {"adapter": False},
    "evaluate": {"items": "items", "tokens": 300, "strengths": [1, 2]},
}
FAMILY = """
from rotate_edit import Architecture, add_architecture, gated

add_architecture(Architecture(family="Made up", model_type="made_up", dense=gated("layers.{layer}.mlp")))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the plugin, items of the demo and a recipe."""
    where = tmp_path_factory.mktemp("plugins")
    examples = blocks(ROOT / "docs" / "methods.md", "python")
    assert len(examples) == 5
    (where / "plugin.py").write_text("\n".join([*examples, FAMILY]), encoding="utf-8")
    (where / "items").mkdir()
    for name, lines in (("texts-test.jsonl", 200), ("prompts.jsonl", 10), ("generation.jsonl", 3)):
        some = (ROOT / "evals" / "demo" / name).read_text(encoding="utf-8").splitlines()[:lines]
        (where / "items" / name).write_text("\n".join(some), encoding="utf-8")
    (where / "recipe.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    return where


def command(folder: Path, *words: str, plugin: bool = True) -> "subprocess.CompletedProcess[str]":
    """The command line in a process of its own, so that nothing stays registered."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    given = ["--plugin", "plugin.py"] if plugin else []
    return subprocess.run(
        [sys.executable, "-m", "rotate_edit", *given, *words],
        cwd=folder, capture_output=True, text=True, env=environment,
    )  # fmt: skip


@pytest.fixture(scope="module")
def result(folder: Path) -> dict:
    """What a run of the demo with the plugin finds."""
    done = command(folder, "run", "recipe.yaml", "--output", "run")
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "run" / "evaluation.json").read_text(encoding="utf-8"))


def test_the_method_edits_the_half_that_holds_most(folder: Path, result: dict) -> None:
    assert result["chosen_method"] == "strongest-half"
    located = {channel["name"].split("#")[0] for channel in result["selected_channels"]}
    edited = {f"{vector['address']}.{vector['matrix']}" for vector in result["neurons"]}
    assert edited < located
    assert len(edited) >= len(located) / 2
    assert json.loads((folder / "run" / "edit" / "edit.json").read_text(encoding="utf-8"))["method"] == "strongest-half"
    done = command(folder, "verify", "run")
    assert done.returncode == 0, done.stderr


def test_the_control_is_drawn_beside_those_of_the_package(result: dict) -> None:
    curves = result["curves"]["dogs"]
    assert {"strongest-half", "weakest-half", "direction-everywhere", "random-neurons"} <= set(curves)
    damage = {name: points[-1]["collateral_kl"]["value"] for name, points in curves.items()}
    assert 0 < damage["weakest-half"] < damage["strongest-half"]


def test_the_metric_is_measured_and_shown(folder: Path, result: dict) -> None:
    measured = result["variants"]["edited"]["measures"]["words_written"]
    texts = [row["edited"].split() for row in result["generations"]]
    assert measured["value"] == pytest.approx(sum(map(len, texts)) / len(texts))
    assert "words written" in (folder / "run" / "report.md").read_text(encoding="utf-8")
    assert "words written" in (folder / "run" / "report.html").read_text(encoding="utf-8")
    done = command(folder, "check", "run", "--gate", "words_written=1")
    assert done.returncode == 2
    assert "has no better side" in done.stderr


def test_a_family_from_outside_is_opened(folder: Path) -> None:
    shutil.copytree(demo_model_folder(), folder / "base")
    config = json.loads((folder / "base" / "config.json").read_text(encoding="utf-8"))
    (folder / "base" / "config.json").write_text(json.dumps(config | {"model_type": "made_up"}), encoding="utf-8")
    known = command(folder, "inspect", "base", "--json")
    assert known.returncode == 0, known.stderr
    assert json.loads(known.stdout)["family"] == "Made up"
    unknown = command(folder, "inspect", "base", "--json", plugin=False)
    assert unknown.returncode == 2
    assert "made_up" in unknown.stderr


def test_a_plugin_that_is_not_there_is_one_sentence(folder: Path) -> None:
    (folder / "empty").mkdir()
    done = command(folder / "empty", "inspect", "demo")
    assert done.returncode == 2
    assert done.stderr.strip() == "Error: there is no plugin file plugin.py."
