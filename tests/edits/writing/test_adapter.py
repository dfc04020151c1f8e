"""LoRA factors: ranks, padding, precision and what PEFT cannot express."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import random_edit, save_tiny

from rotate_edit.edits.edit import Edit, MatrixChange
from rotate_edit.edits.writing.adapter import lora_factors, write_adapter
from rotate_edit.errors import BadInput
from rotate_edit.models.checkpoint import identity, open_checkpoint, read_embedding, read_matrix


def change(matrix: str, layer: int | None, right: torch.Tensor, rows: tuple[int, ...] = (1, 5), strength: float = 2.0):  # type: ignore[no-untyped-def]
    left = torch.randn(len(rows), len(right))
    return MatrixChange(matrix, layer, None, torch.tensor(rows), left, right, strength, "c")


def test_rank_is_the_number_of_distinct_directions(tmp_path: Path) -> None:
    base = open_checkpoint(save_tiny("phi3", tmp_path / "m", tied=False, dtype=torch.float32))
    shared, own = torch.randn(1, 32), torch.randn(2, 32)
    edit = Edit(
        "test",
        (
            change("gate", 0, shared),
            change("in", 0, shared),
            change("out", 0, shared),
            change("out", 0, torch.cat([own, shared]), (2, 3)),
            change("out", 1, own),
        ),
        base=identity(base),
    )
    adapter = write_adapter(base, edit, tmp_path / "adapter")
    # Gate and in are two halves of one module here, and their one direction is counted once.
    assert adapter.ranks == {
        "model.layers.0.mlp.gate_up_proj": 1,
        "model.layers.0.mlp.down_proj": 3,
        "model.layers.1.mlp.down_proj": 2,
    }
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert config["r"] == config["lora_alpha"]
    assert config["base_model_name_or_path"] is None
    assert str(tmp_path) not in json.dumps(config)
    factors = {part.target: part for part in lora_factors(base, edit)}
    delta = factors["model.layers.0.mlp.gate_up_proj"].b @ factors["model.layers.0.mlp.gate_up_proj"].a
    assert torch.allclose(delta[[1, 5]], edit.changes[0].delta().double(), atol=1e-6)
    assert torch.allclose(delta[[49, 53]], edit.changes[1].delta().double(), atol=1e-6)
    assert delta.count_nonzero() == 4 * 32


def test_uniform_rank_pads_with_zeros(tmp_path: Path) -> None:
    base = open_checkpoint(save_tiny("llama", tmp_path / "m", tied=False, dtype=torch.float32))
    edit = random_edit(base)
    ragged = write_adapter(base, edit, tmp_path / "ragged")
    even = write_adapter(base, edit, tmp_path / "even", uniform_rank=True)
    assert len(set(ragged.ranks.values())) > 1
    assert set(even.ranks.values()) == {max(ragged.ranks.values())}
    config = json.loads((tmp_path / "even" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {}
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ragged", "even"))
    for name in one:
        if name.endswith("lora_A.weight"):
            other = name.replace("lora_A", "lora_B")
            assert torch.equal(one[other] @ one[name], two[other] @ two[name])


def test_precision_follows_the_strength(tmp_path: Path) -> None:
    base = open_checkpoint(save_tiny("llama", tmp_path / "m", tied=False, dtype=torch.float32))
    edit = random_edit(base)
    # Where two changes share a direction on one row their sum is rarely exact in float32, so only one layer is taken.
    edit = replace(edit, changes=tuple(part for part in edit.changes if part.layer == 0))
    for number, (strength, dtype) in enumerate([(2.0, torch.float32), (1.7, torch.float64), (-4.0, torch.float32)]):
        written = write_adapter(base, edit.at(strength), tmp_path / f"a{number}")
        assert written.dtype == dtype
        tensors = load_file(tmp_path / f"a{number}" / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert write_adapter(base, edit, tmp_path / "b", dtype=torch.float32).dtype == torch.float32


def test_rows_of_a_tied_table_are_written_whole(tmp_path: Path) -> None:
    base = open_checkpoint(save_tiny("llama", tmp_path / "m", tied=True, dtype=torch.bfloat16))
    edit = random_edit(base)
    tables = replace(edit, changes=tuple(part for part in edit.changes if part.layer is None))
    for name, made in (("all", edit), ("tables", tables)):
        written = write_adapter(base, made, tmp_path / name)
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert config["trainable_token_indices"] == {"model.embed_tokens": [3, 17, 40, 95]}
        assert written.rows == 4
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        assert not [key for key in tensors if "lora_embedding" in key or "lm_head" in key]
        (rows,) = [tensor for key, tensor in tensors.items() if "trainable_tokens_delta" in key]
        exact = read_embedding(base).double()
        for part in tables.changes:
            exact[part.rows] += part.strength * (part.left.double() @ part.right.double())
        assert torch.allclose(rows.double(), exact[[3, 17, 40, 95]], rtol=1e-14, atol=1e-14)
    assert written.ranks == {}


def test_a_tied_head_with_a_bias_is_refused(tmp_path: Path) -> None:
    base = open_checkpoint(save_tiny("gptj", tmp_path / "m", tied=True, dtype=torch.float32))
    tables = replace(random_edit(base), changes=(change("unembedding", None, torch.randn(1, 32)),))
    with pytest.raises(BadInput, match=r"leaves out the bias of lm_head .* write a patched checkpoint"):
        write_adapter(base, tables, tmp_path / "a")


def test_another_base_needs_force(tmp_path: Path) -> None:
    base = open_checkpoint(save_tiny("llama", tmp_path / "m", tied=False, dtype=torch.float32))
    edit = random_edit(base)
    (base.folder / "tokenizer.json").write_text("{}")
    with pytest.raises(BadInput, match=r"tokenizer\.json"):
        write_adapter(base, edit, tmp_path / "a")
    assert "tokenizer.json" in write_adapter(base, edit, tmp_path / "a", force_base=True).warnings[0]


def test_what_peft_cannot_express(tmp_path: Path) -> None:
    base = open_checkpoint(save_tiny("llama-biases", tmp_path / "m", tied=True, dtype=torch.float32))
    edit = random_edit(base)
    with pytest.raises(BadInput, match=r"down_proj\.bias, which is a bias; write a patched checkpoint"):
        write_adapter(base, edit, tmp_path / "a")
    with pytest.raises(BadInput, match="changes nothing"):
        write_adapter(base, replace(edit, changes=()), tmp_path / "a")
    unbiased = replace(edit, changes=tuple(part for part in edit.changes if part.matrix != "out_bias"))
    assert write_adapter(base, unbiased, tmp_path / "a").warnings == ()
    with pytest.raises(BadInput, match="exists already"):
        write_adapter(base, unbiased, tmp_path / "a")
    assert read_matrix(base, 0, "out").shape == (48, 32)
