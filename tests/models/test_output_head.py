"""The output head: what it predicts and how it moves are what the whole model does, for every dense family."""

from dataclasses import replace

import pytest
import torch
from tiny_models import FAMILIES

from rotate_edit.edits.apply import applied
from rotate_edit.edits.edit import Edit, MatrixChange
from rotate_edit.errors import BadInput
from rotate_edit.models.batches import batched, log_probabilities, real_positions
from rotate_edit.models.output_head import output_head_of, positions
from rotate_edit.models.parameters import live_parameter

MIXTURES = ("mixtral", "qwen3_moe", "qwen3_moe-dense-layer", "olmoe")
TEXTS = batched([[5, 9, 2, 7, 30, 11], [8, 3, 4]], 96)


def predicted(model):
    """The model's own log-probabilities at every real position."""
    rows = [
        values[real_positions(batch, lengths)]
        for values, batch, lengths in zip(log_probabilities(model, TEXTS), TEXTS.batches, TEXTS.lengths)
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in MIXTURES])
def test_the_head_predicts_what_the_model_does_with_and_without_a_change(family):
    torch.manual_seed(3)
    model = FAMILIES[family].build(tied=False).float().eval()
    seen, head = positions(model, TEXTS), output_head_of(model)
    torch.testing.assert_close(head.log_probabilities(seen.residual), predicted(model), rtol=1e-5, atol=1e-5)
    last = model.config.get_text_config().num_hidden_layers - 1
    neurons, width = seen.neurons.shape[1], seen.residual.shape[1]
    left, right = torch.randn(neurons, 2), torch.randn(2, width)
    change = MatrixChange("out", last, None, torch.arange(neurons), left, right, 1.0, "test")
    moved = head.log_probabilities(head.moved(seen, seen.neurons @ left @ right))
    with applied(model, Edit("test", (change,))):
        after = predicted(model)
    assert float((after - predicted(model)).abs().max()) > 0.01
    torch.testing.assert_close(moved, after, rtol=1e-4, atol=1e-4)


def test_a_cap_on_the_logits_is_the_models_own():
    torch.manual_seed(3)
    model = FAMILIES["gemma2"].build(tied=True).float().eval()
    model.config.final_logit_softcapping = 0.05
    head, seen = output_head_of(model), positions(model, TEXTS)
    torch.testing.assert_close(head.log_probabilities(seen.residual), predicted(model), rtol=1e-5, atol=1e-5)


def test_positions_of_a_choice_keep_their_columns_together():
    model = FAMILIES["gemma2"].build(tied=True).float().eval()
    seen = positions(model, TEXTS)
    chosen = seen.at(torch.tensor([4, 1]))
    assert torch.equal(chosen.neurons, seen.neurons[[4, 1]])
    assert torch.equal(chosen.residual, seen.residual[[4, 1]])
    assert chosen.written is not None
    assert torch.equal(chosen.written, seen.written[[4, 1]])
    assert replace(seen, written=None).at(torch.tensor([0])).written is None


def test_a_mixture_of_experts_is_refused():
    model = FAMILIES["mixtral"].build(tied=False)
    with pytest.raises(BadInput, match="mixture"):
        output_head_of(model)


def test_the_model_is_left_as_it_was():
    model = FAMILIES["llama"].build(tied=True).to(torch.bfloat16).eval()
    parameter, _ = live_parameter(model, "out", 1)
    before = parameter.detach().clone()
    head = output_head_of(model)
    assert head.log_probabilities(positions(model, TEXTS).residual).dtype == torch.float32
    assert parameter.dtype == torch.bfloat16
    assert parameter.requires_grad
    assert torch.equal(parameter, before)
    assert not model.model.norm._forward_pre_hooks
