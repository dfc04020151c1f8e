"""Tables that vectors are projected on follow the rules, and the tokens that count are those of the vocabulary."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_checkpoint import VOCABULARY, write_checkpoint
from tiny_material import word_checkpoint
from tiny_words import WORDS, tiny_tokenizer

from rotate_edit.errors import BadInput
from rotate_edit.models.checkpoint import open_checkpoint, read_embedding, read_norm, read_unembedding
from rotate_edit.vocabulary.projection import (
    Projections,
    Vocabulary,
    VocabularyRules,
    first_unembedding_layer,
    mask_from_json,
    mask_to_json,
    projection_names,
    read_projections,
    read_vocabulary,
)
from rotate_edit.vocabulary.tokens import frequency_direction, token_weights


def vocabulary(**rules: Any) -> Vocabulary:
    ignored = torch.zeros(VOCABULARY, dtype=torch.bool)
    ignored[:5] = True
    settings = VocabularyRules(**{"words_only": False, "ignore_undertrained": False} | rules)
    return Vocabulary(settings, tuple(f" t{index}" for index in range(VOCABULARY)), ignored, torch.zeros_like(ignored))


def test_projections_follow_the_rules(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "untied", tied=False))
    embedding, unembedding = read_embedding(checkpoint), read_unembedding(checkpoint)

    def projected(**rules: Any) -> Projections:
        return read_projections(checkpoint, vocabulary(**rules))

    # The neurons of this checkpoint are made of embedding rows, and that is what is found in the weights.
    for rule in ("embedding", "auto"):
        assert torch.equal(projected(projection=rule, remove_frequency=False).of(0, "out")[0], embedding)
    assert projected(projection=1).names == ("embedding", "unembedding")
    chosen = projected(projection="unembedding")
    ignored = vocabulary().ignored
    table, weights = chosen.of(1, "gate")
    assert torch.equal(table, unembedding)
    assert torch.equal(weights, token_weights(unembedding, ignored=ignored))
    folded = projected(projection="unembedding", fold_norm=True, centred=True)
    gain = read_norm(checkpoint, ("mlp", 1))
    assert gain is not None
    table, weights = folded.of(1, "in")
    assert torch.allclose(table, unembedding * gain - (unembedding * gain).mean(0), atol=1e-5)
    assert torch.equal(weights == 0, ignored)
    for rule in ("both", 3, -1):
        with pytest.raises(BadInput, match="projection"):
            projected(projection=rule)


def test_the_frequency_direction_is_taken_out_of_tables_and_vectors_see_nothing_of_it(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "model"))
    words = vocabulary()
    untrained = torch.arange(VOCABULARY) >= 380
    words = Vocabulary(words.rules, words.texts, words.ignored, untrained)
    table, weights = read_projections(checkpoint, words).of(0, "out")
    whole = read_unembedding(checkpoint)
    axis = frequency_direction(whole, untrained)
    assert axis is not None
    assert float((table @ axis).abs().max()) < 1e-5
    # What is orthogonal to the direction is as it was.
    torch.testing.assert_close(table, whole - torch.outer(whole @ axis, axis))
    assert torch.equal(weights, token_weights(table, ignored=words.ignored))
    left_in = Vocabulary(VocabularyRules(remove_frequency=False), words.texts, words.ignored, untrained)
    assert torch.equal(read_projections(checkpoint, left_in).of(0, "out")[0], whole)


def test_the_first_layer_on_the_unembedding(tmp_path: Path) -> None:
    untied = open_checkpoint(write_checkpoint(tmp_path / "untied", tied=False))
    assert [first_unembedding_layer(untied, rule) for rule in ("unembedding", "embedding", 1, 2)] == [0, 2, 1, 2]
    assert projection_names(untied, "embedding") == ("embedding", "embedding")
    tied = open_checkpoint(write_checkpoint(tmp_path / "tied"))
    assert [first_unembedding_layer(tied, rule) for rule in ("auto", "embedding", 1)] == [0, 0, 0]
    # "auto" is replaced by a layer when the vocabulary is read, so that everything takes the same one.
    words = word_checkpoint(tmp_path / "words", tied=True)
    rules = VocabularyRules(words_only=False)
    assert read_vocabulary(words, rules, tiny_tokenizer()).rules.projection == 0


def test_tokens_that_do_not_count_are_special_or_beyond_the_tokenizer(tmp_path: Path) -> None:
    checkpoint = word_checkpoint(tmp_path / "m")
    tokenizer = tiny_tokenizer()
    found = read_vocabulary(checkpoint, VocabularyRules(words_only=False, ignore_undertrained=False), tokenizer)
    assert found.ignored.nonzero()[:, 0].tolist() == [WORDS.index("<pad>"), WORDS.index("<bos>")]
    assert found.texts == tuple(WORDS)
    assert len(read_vocabulary(checkpoint, VocabularyRules(words_only=False), tokenizer).untrained) == len(WORDS)


def test_masks_survive_json_and_damage_is_refused() -> None:
    mask = torch.rand(777, generator=torch.Generator().manual_seed(0)) < 0.3
    entry = json.loads(json.dumps(mask_to_json(mask)))
    assert torch.equal(mask_from_json(entry), mask)
    assert entry["true"] == int(mask.sum())
    for damage in ({"size": 776}, {"sha256": "0" * 64}, {"zlib": "!"}, {"zlib": entry["zlib"][4:]}, {"size": "a"}):
        with pytest.raises(BadInput, match="mask"):
            mask_from_json(entry | damage)
