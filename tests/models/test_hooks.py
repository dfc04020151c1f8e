"""What is recorded of a live model equals what the model computes, at the wanted positions and nowhere else."""

import pytest
import torch
from tiny_material import ABOUT, FREE, tokenised
from tiny_models import FAMILIES
from tiny_words import ids, tiny_model, tiny_tokenizer

from rotate_edit.errors import BadInput
from rotate_edit.models.batches import batched, log_probabilities
from rotate_edit.models.hooks import layer_modules, record, recorded


def test_the_positions_before_the_concept_are_recorded():
    model = tiny_model(0)
    texts = ABOUT[:2]
    seen = record(model, tokenised(texts), [0, 1], ids("dog"))
    assert seen[1].neurons.shape == (3, 24)
    assert seen[1].residual.shape == (3, 16)
    # By hand: the second text alone, the position of "small".
    tokens = torch.tensor([tiny_tokenizer()(texts[1])["input_ids"]])
    kept = {}
    hook = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, seen: kept.update(h=seen[0]))
    with torch.no_grad():
        states = model(tokens, output_hidden_states=True).hidden_states
    hook.remove()
    first = seen[0]
    assert any(torch.allclose(row, kept["h"][0, 4], atol=1e-5) for row in first.neurons)
    assert any(torch.allclose(row, states[1][0, 4], atol=1e-5) for row in first.residual)


def test_every_position_of_other_text_is_recorded_without_padding():
    passages = tokenised([*FREE[:2], "bird"])
    assert len(record(tiny_model(0), passages, [0], None)[0].neurons) == passages.tokens()


def test_texts_without_the_tokens_give_no_positions():
    seen = record(tiny_model(0), tokenised(FREE), [0, 1], ids("dog"))
    assert [(len(part.neurons), len(part.residual)) for part in seen.values()] == [(0, 0), (0, 0)]


def test_no_hook_is_left():
    model = tiny_model(0)
    record(model, tokenised(ABOUT), [0, 1], ids("dog"))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(KeyError), recorded(model, [0, 1]):
        raise KeyError
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_each_pass_replaces_what_the_one_before_left():
    model, texts = tiny_model(0), batched([[3, 4, 5], [6, 7, 8]], 22)
    alone = record(model, batched([[6, 7, 8]], 22), [1], None)[1]
    with recorded(model, [1]) as kept:
        for _ in log_probabilities(model, texts):
            both = kept[1]["residual"]
        for _ in log_probabilities(model, batched([[6, 7, 8]], 22)):
            assert kept[1]["residual"].shape != both.shape
    torch.testing.assert_close(kept[1]["residual"][0], alone.residual, atol=1e-6, rtol=1e-5)


def test_a_mixture_of_experts_is_refused_and_its_dense_layer_is_not():
    model = FAMILIES["qwen3_moe-dense-layer"].build(tied=False)
    last, block = layer_modules(model, 0)
    assert last is model.model.layers[0].mlp.down_proj
    assert block is model.model.layers[0]
    with pytest.raises(BadInput, match="mixtures of experts"):
        layer_modules(model, 1)
    with pytest.raises(BadInput, match="mixtures of experts"):
        record(model, batched([[3, 4, 5]], 96), [0, 1], None)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
