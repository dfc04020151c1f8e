"""The switch from embedding to unembedding is found where it was planted."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny

from rotate_edit.models.checkpoint import open_checkpoint
from rotate_edit.vocabulary.layer_choice import best_switch, measured_switch, sharpness


def mean_sharpness(vectors: torch.Tensor, table: torch.Tensor) -> float:
    return float(sharpness(vectors, table).mean())


def test_sharpness_is_that_of_the_tokens_a_vector_is_made_of() -> None:
    torch.manual_seed(0)
    table, other = torch.randn(2, 4000, 64)
    vectors = torch.stack([table[i : i + 3].mean(0) for i in range(0, 300, 3)])
    assert mean_sharpness(vectors, table) > mean_sharpness(vectors, other) + 0.2
    assert mean_sharpness(3 * vectors, table) == pytest.approx(mean_sharpness(vectors, table), rel=1e-4)
    # Neither a common offset nor a few long rows decide.
    shifted = table + 5 * torch.randn(64)
    assert mean_sharpness(vectors, shifted) == pytest.approx(mean_sharpness(vectors, table), rel=1e-3)
    long_rows = other.clone()
    long_rows[:4] *= 100
    assert mean_sharpness(vectors, long_rows) < mean_sharpness(vectors, table)


@pytest.mark.parametrize(
    ("gains", "switch"),
    [([1.0, 1.0], 0), ([-1.0, -1.0], 2), ([-1.0, 1.0], 1), ([-1.0, 0.5, -1.0, 2.0], 3), ([0.0, 0.0], 0), ([], 0)],
)
def test_one_switch_collects_most(gains: list[float], switch: int) -> None:
    assert best_switch(gains) == switch


@pytest.mark.parametrize("switch", [0, 1, 2])
def test_planted_switch_is_found(tmp_path: Path, switch: int) -> None:
    folder = save_tiny("llama", tmp_path / "m", tied=False, dtype=torch.float32, shard="1GB")
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        table = tensors["model.embed_tokens.weight" if layer < switch else "lm_head.weight"]
        tensors[f"model.layers.{layer}.mlp.down_proj.weight"] = (table[:48] - table.mean(0)).T.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(folder)
    assert measured_switch(checkpoint) == switch


def test_a_tied_head_has_no_switch(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_tiny("llama", tmp_path / "m", tied=True, dtype=torch.float32))
    assert measured_switch(checkpoint) == 0
