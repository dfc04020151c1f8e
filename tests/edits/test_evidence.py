"""What is read from a live model equals what the model computes, and planted concepts are told from other text."""

import pytest
import torch
from tiny_words import WORDS, ids, tiny_model, tiny_tokenizer

from rotate_edit.edits.evidence import evidence_about, gather_evidence
from rotate_edit.errors import BadInput
from rotate_edit.evaluation.tasks import Items
from rotate_edit.models import batches
from rotate_edit.models.hooks import record

ABOUT = ["the dog ran under a big dog", "a cat saw the small dog"]
FREE = ["the bird sat on the mat", "it was big and then it ate"]


def tokenised(texts):
    return batches.tokenise(tiny_tokenizer(), texts, vocabulary_size=len(WORDS))


def test_the_positions_before_the_concept_are_recorded():
    model = tiny_model(0)
    seen = record(model, tokenised(ABOUT), [0, 1], ids("dog"))
    assert seen[1].neurons.shape == (3, 24)
    assert seen[1].residual.shape == (3, 16)
    # By hand: the second text alone, the position of "small".
    tokens = torch.tensor([tiny_tokenizer()(ABOUT[1])["input_ids"]])
    kept = {}
    hook = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, seen: kept.update(h=seen[0]))
    with torch.no_grad():
        states = model(tokens, output_hidden_states=True).hidden_states
    hook.remove()
    first = seen[0]
    assert any(torch.allclose(row, kept["h"][0, 4], atol=1e-5) for row in first.neurons)
    assert any(torch.allclose(row, states[1][0, 4], atol=1e-5) for row in first.residual)


def test_every_position_of_other_text_is_recorded_without_padding():
    passages = tokenised([*FREE, "bird"])
    assert len(record(tiny_model(0), passages, [0], None)[0].neurons) == passages.tokens()


def test_the_evidence_is_the_difference_of_the_means():
    model = tiny_model(0)
    concept, others = tokenised(ABOUT), tokenised(FREE)
    found = gather_evidence(model, concept, others, ids("dog"), [0, 1], features=4)
    own, rest = record(model, concept, [1], ids("dog"))[1], record(model, others, [1], None)[1]
    torch.testing.assert_close(found[1].difference, own.residual.mean(0) - rest.residual.mean(0))
    torch.testing.assert_close(found[1].activation, own.neurons.abs().mean(0))
    assert found[1].feature is not None
    assert found[1].feature.shape == (24,)
    assert gather_evidence(model, concept, others, ids("dog"), [0])[0].feature is None


def test_no_hook_is_left():
    model = tiny_model(0)
    record(model, tokenised(ABOUT), [0, 1], ids("dog"))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_texts_without_the_concept_are_refused():
    with pytest.raises(BadInput, match="none of the concept's tokens"):
        gather_evidence(tiny_model(0), tokenised(FREE), tokenised(FREE), ids("dog"), [0])
    nothing = Items("none", (), {"validation": ()}, (), (), {})
    with pytest.raises(BadInput, match="no texts to choose on with and without dogs"):
        evidence_about("dogs", ids("dog"), tiny_model(0), tiny_tokenizer(), nothing, [0], token_limit=100)
