"""Edits in live models go on and off bit for bit."""

from pathlib import Path

import pytest
import torch
from tiny_models import random_edit, save_tiny

from rotate_edit.edits.apply import applied
from rotate_edit.edits.edit import Clamp, Edit, MatrixChange
from rotate_edit.edits.edit_file import save_edit
from rotate_edit.edits.writing.adapter import write_adapter
from rotate_edit.edits.writing.patch import write_checkpoint
from rotate_edit.errors import BadInput
from rotate_edit.models.checkpoint import load_model, open_checkpoint
from rotate_edit.models.parameters import live_parameter


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_on_and_off_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoint = open_checkpoint(save_tiny("llama-biases", tmp_path / "m", tied=True, dtype=torch.float32))
    model = load_model(checkpoint, dtype=dtype)
    edit = random_edit(checkpoint)
    before = state(model)
    # Strengths so large that adding and subtracting again would not come back.
    with applied(model, edit.at(1e4)):
        during = state(model)
    after = state(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    changed = {name for name in before if not torch.equal(before[name], during[name])}
    assert {"model.embed_tokens.weight", "model.layers.1.mlp.down_proj.bias"} <= changed
    assert "model.norm.weight" not in changed
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_off_again_after_an_exception_and_nested(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_tiny("gpt2", tmp_path / "m", tied=False, dtype=torch.float32))
    model = load_model(checkpoint)
    edit = random_edit(checkpoint)
    before = state(model)
    with pytest.raises(KeyError), applied(model, edit), applied(model, edit.at(-3.0)):
        raise KeyError
    assert all(torch.equal(before[name], tensor) for name, tensor in state(model).items())


def test_strength_zero_changes_nothing_and_one_removes(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_tiny("llama", tmp_path / "m", tied=False, dtype=torch.float32))
    model = load_model(checkpoint)
    parameter, _ = live_parameter(model, "out", 1)
    unit = torch.nn.functional.normalize(torch.randn(1, 32))
    rows = torch.arange(48)
    edit = Edit("test", (MatrixChange("out", 1, None, rows, -(parameter.detach().T @ unit.T), unit, 1.0, "c"),))
    before = parameter.detach().clone()
    with applied(model, edit.at(0.0)):
        assert torch.equal(parameter, before)
    with applied(model, edit):
        assert (unit @ parameter).abs().max() < 1e-6
    with applied(model, edit.at(2.0)):
        assert torch.allclose(unit @ parameter, -(unit @ before), atol=1e-6)


def test_an_edit_that_does_not_fit_leaves_no_trace(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_tiny("llama", tmp_path / "m", tied=False, dtype=torch.float32))
    model = load_model(checkpoint)
    before = state(model)
    good = random_edit(checkpoint).changes[0]
    one, width = torch.ones(1, 1), torch.ones(1, 32)
    for bad, words in (
        (MatrixChange("out", 1, None, torch.tensor([48]), one, width, 1.0, "c"), "made for another model"),
        (MatrixChange("out", 1, None, torch.tensor([0]), one, torch.ones(1, 31), 1.0, "c"), "made for another model"),
        (MatrixChange("out", 2, None, torch.tensor([0]), one, width, 1.0, "c"), "in layer 2"),
        (MatrixChange("out", 1, 0, torch.tensor([0]), one, width, 1.0, "c"), "layer 1, expert 0"),
        (MatrixChange("out_bias", 1, None, torch.tensor([0]), one, width, 1.0, "c"), "out_bias"),
    ):
        with pytest.raises(BadInput, match=words), applied(model, Edit("test", (good, bad))):
            pass
        assert all(torch.equal(before[name], tensor) for name, tensor in state(model).items())


def test_clamped_neurons_are_held_and_let_go(tmp_path: Path) -> None:
    model = load_model(open_checkpoint(save_tiny("llama", tmp_path / "m", tied=False, dtype=torch.float32)))
    rows, values = torch.tensor([1, 3]), torch.tensor([0.5, -0.25])
    edit = Edit("clamp-neurons", (), clamps=(Clamp(1, rows, values, 2.0, "dogs"),))
    seen = []
    last = model.model.layers[1].mlp.down_proj
    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad(), applied(model, edit):
        handle = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
        model(tokens)
        handle.remove()
    torch.testing.assert_close(seen[0][..., rows], (2 * values).expand(1, 3, 2))
    assert not last._forward_pre_hooks
    seen.clear()
    with torch.no_grad(), applied(model, edit.at({"dogs": -0.5})):
        handle = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
        model(tokens)
        handle.remove()
    torch.testing.assert_close(seen[0][..., rows], (-0.5 * values).expand(1, 3, 2))


def test_clamps_are_never_written(tmp_path: Path) -> None:
    edit = Edit("clamp-neurons", (), clamps=(Clamp(0, torch.tensor([0]), torch.tensor([1.0]), 1.0, "dogs"),))
    with pytest.raises(BadInput, match="cannot be written"):
        save_edit(edit, tmp_path / "edit")
    checkpoint = open_checkpoint(save_tiny("llama", tmp_path / "m", tied=False, dtype=torch.float32))
    with pytest.raises(BadInput, match="cannot be written"):
        write_checkpoint(checkpoint, edit, tmp_path / "patched")
    with pytest.raises(BadInput, match="cannot be written"):
        write_adapter(checkpoint, edit, tmp_path / "adapter")
