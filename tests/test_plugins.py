"""A method, a control, a metric and a family of models need one file each, and nothing of the package changes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from places import ROOT, TESTS

from rotate_edit.models.demo import demo_model_folder

PLUGIN = TESTS / "plugins" / "everything.py"
RECIPE = {
    "model": "demo",
    "concepts": [{"name": "dogs", "words": ["dog", "puppy", "terrier", "kennel"], "plurals": True, "strength": 2}],
    "locate": {"candidates": 60, "layers": [3, 4]},
    "decompose": {"channels": 1},
    "select": {"share": 0.2},
    "edit": {"method": "strongest-half", "self_text": 1000},
    "save": {"adapter": False},
    "evaluate": {"items": "items", "tokens": 300, "strengths": [1, 2]},
}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo, run from the command line with the plugin, on a copy whose family the plugin adds."""
    folder = tmp_path_factory.mktemp("plugins")
    (folder / "items").mkdir()
    for name, lines in (("texts-test.jsonl", 200), ("prompts.jsonl", 10)):
        some = (ROOT / "evals" / "demo" / name).read_text(encoding="utf-8").splitlines()[:lines]
        (folder / "items" / name).write_text("\n".join(some), encoding="utf-8")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    command = [sys.executable, "-m", "rotate_edit", "--plugin", str(PLUGIN), "run", "recipe.yaml", "--output", "run"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    return folder / "run"


def environment() -> dict[str, str]:
    import os

    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_the_method_edits_and_the_control_is_drawn(run_folder: Path) -> None:
    result = json.loads((run_folder / "evaluation.json").read_text(encoding="utf-8"))
    assert result["chosen_method"] == "strongest-half"
    # The recipe names no controls, so that the new one is drawn beside those of the package.
    assert {"strongest-half", "every-other-neuron", "direction-everywhere"} <= set(result["curves"]["dogs"])
    assert all(point["collateral_kl"]["value"] > 0 for point in result["curves"]["dogs"]["every-other-neuron"])
    located = {channel["name"].split("#")[0] for channel in result["selected_channels"]}
    edited = {f"{vector['address']}.{vector['matrix']}" for vector in result["neurons"]}
    # Of each matrix the half that holds most, so fewer than were located and none beside them.
    assert edited < located
    assert json.loads((run_folder / "edit" / "edit.json").read_text(encoding="utf-8"))["method"] == "strongest-half"


def test_the_metric_is_measured_and_shown(run_folder: Path) -> None:
    result = json.loads((run_folder / "evaluation.json").read_text(encoding="utf-8"))
    assert result["variants"]["edited"]["measures"]["edited_parameters"]["value"] > 3_000_000
    assert "edited parameters" in (run_folder / "report.md").read_text(encoding="utf-8")
    assert "parameters" in (run_folder / "report.html").read_text(encoding="utf-8")


def test_the_metric_is_no_gate_without_a_better_side(run_folder: Path) -> None:
    command = [sys.executable, "-m", "rotate_edit", "--plugin", str(PLUGIN), "check", str(run_folder)]
    done = subprocess.run(
        [*command, "--gate", "edited_parameters=1"], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 2
    assert "has no better side" in done.stderr


def test_a_family_from_outside_is_opened(tmp_path: Path) -> None:
    folder = tmp_path / "made-up"
    shutil.copytree(demo_model_folder(), folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "made_up"}), encoding="utf-8")
    command = [sys.executable, "-m", "rotate_edit"]
    inspect = ["inspect", str(folder), "--json"]
    known = subprocess.run(
        [*command, "--plugin", str(PLUGIN), *inspect], capture_output=True, text=True, env=environment()
    )
    assert known.returncode == 0, known.stderr
    assert json.loads(known.stdout)["family"] == "Made up"
    unknown = subprocess.run([*command, *inspect], capture_output=True, text=True, env=environment())
    assert unknown.returncode == 2
    assert "made_up" in unknown.stderr
