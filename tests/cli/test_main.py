"""The command line: exit codes, one sentence, no traceback, nothing written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from places import ROOT
from safetensors.torch import save_file

DOGS = {"name": "dogs", "words": ["dog", "puppy"], "strength": 2}


def call(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rotate_edit", *arguments]
    # A source tree that is not installed is found as well.
    found = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": found},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def write_recipe(folder: Path, **changes: object) -> str:
    (folder / "r.yaml").write_text(yaml.safe_dump({"model": "demo", "concepts": [DOGS]} | changes))
    return "r.yaml"


def checkpoint(folder: Path, config: dict[str, object], files: dict[str, bytes]) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return str(folder)


LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("unknown key", "unknown key"),
        ("nan", "not a finite number"),
        ("no usable word", "none of its words"),
        ("layer", "out of range"),
        ("missing folder", "neither a folder nor a Hub id"),
        ("bin only", "pickled"),
        ("unsupported", "mamba"),
        ("truncated", "safetensors"),
        ("output exists", "exists already"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(tmp_path: Path, case: str, message: str) -> None:
    models = tmp_path / "models"
    models.mkdir()
    save_file({"x": torch.zeros(4, 4)}, models / "whole.safetensors")
    whole = (models / "whole.safetensors").read_bytes()
    if case == "unknown key":
        recipe = write_recipe(tmp_path, edits={})
    elif case == "nan":
        recipe = write_recipe(tmp_path, concepts=[DOGS | {"strength": float("nan")}])
    elif case == "no usable word":
        recipe = write_recipe(tmp_path, concepts=[DOGS | {"words": ["qqqq"]}])
    elif case == "layer":
        recipe = write_recipe(tmp_path, locate={"layers": [77]})
    elif case == "missing folder":
        recipe = write_recipe(tmp_path, model="./not here")
    elif case == "bin only":
        recipe = write_recipe(tmp_path, model=checkpoint(models / "m", LLAMA, {"pytorch_model.bin": b"x"}))
    elif case == "unsupported":
        config = {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}
        recipe = write_recipe(tmp_path, model=checkpoint(models / "m", config, {"model.safetensors": whole}))
    elif case == "truncated":
        recipe = write_recipe(tmp_path, model=checkpoint(models / "m", LLAMA, {"model.safetensors": whole[:-9]}))
    else:
        recipe = write_recipe(tmp_path)
        (tmp_path / "out").mkdir()
    before = sorted(path.name for path in tmp_path.rglob("*"))
    done = call("run", recipe, "--output", "out", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("Error: ")
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = call("--debug", "run", "none.yaml", cwd=tmp_path)
    assert done.returncode != 0
    assert "Traceback" in done.stderr


def test_all_recipe_errors_come_at_once(tmp_path: Path) -> None:
    done = call("run", write_recipe(tmp_path, edits={}, seed="x", model=""), cwd=tmp_path)
    assert done.returncode == 2
    assert "3 errors" in done.stderr


def test_demo_model_inspect_edit_diff_verify_revert(tmp_path: Path) -> None:
    assert call("demo-model", "base", cwd=tmp_path).returncode == 0
    inspected = json.loads(call("inspect", "base", "--json", cwd=tmp_path).stdout)
    assert inspected["layers"] == 5
    recipe = write_recipe(
        tmp_path,
        model="base",
        decompose={"channels": 1},
        concepts=[{"name": "ships", "words": ["ship", "yacht", "schooner", "frigate", "sloop", "brig"], "strength": 2}],
        select={"share": 0.3, "support": 1.5},
    )
    made = call("edit", recipe, "--output", "made", "--adapter", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "neuron vectors changed" in made.stdout
    assert "fitted: 1 matrix" in call("diff", "made", cwd=tmp_path).stdout
    verified = call("verify", "made", "--base", "base", cwd=tmp_path)
    assert verified.returncode == 0, verified.stderr
    shard = tmp_path / "made" / "model" / "model.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    original = shard.read_bytes()
    shard.write_bytes(content)
    broken = call("verify", "made", "--base", "base", cwd=tmp_path)
    assert broken.returncode == 1
    assert "model." in broken.stdout
    shard.write_bytes(original)
    assert call("revert", "made", "--output", "back", cwd=tmp_path).returncode == 0
    restored = (tmp_path / "back" / "model.safetensors").read_bytes()
    assert restored == (tmp_path / "base" / "model.safetensors").read_bytes()
    found = call("channels", "made", "--token", "ship", "--json", cwd=tmp_path)
    assert found.returncode == 0
    assert all("vector" not in json.loads(line) for line in found.stdout.splitlines())
