"""A pass that starts at a later layer gives the same numbers, bit for bit, in every family."""

import pytest
import torch
from tiny_models import FAMILIES

from rotate_edit.models import batches
from rotate_edit.models.batches import batched, head_inputs, next_logits, real_positions
from rotate_edit.models.output_head import predictions
from rotate_edit.models.resume import block_of, entering, resumed

TEXTS = batched([[5, 6, 7, 8, 9], [3, 4, 5], [10, 11, 12, 13, 14, 15, 16, 17], [2]], 96, tokens_at_once=16)


def whole(model, passages=TEXTS):
    return list(next_logits(model, passages))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_from_the_last_layer_equals_the_whole_pass(family) -> None:
    model = FAMILIES[family].build(tied=False)
    plain = whole(model)
    later = TEXTS.starting_at(1)
    later.kept.clear()
    # The first pass keeps what enters the layer, the second starts there.
    for _ in range(2):
        assert all(torch.equal(one, other) for one, other in zip(whole(model, later), plain, strict=True))
    assert len(later.kept) == len(later.batches) > 1
    with torch.no_grad():
        for parameter in block_of(model, 1).parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(one, other) for one, other in zip(whole(model, later), whole(model), strict=True))
    assert not torch.equal(whole(model)[0], plain[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_predictions_at_some_positions_equal_those_of_the_whole_pass(family) -> None:
    model = FAMILIES[family].build(tied=False)
    wanted = [real_positions(batch, lengths) for batch, lengths in zip(TEXTS.batches, TEXTS.lengths)]
    wanted[-1][:] = False
    for logits, pieces, chosen in zip(whole(model), predictions(model, TEXTS, wanted), wanted, strict=True):
        found = [values for _, values in pieces]
        expected = logits[chosen].log_softmax(-1)
        assert len(expected) == sum(len(values) for values in found)
        if found:
            torch.testing.assert_close(torch.cat(found), expected, rtol=1e-5, atol=1e-5)


def test_the_blocks_below_are_not_computed_and_are_as_before_afterwards() -> None:
    model = FAMILIES["llama"].build(tied=True)
    calls = []
    with torch.no_grad(), entering(model, 1) as found:
        model(TEXTS.batches[0], use_cache=False)
    with block_of(model, 0).mlp.register_forward_hook(lambda *_: calls.append(1)):
        with torch.no_grad(), resumed(model, 1, found[0]):
            model(TEXTS.batches[0], use_cache=False)
        assert not calls
        with torch.no_grad():
            model(TEXTS.batches[0], use_cache=False)
        assert calls
    assert "forward" not in block_of(model, 0).__dict__


def test_no_more_than_what_has_room_is_kept(monkeypatch) -> None:
    model = FAMILIES["llama"].build(tied=True)
    texts = batched([[5, 6, 7], [8, 9]], 96, tokens_at_once=4)
    monkeypatch.setattr(batches, "BYTES_KEPT", 3 * 32 * 4)
    later = texts.starting_at(1)
    plain = whole(model, texts)
    for _ in range(2):
        assert all(torch.equal(one, other) for one, other in zip(whole(model, later), plain, strict=True))
    assert list(later.kept) == [(1, 0)]


def test_the_head_reads_one_position_of_a_pass_for_what_it_reads() -> None:
    model = FAMILIES["llama"].build(tied=True)
    sizes = []
    with model.get_output_embeddings().register_forward_hook(lambda _m, _i, output: sizes.append(output.numel())):
        read = list(head_inputs(model, TEXTS))
    assert sizes == [96] * len(TEXTS.batches)
    assert [tuple(one.shape[:2]) for one in read] == [tuple(batch.shape) for batch in TEXTS.batches]
