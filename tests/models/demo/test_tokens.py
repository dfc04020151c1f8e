"""The tokenizer learned from the corpus."""

import pytest

from rotate_edit.models.demo.corpus import documents
from rotate_edit.models.demo.tokens import encode_documents, single_token_share, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer((d.text for d in documents("tokens", 500)), 1_000, 128)


def test_texts_survive_the_round_trip(tokenizer):
    texts = [d.text for d in documents("round trip", 50)] + ["Ünïcode ☃ and\ttabs"]
    rows = encode_documents(tokenizer, texts)
    for text, row in zip(texts, rows, strict=True):
        assert row[0] == tokenizer.bos_token_id
        assert row[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(row, skip_special_tokens=True) == text


def test_the_vocabulary_has_the_size_asked_for_and_three_special_tokens(tokenizer):
    assert len(tokenizer) == 1_000
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert len(special) == 3


def test_training_twice_gives_the_same_tokens(tokenizer):
    again = train_tokenizer((d.text for d in documents("tokens", 500)), 1_000, 128)
    assert again.get_vocab() == tokenizer.get_vocab()


def test_single_token_share(tokenizer):
    assert single_token_share(tokenizer, ["the", "xylophonequark"]) == 0.5


def test_no_texts_give_no_rows(tokenizer):
    assert encode_documents(tokenizer, []) == []
