"""Gradients of a text's likelihood: what a small step along them does, and nothing left behind."""

from pathlib import Path

import pytest
import torch
from tiny_material import ABOUT, tokenised, word_checkpoint
from tiny_models import FAMILIES, save_tiny
from tiny_words import ids

from rotate_edit.errors import BadInput
from rotate_edit.models.batches import batched, log_probabilities, real_positions
from rotate_edit.models.checkpoint import load_model, open_checkpoint
from rotate_edit.models.gradients import likelihood_gradients
from rotate_edit.models.layout import neuron_rows
from rotate_edit.models.parameters import live_parameter


def mean_likelihood(model, passages, skip=()) -> float:  # type: ignore[no-untyped-def]
    total, counted = 0.0, 0
    for predicted, batch, lengths in zip(
        log_probabilities(model, passages), passages.batches, passages.lengths, strict=True
    ):
        real = real_positions(batch, lengths)
        for row, length in enumerate(real.sum(1).tolist()):
            for place in range(1, length):
                token = int(batch[row, place])
                if token not in skip:
                    total += float(predicted[row, place - 1, token])
                    counted += 1
    return total / counted


@pytest.mark.parametrize("family", [*FAMILIES])
def test_a_step_along_a_gradient_raises_the_likelihood_by_its_square(family: str, tmp_path: Path) -> None:
    """In every family and every kind of matrix, fused, stacked or transposed; the padding does not count."""
    checkpoint = open_checkpoint(save_tiny(family, tmp_path / "m", tied=False, dtype=torch.float32))
    model = load_model(checkpoint, dtype=torch.float32)
    texts = batched([[3, 17, 40, 5, 95, 1, 60, 33], [8, 9, 50], [7]], 96)
    experts = checkpoint.experts_in(1)
    names = [(matrix, 1, None if experts is None else 0) for matrix in checkpoint.matrices]
    gradients = likelihood_gradients(model, texts, names)
    before = mean_likelihood(model, texts)
    for name, gradient in gradients.items():
        parameter, place = live_parameter(model, *name)
        rows = neuron_rows(parameter.data, place, name[2])
        assert gradient.shape == rows.shape
        squared = float(gradient.square().sum())
        step = 2e-3 / max(squared**0.5, 1e-12)
        found = []
        for sign in (1, -1):
            rows += sign * step * gradient
            found.append(mean_likelihood(model, texts))
            rows -= sign * step * gradient
        assert (found[0] - found[1]) / (2 * step) == pytest.approx(squared, rel=0.02, abs=2e-6 / step)
    assert mean_likelihood(model, texts) == pytest.approx(before, abs=1e-5)


def test_words_that_are_skipped_do_not_count_and_nothing_stays_behind(tmp_path: Path) -> None:
    checkpoint = word_checkpoint(tmp_path / "m")
    model = load_model(checkpoint)
    next(model.parameters()).requires_grad_(False)
    before = [(p.requires_grad, p.detach().clone()) for p in model.parameters()]
    name, skip = ("out", 1, None), ids("dog", "cat")
    (gradient,) = likelihood_gradients(model, tokenised(ABOUT), [name], skip=skip).values()
    for parameter, (wanted, values) in zip(model.parameters(), before, strict=True):
        assert parameter.grad is None
        assert parameter.requires_grad == wanted
        assert torch.equal(parameter, values)
    parameter, place = live_parameter(model, *name)
    base = mean_likelihood(model, tokenised(ABOUT), skip.tolist())
    rows, step = neuron_rows(parameter.data, place), 1e-3 / float(gradient.norm())
    rows += step * gradient
    raised = mean_likelihood(model, tokenised(ABOUT), skip.tolist()) - base
    assert raised == pytest.approx(step * float(gradient.square().sum()), rel=0.05)
    with pytest.raises(BadInput, match="no token to read a gradient of"):
        likelihood_gradients(model, tokenised(["dog cat"]), [name], skip=skip)
    with pytest.raises(BadInput, match='no matrix "gates"'):
        likelihood_gradients(model, tokenised(ABOUT), [("gates", 1, None)])


def test_a_bfloat16_model_has_the_gradients_of_the_float32_one_but_for_its_rounding(tmp_path: Path) -> None:
    checkpoint = word_checkpoint(tmp_path / "m")
    name = ("gate", 0, None)
    exact, coarse = (
        likelihood_gradients(load_model(checkpoint, dtype=dtype), tokenised(ABOUT), [name])[name]
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert coarse.dtype == torch.float32
    assert float((coarse - exact).norm() / exact.norm()) < 0.05
