"""Texts in batches: every token once, padding never looked at, and predictions that do not depend on the batches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_words import WORDS, tiny_model, tiny_tokenizer

from rotate_edit.errors import BadInput
from rotate_edit.models.batches import (
    CELLS_IN_A_BATCH,
    TOKENS_IN_A_BATCH,
    batched,
    first_texts,
    log_probabilities,
    next_logits,
    pass_through,
    real_positions,
    tokenise,
)

TEXTS = [
    "the dog ran",
    "a cat sat on the mat and then it was a big dog",
    "bird",
    "the small fish ate the dog under a tree",
    "it was big and it was small and the bird saw the cat",
]
ROWS = st.lists(st.lists(st.integers(0, 21), min_size=1, max_size=9), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def model():
    return tiny_model(0)


@given(rows=ROWS, tokens=st.integers(1, 60))
def test_every_text_is_in_one_row_of_one_batch(rows: list[list[int]], tokens: int) -> None:
    found = batched(rows, 22, tokens_at_once=tokens)
    assert sorted(torch.cat(found.order).tolist()) == list(range(len(rows)))
    assert found.texts == len(rows)
    assert found.tokens() == sum(map(len, rows))
    for batch, lengths, order in zip(found.batches, found.lengths, found.order, strict=True):
        assert batch.numel() <= tokens or len(batch) == 1
        # Longest first, so that no batch is wider than its first row.
        assert batch.shape[1] == int(lengths[0]) == int(lengths.max())
        for row, length, index in zip(batch.tolist(), lengths.tolist(), order.tolist(), strict=True):
            assert row == rows[index] + [0] * (batch.shape[1] - length)
            assert length == len(rows[index])


@given(rows=ROWS)
def test_real_positions_are_those_of_the_tokens(rows: list[list[int]]) -> None:
    found = batched(rows, 22)
    for batch, lengths, order in zip(found.batches, found.lengths, found.order, strict=True):
        tokens = batch[real_positions(batch, lengths)]
        assert tokens.tolist() == [token for index in order.tolist() for token in rows[index]]


def test_a_large_vocabulary_makes_batches_smaller() -> None:
    rows = [[1, 2, 3, 4]] * 64
    widest = batched(rows, CELLS_IN_A_BATCH // 16)
    assert max(batch.numel() for batch in widest.batches) == 16
    assert len(batched(rows, CELLS_IN_A_BATCH * 2).batches) == 64
    assert len(batched([[1] * 8] * (TOKENS_IN_A_BATCH // 8 + 1), 22).batches) == 2


def test_the_first_texts_are_taken_in_their_order() -> None:
    rows = [[3], [4, 5, 6], [7, 8], [9, 1, 2, 3]]
    for tokens, wanted in ((1, 1), (2, 2), (4, 2), (5, 3), (7, 4)):
        found = first_texts(batched(rows, 96), tokens, 96)
        assert found.texts == wanted
        read = {
            int(index): row[:length].tolist()
            for batch, lengths, order in zip(found.batches, found.lengths, found.order, strict=True)
            for row, length, index in zip(batch, lengths.tolist(), order, strict=True)
        }
        assert [read[index] for index in range(wanted)] == rows[:wanted]
    whole = batched(rows, 96)
    assert first_texts(whole, 10, 96) is whole


def test_token_limit_and_longest_text() -> None:
    tokenizer = tiny_tokenizer()
    some = tokenise(tokenizer, TEXTS, vocabulary_size=22, token_limit=4)
    assert some.texts == 2
    short = tokenise(tokenizer, TEXTS, vocabulary_size=22, longest=2)
    assert short.tokens() == 2 + 2 + 1 + 2 + 2
    with pytest.raises(BadInput, match="no text"):
        tokenise(tokenizer, ["", ""], vocabulary_size=22)
    with pytest.raises(BadInput, match="no text"):
        tokenise(tokenizer, [], vocabulary_size=22)


def by_text(model, passages) -> dict[int, torch.Tensor]:
    """Log-probabilities [length, V] of each text."""
    found = {}
    for values, lengths, order in zip(
        log_probabilities(model, passages), passages.lengths, passages.order, strict=True
    ):
        for row, length, index in zip(values, lengths.tolist(), order.tolist(), strict=True):
            found[index] = row[:length]
    return found


@given(st.permutations(range(len(TEXTS))), st.integers(1, 64))
@settings(max_examples=20, deadline=None)
def test_neither_the_order_of_texts_nor_the_batches_change_a_prediction(model, order, tokens) -> None:
    tokenizer = tiny_tokenizer()
    texts = [TEXTS[index] for index in order]
    passages = tokenise(tokenizer, texts, vocabulary_size=len(WORDS), tokens_at_once=tokens)
    found = by_text(model, passages)
    for index, text in enumerate(texts):
        with torch.no_grad():
            alone = model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0].log_softmax(-1)
        torch.testing.assert_close(found[index], alone, atol=1e-5, rtol=1e-5)


def test_a_pass_gives_the_batches_and_keeps_one_prediction_each(model) -> None:
    passages = tokenise(tiny_tokenizer(), TEXTS, vocabulary_size=len(WORDS), tokens_at_once=26)
    assert len(passages.batches) > 1
    assert all(one is other for one, other in zip(pass_through(model, passages), passages.batches, strict=True))
    last = list(next_logits(model, passages, logits_to_keep=1))
    whole = list(next_logits(model, passages))
    for one, other in zip(last, whole, strict=True):
        torch.testing.assert_close(one, other[:, -1:])
        assert not one.requires_grad
