"""Words to tokens: on a tokenizer built here, byte-level and SentencePiece-like."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerFast

from rotate_edit.channels.channel_set import Channel
from rotate_edit.channels.locate import concept_share
from rotate_edit.errors import BadInput
from rotate_edit.vocabulary.concept import find_tokens, group_tokens, plural, token_texts


def tokenizer(*words: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in which exactly the given strings (and every byte) are tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: place for place, character in enumerate(alphabet)}
    merges: list[tuple[str, str]] = []
    for word in words:
        piece = "".join(pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(word)[0][0])
        built = piece[0]
        for character in piece[1:]:
            if built + character not in vocabulary:
                vocabulary[built + character] = len(vocabulary)
                merges.append((built, character))
            built += character
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def test_leading_space_capital_and_plural_are_followed() -> None:
    made = tokenizer(" dog", " Dog", "Dog", " dogs", "dog", " cat")
    texts = token_texts(made)
    found = find_tokens("dogs", ["dog"], made, texts, plurals=True)
    assert {texts[index] for index in found.ids} == {" dog", " Dog", "Dog", " dogs"}
    assert found.warnings == ()
    assert found.ids.tolist() == sorted(found.ids.tolist())


def test_without_plurals_the_plural_is_not_followed() -> None:
    made = tokenizer(" dog", " dogs")
    texts = token_texts(made)
    assert {texts[i] for i in find_tokens("d", ["dog"], made, texts).ids} == {" dog"}


def test_a_split_word_is_followed_by_its_first_token_when_that_begins_few_words() -> None:
    made = tokenizer(" zeb", " zebu")
    texts = token_texts(made)
    found = find_tokens("zebras", ["zebra"], made, texts)
    assert [texts[i] for i in found.ids] == [" zeb"]
    assert len(found.warnings) == 1
    assert "'zebra'" in found.warnings[0]
    assert "first token" in found.warnings[0]


def test_a_split_word_is_left_out_when_its_first_token_begins_many_words() -> None:
    made = tokenizer(" pul", *[f" pul{ending}" for ending in ("l", "p", "e", "s", "a", "i")], " dog")
    texts = token_texts(made)
    found = find_tokens("p", ["pulk", "dog"], made, texts)
    assert found.left_out == ("pulk",)
    assert [texts[i] for i in found.ids] == [" dog"]
    assert "left out" in found.warnings[0]


def test_the_run_stops_when_no_word_is_left() -> None:
    made = tokenizer(" dog")
    with pytest.raises(BadInput, match="none of its words"):
        find_tokens("x", ["qqq"], made, token_texts(made))


def test_a_phrase_is_followed_by_its_first_word_only_when_it_is_rare() -> None:
    made = tokenizer(" ice", " cream")
    texts = token_texts(made)
    found = find_tokens("food", ["ice cream"], made, texts)
    assert [texts[i] for i in found.ids] == [" ice"]
    assert "'ice cream'" in found.warnings[0]


def test_pieces_beyond_ascii_are_decoded() -> None:
    texts = token_texts(tokenizer(" café"))
    assert " café" in texts


@pytest.mark.parametrize(
    ("word", "many"), [("dog", "dogs"), ("wolf", "wolves"), ("puppy", "puppies"), ("bush", "bushes")]
)
def test_plurals(word: str, many: str) -> None:
    assert plural(word) == many


def test_concept_share_counts_the_strongest_tokens_only() -> None:
    channel = Channel(0, None, 1, "out", 0, 1, (5, 6, 7, 8), ("a", "b", "c", "d"), (9, 8, 7, 6), 1, 1, 1, 0, 2, 4)
    assert concept_share(channel, frozenset({5, 8}), 2) == 0.5
    assert concept_share(channel, frozenset({5, 8}), 4) == 0.5
    assert concept_share(channel, frozenset({9}), 4) == 0.0


def test_tokens_that_point_the_same_way_are_one_group() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.eye(32)[0], torch.eye(32)[1]
    noise = 0.05 * torch.randn(7, 32, generator=generator)
    rows = torch.stack([first] * 4 + [second] * 3) * torch.tensor([1.0, 2, 3, 4, 5, 6, 7])[:, None] + noise
    groups = group_tokens(rows, torch.tensor([10, 11, 12, 13, 20, 21, 22]), 0.5)
    assert [group.tolist() for group in groups] == [[10, 11, 12, 13], [20, 21, 22]]
    assert [group.tolist() for group in group_tokens(rows, torch.arange(7), 2.0)] == [list(range(7))]
    assert [group.tolist() for group in group_tokens(rows[:1], torch.tensor([3]), 0.5)] == [[3]]
