"""Words in the vocabularies of real models."""

import os
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rotate_edit.vocabulary.concept import find_tokens, token_texts
from rotate_edit.vocabulary.tokens import ends_inside_character, words_mask

pytestmark = pytest.mark.real

MODELS = Path(os.environ.get("ROTATE_EDIT_MODELS", "~/.cache/rotate-edit-models")).expanduser()
NAMES = ("smollm2", "gemma3", "qwen")
GOLF = "golf, golfer, golfing, putter, birdie, bogey, fairway, bunker, caddie, tee, putt, Ryder, PGA, handicap"
OTHERS = {
    "dogs": "dog, puppy, kennel, leash, terrier, spaniel, labrador, retriever, poodle, dachshund, collie, greyhound",
    "uranium": "uranium, plutonium, centrifuge, fission, isotope, yellowcake, fissile, hexafluoride, thorium",
    "Ancient Rome": "Rome, Caesar, legionary, gladiator, Colosseum, plebeian, Pompeii, Ancient Rome",
    "chess": "chess, checkmate, grandmaster, rook, stalemate, gambit, Kasparov, zugzwang, fianchetto, endgame",
    "wine": "wine, winery, vineyard, Merlot, Cabernet, sommelier, Burgundy, tannin, Riesling, Pinot, rosé",
}


@pytest.fixture(params=NAMES)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    folder = MODELS / request.param
    if not (folder / "tokenizer.json").is_file():
        pytest.skip(f"the model {request.param} is not here")
    return AutoTokenizer.from_pretrained(str(folder))


def test_only_whole_words_are_followed_and_none_is_lost(tokenizer: Any) -> None:
    texts = token_texts(tokenizer)
    for name, listed in {"golf": GOLF, **OTHERS}.items():
        words = listed.split(", ")
        found = find_tokens(name, words, tokenizer, texts)
        assert {texts[index].strip().lower() for index in found.ids} <= {word.lower() for word in words}
        assert not any(ends_inside_character(texts[index]) for index in found.ids)
        assert found.left_out == ()
        for note in found.notes:
            joined = {"".join(texts[index] for index in ids).strip().lower() for ids in note.sequences}
            assert joined <= {note.word.lower()}
            assert note.tokens or note.sequences


def test_no_first_token_of_golf_is_another_word(tokenizer: Any) -> None:
    texts = token_texts(tokenizer)
    followed = {texts[index] for index in find_tokens("golf", GOLF.split(", "), tokenizer, texts).ids}
    assert not followed & {" put", " bird", " Ry", " fair", " club", " bunk", " handic"}


def test_a_sequence_is_what_a_sentence_holds(tokenizer: Any) -> None:
    texts = token_texts(tokenizer)
    found = find_tokens("golf", GOLF.split(", "), tokenizer, texts, plurals=True)
    for note in found.notes:
        ids = tokenizer.encode(f"They said that a {note.word} is here, too.", add_special_tokens=False)
        standing = {tuple(ids[start : start + size]) for size in range(1, 8) for start in range(len(ids))}
        assert standing & ({(index,) for index in note.tokens} | set(note.sequences)), note.word


def test_pieces_without_a_space_are_words_in_scripts_that_write_none(tokenizer: Any) -> None:
    texts = token_texts(tokenizer)
    mask = words_mask(
        tokenizer.convert_ids_to_tokens(list(range(len(texts)))), str(tokenizer.backend_tokenizer.decoder)
    )
    counted = {texts[index] for index in mask.nonzero()[:, 0].tolist()}
    assert {" dog", "的"} <= counted
    assert not counted & {"dog", "ة", "이", "▁"}


def test_chinese_takes_the_bare_token() -> None:
    folder = MODELS / "qwen"
    if not (folder / "tokenizer.json").is_file():
        pytest.skip("the model qwen is not here")
    qwen = AutoTokenizer.from_pretrained(str(folder))
    texts = token_texts(qwen)
    found = find_tokens("golf", ["高尔夫"], qwen, texts)
    assert [texts[index] for index in found.ids] == ["高尔夫"]
    assert found.warnings == ()
