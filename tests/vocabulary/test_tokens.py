"""Vocabulary matrices, token weights, under-trained tokens and word masks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rotate_edit.errors import BadInput
from rotate_edit.vocabulary.tokens import (
    HIGH_NORM_WEIGHT,
    ends_inside_character,
    frequency_direction,
    piece_text,
    token_weights,
    undertrained_tokens,
    unused_tokens,
    vocabulary_projection,
    words_mask,
)


def matrix(vocabulary: int = 400, size: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(vocabulary, size, generator=torch.Generator().manual_seed(seed))


def test_ordinary_tokens_weigh_one_and_long_rows_next_to_nothing():
    rows = matrix()
    rows[[3, 5, 7, 11]] *= 50
    weights = token_weights(rows)
    assert weights.unique().tolist() == [pytest.approx(HIGH_NORM_WEIGHT), 1.0]
    assert (weights < 1).nonzero()[:, 0].tolist() == [3, 5, 7, 11]


def test_the_smaller_weight_counts_unless_the_published_order_is_asked_for():
    rows = matrix()
    rows[[3, 5, 7, 11]] *= 50
    ignored = torch.zeros(400, dtype=torch.bool)
    ignored[[5, 20]] = True
    assert token_weights(rows, ignored=ignored)[[5, 20]].tolist() == [0.0, 0.0]
    repeated = token_weights(rows, ignored=ignored, overwrite_zero=True)
    assert repeated[[5, 20]].tolist() == [pytest.approx(HIGH_NORM_WEIGHT), 0.0]


@given(st.floats(min_value=50, max_value=100), st.integers(min_value=0, max_value=1000))
def test_the_percentile_bounds_the_share_of_high_norms(percentile, seed):
    weights = token_weights(matrix(seed=seed), percentile=percentile)
    assert abs(int((weights < 1).sum()) - 400 * (1 - percentile / 100)) <= 1


def test_useless_masks_and_percentiles_are_refused():
    for arguments in (
        {"ignored": torch.ones(400, dtype=torch.bool)},
        {"ignored": torch.zeros(3, dtype=torch.bool)},
        {"percentile": 0.0},
        {"percentile": 101.0},
    ):
        with pytest.raises(BadInput):
            token_weights(matrix(), **arguments)


def test_a_projection_takes_the_gain_and_the_mean():
    rows, gain = matrix(), torch.rand(16) + 0.5
    vector = torch.randn(16)
    assert torch.allclose(vocabulary_projection(rows, gain) @ vector, rows @ (gain * vector), atol=1e-5)
    assert torch.allclose(
        (vocabulary_projection(rows, gain, centred=True) @ vector).mean(), torch.tensor(0.0), atol=1e-5
    )
    assert vocabulary_projection(rows) is rows


def test_words_begin_with_a_space_and_are_letters():
    byte_level = ["Ġdog", "dog", "Ġ", "Ġ42", "Ġdog's", "ĠcafÃ©", "Ċ", "ĠÃ", "!", "<s>", "ĠI"]
    assert words_mask(byte_level).nonzero()[:, 0].tolist() == [0, 5, 10]
    pieces = ["▁dog", "dog", "▁", "<0x41>", "▁étoile", "▁3", "</s>"]
    assert words_mask(pieces).nonzero()[:, 0].tolist() == [0, 4]
    word_piece = ["dog", "##s", "[CLS]", "2"]
    assert words_mask(word_piece).tolist() == [True, False, False, False]


def test_pieces_of_scripts_without_spaces_are_words_without_the_mark():
    pieces = ["▁dog", "数据", "これから", "ติดต่อ", "ตั", "ั", "数据a", "골프", "▁골프", "كلب", "▁كلب", "▁हमेशा", "हमेशा"]
    counted = [piece for piece, word in zip(pieces, words_mask(pieces).tolist(), strict=True) if word]
    assert counted == ["▁dog", "数据", "これから", "ติดต่อ", "ตั", "▁골프", "▁كلب", "▁हमेशा"]
    # The last two are 的 and its first two bytes, as byte-level BPE writes them.
    assert words_mask(["Ġdog", "dog", "çļĦ", "çļ"]).tolist() == [True, False, True, False]


def test_a_part_of_a_character_is_told_from_whole_ones():
    whole = ["dog", " café", "的", "<0x41>", ""]
    assert not any(ends_inside_character(text) for text in whole)
    assert all(ends_inside_character(text) for text in ["<0xE4>", piece_text("çļ", True), piece_text("Ġç", True)])


def test_unused_tokens_are_known_from_their_pieces():
    pieces = ["<unused7>", "<|reserved_special_token_12|>", "<extra_id_0>", "<0xF5>", "<0x41>", "<s>", "unused", ""]
    assert unused_tokens(pieces).tolist() == [True, True, True, True, False, False, False, True]
    # 0xC0 and 0xFF are written À and ÿ by byte-level BPE; in another vocabulary these are letters.
    assert unused_tokens(["À", "ÿ", "a", "Ġthe"]).tolist() == [True, True, False, False]
    assert unused_tokens(["À", "ÿ", "a", "▁the"]).tolist() == [False, False, False, False]


def trained_matrix(drift: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """1,000 rows: 900 trained ones of length about 1 around a shared direction, the last 100 left at another place."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(1000, 32, generator=generator) / 32**0.5
    rows[:, 0] += 0.5
    start = torch.randn(32, generator=generator)
    rows[900:] = start * 0.5 + drift * torch.randn(100, 32, generator=generator) / 32**0.5
    untouched = torch.zeros(1000, dtype=torch.bool)
    untouched[900:] = True
    return rows, untouched


@pytest.mark.parametrize("drift", [0.01, 0.5, 1.5])
def test_tokens_that_training_never_touched_are_found_from_a_few_known_ones(drift):
    rows, untouched = trained_matrix(drift)
    known = torch.zeros(1000, dtype=torch.bool)
    known[900:905] = True
    found = undertrained_tokens(rows, known)
    assert float((found & untouched).sum()) >= 97
    assert float((found & ~untouched).sum()) <= 3


def test_without_known_unused_tokens_none_is_guessed():
    rows, _ = trained_matrix(0.1)
    known = torch.zeros(1000, dtype=torch.bool)
    assert not undertrained_tokens(rows, known).any()
    known[950] = True
    assert undertrained_tokens(rows, known).nonzero()[:, 0].tolist() == [950]


def test_an_untied_embedding_shows_unseen_tokens_by_their_norm():
    rows, untouched = trained_matrix(0.1)
    embedding = torch.randn(1000, 32)
    embedding[untouched] *= 0.05
    embedding[10] *= 0.05
    known = torch.zeros(1000, dtype=torch.bool)
    known[900:905] = True
    assert undertrained_tokens(rows, known, embedding=embedding)[10]
    assert not undertrained_tokens(rows, known)[10]


def test_the_frequency_direction_points_from_trained_rows_to_untrained_ones():
    rows, untouched = trained_matrix(0.1)
    axis = frequency_direction(rows, untouched)
    assert axis is not None
    assert float(axis.norm()) == pytest.approx(1, abs=1e-6)
    along = rows @ axis
    assert float(along[untouched].min()) > float(along[~untouched].mean())
    difference = rows[untouched].mean(0) - rows[~untouched].mean(0)
    assert float(difference @ axis) == pytest.approx(float(difference.norm()), rel=1e-5)
    # What is added to every row changes nothing, and a rotation turns it along.
    torch.testing.assert_close(frequency_direction(rows + 3.0, untouched), axis, rtol=1e-4, atol=1e-5)
    turn = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(2))).Q
    torch.testing.assert_close(frequency_direction(rows @ turn, untouched), axis @ turn, rtol=1e-4, atol=1e-5)


def test_without_trained_or_untrained_rows_there_is_no_frequency_direction():
    rows, untouched = trained_matrix(0.1)
    assert frequency_direction(rows, torch.zeros_like(untouched)) is None
    assert frequency_direction(rows, torch.ones_like(untouched)) is None
