"""Channels with a planted truth: what is taken out must be missed where it was, and nowhere else."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_edits import channel
from tiny_words import ids, tiny_model, tiny_tokenizer

from rotate_edit.errors import BadInput, Failure
from rotate_edit.evaluation import faithfulness as faithful
from rotate_edit.models import batches

TEXTS = [f"{a} {b} {c} the {d}" for a in ("the", "a") for b in ("dog", "cat", "bird", "big") for c in ("saw", "ate")
         for d in ("dog", "cat", "mat", "tree")]  # fmt: skip


def planted():
    """A model whose layer-0 neuron 3 reads dogs and birds, and writes cats and trees, each as its own direction."""
    model = tiny_model(0)
    with torch.no_grad():
        # Without attention the MLP of layer 0 reads the token's own normalised embedding.
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        embedding.copy_(
            torch.linalg.qr(torch.randn(22, 16, generator=torch.Generator().manual_seed(1)).T).Q.T.repeat(2, 1)[:22]
        )
        embedding[ids("dog", "bird", "cat", "saw", "the", "a", "ate", "big", "mat", "tree")] = torch.eye(16)[:10]
        reads = {name: embedding[ids(name)[0]].detach().clone() for name in ("dog", "bird")}
        for matrix in ("gate_proj", "up_proj"):
            getattr(model.model.layers[0].mlp, matrix).weight[3] = reads["dog"] + reads["bird"]
        writes = {name: (head[ids(name)[0]] / head[ids(name)[0]].norm()).detach() for name in ("cat", "tree")}
        model.model.layers[1].mlp.down_proj.weight[:, 3] = writes["cat"] + writes["tree"]
    return model, reads, writes


def test_a_planted_reading_channel_is_faithful_and_the_controls_are_not():
    model, reads, _ = planted()
    both = [
        channel("in", ("dog",), reads["dog"] * 2**0.5, 0),
        channel("in", ("bird",), reads["bird"] * 2**0.5, 1),
    ]
    first, second = faithful.faithfulness(model, tiny_tokenizer(), both, TEXTS)
    for trial in (first, second):
        assert trial.where == "at"
        assert trial.before > 1
        # The response to its own token is gone (but for the other's share in the mean), and none of the other's.
        assert trial.own["channel"] == pytest.approx(trial.before, rel=0.15)
        assert trial.others["channel"] < 0.2 * trial.own["channel"]
        assert trial.own["other channel"] < 0.2 * trial.own["channel"]
        assert trial.others["other channel"] > 1
        assert abs(trial.selectivity("random direction")) < 0.6 * trial.selectivity("channel")
        assert abs(trial.selectivity("other neuron")) < 0.6 * trial.selectivity("channel")
        assert trial.activation_own["channel"] > 3 * trial.activation_others["channel"]
    rows = faithful.table([first, second])
    assert [row["condition"] for row in rows] == list(faithful.CONDITIONS)
    assert all(row["wins"]["value"] == 1 for row in rows[1:])
    json.dumps([rows, faithful.plain_trials([first])], allow_nan=False)


def test_a_reading_channel_of_the_negative_side_counts_alike():
    model, reads, _ = planted()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3] = reads["dog"] - reads["bird"]
    both = [
        channel("in", ("dog",), reads["dog"] * 2**0.5, 0),
        channel("in", ("bird",), reads["bird"] * 2**0.5, 1, sign=-1),
    ]
    for trial in faithful.faithfulness(model, tiny_tokenizer(), both, TEXTS):
        assert trial.own["channel"] == pytest.approx(trial.before, rel=0.15)
        assert trial.before > 1


def test_a_planted_writing_channel_is_faithful_and_the_controls_are_not():
    model, _, writes = planted()
    both = [
        channel("out", ("cat",), writes["cat"] * 2**0.5, 0, layer=1),
        channel("out", ("tree",), writes["tree"] * 2**0.5, 1, layer=1),
    ]
    trials = faithful.faithfulness(model, tiny_tokenizer(), both, TEXTS, prompts=["the dog saw", "a big"])
    for trial in trials:
        assert (trial.where, trial.places) == ("after prompts", 2)
        assert trial.own["channel"] > 0.5
        for control in faithful.CONDITIONS[1:]:
            assert trial.selectivity("channel") > trial.selectivity(control)


def test_activations_are_what_the_model_computes():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=22,
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=1,
        eos_token_id=1,
        initializer_range=0.3,
    )
    ungated = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for block in ungated.transformer.h:
            block.mlp.c_fc.bias.normal_()
    for model, name in ((tiny_model(0), "model.layers.{}.mlp.down_proj"), (ungated, "transformer.h.{}.mlp.c_proj")):
        passages = batches.tokenise(tiny_tokenizer(), TEXTS[:5], vocabulary_size=22)
        activity = faithful.read_activity(model, passages, [0, 1])
        for layer in (0, 1):
            seen = []
            module = model.get_submodule(name.format(layer))
            handle = module.register_forward_pre_hook(lambda _, values, seen=seen: seen.append(values[0]))
            list(batches.log_probabilities(model, passages))
            handle.remove()
            expected = torch.cat([part.reshape(-1, part.shape[-1]) for part in seen])
            for neuron in (0, 7, 20):
                found = faithful.activations(model, layer, neuron, activity.inputs[layer])
                assert torch.allclose(found, expected[:, neuron], atol=1e-5)


def test_activity_knows_the_following_token():
    passages = batches.tokenise(tiny_tokenizer(), ["the dog ran", "a cat"], vocabulary_size=22)
    activity = faithful.read_activity(tiny_model(0), passages, [0])
    assert activity.tokens.tolist() == ids("the", "dog", "ran", "a", "cat").tolist()
    assert activity.following.tolist() == [*ids("dog", "ran").tolist(), -1, *ids("cat").tolist(), -1]


def test_promotion_adds_to_the_mlps_output_at_the_last_position():
    model = tiny_model(0)
    tokens = tiny_tokenizer()(TEXTS[0])["input_ids"]
    added = torch.randn(3, 16, generator=torch.Generator().manual_seed(2))
    seen = []
    handle = model.model.layers[1].register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        plain = model(torch.tensor([tokens])).logits[0, -1]
    handle.remove()
    stream = (seen[0][0] if isinstance(seen[0], tuple) else seen[0])[0, -1]
    with torch.no_grad():
        moved = model.lm_head(model.model.norm(stream + added)) - plain
    moved = moved - moved.mean(1, keepdim=True)
    expected = moved[:, ids("dog", "cat")].mean(1) / moved[0].std()
    prompts = batches.tokenise(tiny_tokenizer(), [TEXTS[0]], vocabulary_size=22)
    found = faithful.promotion(model, 1, added, prompts, [ids("dog", "cat").tolist()])
    assert torch.allclose(found[:, 0], expected, atol=1e-4)


vectors = st.lists(st.floats(-3, 3), min_size=6, max_size=6).map(torch.tensor).filter(lambda v: v.norm() > 0.1)


@given(vectors, vectors, st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_what_is_taken_out_is_out_and_random_directions_keep_the_angle(vector, direction, seed):
    left = faithful.without(vector, direction)
    assert abs(float(left @ direction)) <= 1e-4 * float(vector.norm() * direction.norm())
    assert torch.allclose(faithful.without(left, direction), left, atol=1e-4)
    assert torch.allclose(faithful.without(vector, 3 * direction), left, atol=1e-4)
    drawn = faithful.random_at_same_angle(vector, direction, torch.Generator().manual_seed(seed))
    cosine = torch.nn.functional.cosine_similarity(vector, direction, dim=0)
    assert float(drawn.norm()) == pytest.approx(1, abs=1e-3)
    assert float(drawn @ vector / vector.norm()) == pytest.approx(float(cosine), abs=1e-3)


def test_what_cannot_be_tested_is_named():
    model = tiny_model(0)
    alone = [channel("in", ("dog",), torch.randn(16), 0)]
    with pytest.raises(Failure, match="second channel"):
        faithful.faithfulness(model, tiny_tokenizer(), alone, TEXTS)
    with pytest.raises(BadInput, match="without vectors"):
        faithful.faithfulness(model, tiny_tokenizer(), [channel("in", ("dog",), None, 0)], TEXTS)
    with pytest.raises(BadInput, match="router"):
        faithful.faithfulness(model, tiny_tokenizer(), [channel("in", ("dog",), torch.ones(16), 0, expert=1)], TEXTS)
    rare = [channel("in", ("fish",), torch.randn(16), 0), channel("in", ("dog",), torch.randn(16), 1)]
    with pytest.raises(Failure, match="no channel could be tested"):
        faithful.faithfulness(model, tiny_tokenizer(), rare, TEXTS)


def test_the_figure_has_a_panel_a_matrix():
    model, reads, _ = planted()
    both = [channel("in", ("dog",), reads["dog"], 0), channel("in", ("bird",), reads["bird"], 1)]
    drawn = faithful.figure(faithful.table(faithful.faithfulness(model, tiny_tokenizer(), both, TEXTS)))
    assert len(drawn.axes) == 1
    assert "in: response lost" in drawn.axes[0].get_title()
