"""Words to tokens: on a tokenizer built here, byte-level and SentencePiece-like."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerFast

from rotate_edit.channels.channel_set import Channel
from rotate_edit.channels.locate import concept_share
from rotate_edit.errors import BadInput
from rotate_edit.vocabulary.concept import (
    TokenSet,
    find_tokens,
    group_tokens,
    plural,
    sequence_positions,
    token_texts,
)


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


def told(found: TokenSet, texts: list[str]) -> dict[str, list[list[str]]]:
    return {word: [[texts[i] for i in one] for one in sequences] for word, sequences in found.sequences.items()}


def test_a_split_word_is_a_sequence_and_its_first_token_is_never_followed() -> None:
    made = tokenizer(" putt", " put", " golf", "er")
    texts = token_texts(made)
    found = find_tokens("golf", ["golf", "putter"], made, texts)
    assert [texts[i] for i in found.ids] == [" golf"]
    assert found.words == {"golf": (texts.index(" golf"),)}
    assert [" putt", "er"] in told(found, texts)["putter"]
    assert found.left_out == ()
    (warning,) = found.warnings
    assert warning.startswith("concept 'golf': 'putter' is split into ' putt' + 'er'; it is followed where")
    assert [(note.word, note.followed) for note in found.notes] == [("golf", "token"), ("putter", "sequence")]


def test_a_phrase_and_the_plural_are_sequences_too() -> None:
    made = tokenizer(" ice", " cream", " cone", "s")
    texts = token_texts(made)
    found = find_tokens("food", ["ice cream", "cone"], made, texts, plurals=True)
    assert [texts[i] for i in found.ids] == [" cone"]
    assert [" ice", " cream"] in told(found, texts)["ice cream"]
    assert [" cone", "s"] in told(found, texts)["cone"]
    assert found.every_sequence == tuple(dict.fromkeys([*found.sequences["ice cream"], *found.sequences["cone"]]))


def test_a_capitalised_token_of_a_split_word_is_a_name_and_not_followed() -> None:
    made = tokenizer(" Blanch", " bl", " dog", " Dog")
    texts = token_texts(made)
    assert [texts[i] for i in find_tokens("x", ["blanch", "dog"], made, texts).ids] == [" dog", " Dog"]
    assert [texts[i] for i in find_tokens("x", ["Blanch"], made, texts).ids] == [" Blanch"]


@pytest.mark.parametrize("word", ["高尔夫", "東京", "골프", "كلب"])
def test_a_script_without_case_takes_the_bare_token(word: str) -> None:
    made = tokenizer(word)
    texts = token_texts(made)
    found = find_tokens("x", [word], made, texts)
    assert [texts[i] for i in found.ids] == [word]
    assert found.warnings == ()


def test_a_token_that_ends_inside_a_character_is_never_followed() -> None:
    made = tokenizer(" dog")
    texts = token_texts(made)
    found = find_tokens("x", ["龍", "dog"], made, texts)
    assert [texts[i] for i in found.ids] == [" dog"]
    assert "".join(told(found, texts)["龍"][-1]) == "\ufffd" * 3
    assert "is split into 3 tokens, some of them parts of a character" in found.warnings[0]


def test_a_word_that_the_table_or_the_tokenizer_lacks_is_left_out_and_named() -> None:
    made = tokenizer(" dog", " cat")
    texts = token_texts(made)
    short = texts[: texts.index(" cat")]
    found = find_tokens("x", ["dog", "cat"], made, short)
    assert found.left_out == ("cat",)
    assert "'cat' is left out" in found.warnings[0]
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"[UNK]": 0, "dog": 1}, unk_token="[UNK]")), unk_token="[UNK]"
    )
    words.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    found = find_tokens("x", ["dog", "cat"], words, token_texts(words))
    assert (found.ids.tolist(), found.left_out) == ([1], ("cat",))


def test_the_run_stops_when_no_word_is_one_token() -> None:
    made = tokenizer(" dog")
    with pytest.raises(BadInput, match="none of its words"):
        find_tokens("x", ["qqq"], made, token_texts(made))
    assert not len(find_tokens("x", ["qqq"], made, token_texts(made), required=False).ids)


def naive_positions(
    rows: list[list[int]], lengths: list[int], sequences: list[tuple[int, ...]]
) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    last, before = set(), set()
    for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        for start in range(length):
            for sequence in sequences:
                if start + len(sequence) <= length and tuple(row[start : start + len(sequence)]) == sequence:
                    last.add((number, start + len(sequence) - 1))
                    if start:
                        before.add((number, start - 1))
    return last, before


@settings(deadline=None)
@given(st.data())
def test_sequences_are_found_as_by_a_naive_search(data: st.DataObject) -> None:
    width = data.draw(st.integers(1, 9))
    rows = data.draw(st.lists(st.lists(st.integers(0, 2), min_size=width, max_size=width), min_size=1, max_size=3))
    lengths = data.draw(st.lists(st.integers(1, width), min_size=len(rows), max_size=len(rows)))
    sequences = data.draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple), max_size=4))
    for given_lengths in (torch.tensor(lengths), None):
        ends = lengths if given_lengths is not None else [width] * len(rows)
        masks = sequence_positions(torch.tensor(rows), sequences, given_lengths)
        for mask, places in zip(masks, naive_positions(rows, ends, sequences), strict=True):
            assert {tuple(place) for place in mask.nonzero().tolist()} == places


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
