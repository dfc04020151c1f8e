"""What is written is used by lm-eval and PEFT in a process that cannot import this package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import SHARED
from tiny_models import random_edit

from rotate_edit.edits.writing.adapter import write_adapter
from rotate_edit.edits.writing.patch import write_checkpoint
from rotate_edit.models.checkpoint import open_checkpoint

MODEL = SHARED / "models" / "stories260K"

TASK = """
task: tiny
dataset_path: json
dataset_kwargs:
  data_files: {file}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
metric_list:
  - metric: acc
"""

# A finder that refuses this package wherever it is looked for, before lm-eval's own command line runs.
RUN = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "rotate_edit":
            raise ImportError("this process must not import rotate_edit")
sys.meta_path.insert(0, Refuse())
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
"""


@pytest.mark.slow
@pytest.mark.skipif(not MODEL.is_dir(), reason="the shared checkpoints are not here")
@pytest.mark.parametrize("kind", ["checkpoint", "adapter"])
def test_lm_eval_runs_on_the_outputs(kind: str, tmp_path: Path) -> None:
    base = open_checkpoint(MODEL)
    edit = random_edit(base, tables=False, biases=False, strength=0.5)
    if kind == "checkpoint":
        write_checkpoint(base, edit, tmp_path / "out")
        model = f"pretrained={tmp_path / 'out'}"
    else:
        write_adapter(base, edit, tmp_path / "out")
        model = f"pretrained={MODEL},peft={tmp_path / 'out'}"
    items = [
        {"question": "Once upon a time there was a little", "choices": [" girl", " because"]},
        {"question": "The dog ran to the", "choices": [" park", " said"]},
    ]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    (tmp_path / "tiny.yaml").write_text(TASK.format(file=tmp_path / "items.jsonl"))
    arguments = ["--model", "hf", "--model_args", f"{model},dtype=float32", "--tasks", "tiny", "--device", "cpu"]
    arguments += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "results.json"), "--batch_size", "1"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN, *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    (results,) = tmp_path.glob("results*.json")
    accuracy = json.loads(results.read_text())["results"]["tiny"]["acc,none"]
    assert accuracy in (0.0, 0.5, 1.0)
