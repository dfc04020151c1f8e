"""What inspection says is what the config says."""

import json
from pathlib import Path

import torch
from tiny_models import save_tiny

from rotate_edit.models.checkpoint import open_checkpoint
from rotate_edit.models.inspection import inspect_model


def look(family: str, tmp_path: Path, *, tied: bool = False) -> dict:
    return inspect_model(open_checkpoint(save_tiny(family, tmp_path / family, tied=tied, dtype=torch.bfloat16)))


def test_sizes_and_reach(tmp_path: Path) -> None:
    found = look("llama-biases", tmp_path, tied=True)
    assert json.loads(json.dumps(found)) == found
    assert (found["layers"], found["d_model"], found["neurons"], found["vocabulary"]) == (2, 32, 48, 96)
    assert found["tied"]
    assert found["gated"]
    assert found["dtypes"] == ["BF16"]
    assert found["bytes"] == 2 * found["parameters"]
    assert found["shards"] > 1
    assert found["reach"] == {
        "gate": 96,
        "in": 96,
        "out": 96,
        "embedding": 96,
        "unembedding": 96,
        "out_bias": 2,
    }
    assert str(tmp_path) not in json.dumps(found)


def test_experts_are_counted(tmp_path: Path) -> None:
    found = look("qwen3_moe-dense-layer", tmp_path)
    assert found["experts"] == 4
    assert found["neurons"] == 48
    assert found["reach"]["out"] == 48 + 4 * 24


def test_peculiarities_of_families(tmp_path: Path) -> None:
    assert look("granite", tmp_path)["scales"] == {"residual": 0.5, "embedding": 3.0, "logits divided by": 2.0}
    assert look("gemma2", tmp_path)["norm after the MLP"]
    assert look("gptj", tmp_path)["head bias"]
    assert look("cohere", tmp_path)["parallel"]
    assert look("stablelm-parallel", tmp_path)["parallel"]
    assert not look("stablelm", tmp_path)["parallel"]
    assert "embedding" not in look("opt-350m", tmp_path)["reach"]
    assert look("gpt2", tmp_path)["matrices"] == ["in", "out"]
