"""The command line: exit codes, one sentence, no traceback, nothing written."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from places import ROOT
from safetensors.torch import save_file
from shell import Shell

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
def test_bad_input_is_one_sentence_and_exit_2(shell: Shell, tmp_path: Path, case: str, message: str) -> None:
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
    assert shell("run", recipe, "--output", "out") == 2
    assert message in shell.error
    assert shell.error.startswith("Error: ")
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_a_process_ends_with_one_sentence_and_with_debug_in_a_traceback(tmp_path: Path) -> None:
    done = call("run", "none.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("Error: ")
    done = call("--debug", "run", "none.yaml", cwd=tmp_path)
    assert done.returncode != 0
    assert "Traceback" in done.stderr


def test_all_recipe_errors_come_at_once(shell: Shell, tmp_path: Path) -> None:
    assert shell("run", write_recipe(tmp_path, edits={}, seed="x", model="")) == 2
    assert "3 errors" in shell.error


def test_demo_model_inspect_edit_diff_verify_revert(shell: Shell, tmp_path: Path) -> None:
    assert shell("demo-model", "base") == 0
    assert shell("inspect", "base", "--json") == 0
    assert json.loads(shell.out)["layers"] == 5
    recipe = write_recipe(
        tmp_path,
        model="base",
        locate={"candidates": 60},
        decompose={"channels": 1},
        concepts=[{"name": "ships", "words": ["ship", "yacht", "schooner", "frigate", "sloop", "brig"], "strength": 2}],
        select={"share": 0.3, "fdr": 0.5},
        edit={"method": "channel-located"},
    )
    assert shell("edit", recipe, "--output", "made", "--adapter") == 0, shell.error
    assert re.search(r"neuron vectors? changed", shell.out)
    assert shell("diff", "made") == 0
    assert re.search(r"channel-located: \d+ matri", shell.out)
    assert (tmp_path / "made" / "adapter" / "adapter_model.safetensors").is_file()
    assert shell("verify", "made", "--base", "base") == 0, shell.error
    shard = tmp_path / "made" / "model" / "model.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    original = shard.read_bytes()
    shard.write_bytes(content)
    assert shell("verify", "made", "--base", "base") == 1
    assert "model." in shell.out
    shard.write_bytes(original)
    assert shell("revert", "made", "--output", "back") == 0
    restored = (tmp_path / "back" / "model.safetensors").read_bytes()
    assert restored == (tmp_path / "base" / "model.safetensors").read_bytes()
    assert shell("channels", "made", "--json") == 0
    assert '{"name": "L' in shell.out
    assert '"vector"' not in shell.out


PLUGIN = """
from rotate_edit.evaluation.metrics import LOWER, Metric, metric


@metric("typing_errors", title="typing errors", note="of a plugin", better=LOWER)
class TypingErrors(Metric):
    def measure(self, edited, base, known):
        return None
"""


def test_a_plugin_is_run_before_the_command(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "plugin.py").write_text(PLUGIN)
    (tmp_path / "run").mkdir()
    result = {"variants": {"edited": {"measures": {"typing_errors": {"value": 3.0}}}}}
    (tmp_path / "run" / "evaluation.json").write_text(json.dumps(result))
    gate = ("check", "run", "--gate", "typing_errors=4")
    assert shell(*gate) == 2
    assert "there is no metric 'typing_errors'" in shell.error
    assert shell("--plugin", "plugin.py", *gate) == 0
    assert shell.out == "1 gate passed."
    assert shell("--plugin", "plugin.py", "check", "run", "--gate", "typing_errors=2") == 1
    assert "typing_errors is 3, and at most 2 is asked for." in shell.error


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "there is no plugin file plugin.py"),
        ("raise ValueError('one' + chr(10) + 'two')", "plugin.py ends with an error (ValueError: one two)"),
        ("def (", "the plugin file plugin.py ends with an error (SyntaxError"),
        (
            "from rotate_edit.errors import BadInput\nraise BadInput('not on this machine.')",
            "Error: not on this machine.",
        ),
    ],
)
def test_a_plugin_that_cannot_be_run_is_one_sentence(
    shell: Shell, tmp_path: Path, content: str | None, words: str
) -> None:
    if content is not None:
        (tmp_path / "plugin.py").write_text(content)
    assert shell("--plugin", "plugin.py", "check", "run", "--gate", "efficacy=1") == 2
    assert words in shell.error


def test_help_and_version_end_well_and_unknown_commands_do_not(shell: Shell) -> None:
    assert shell("--version") == 0
    assert shell.out.startswith("rotate-edit, version ")
    assert shell("--help") == 0
    for group in ("run", "scan", "apply", "evaluate", "push"):
        assert f" {group} " in shell.out
    assert shell("perform") == 2
    assert "No such command" in shell.error
