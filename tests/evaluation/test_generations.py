"""Repetition and leaks by hand."""

import pytest

from rotate_edit.errors import BadInput
from rotate_edit.evaluation import generations


def test_repetition_by_hand():
    # Twelve words hold nine 4-grams, of which four are different.
    looped = "a b c d a b c d a b c d"
    assert generations.repetition([looped]).value == pytest.approx(1 - 4 / 9)
    assert generations.repetition(["a b c d e f", "too short"]).value == 0
    assert generations.repetition(["a b c d e f", looped]).value == pytest.approx((1 - 4 / 9) / 2)


def test_distinct_by_hand():
    assert generations.distinct(["a b a b", "a b"], n=2).value == pytest.approx(2 / 4)
    assert generations.distinct(["a b c"], n=1).value == 1


def test_leaks_are_whole_words_in_any_case_with_their_plural():
    samples = [["A dog ran.", "dogs!", "The DOG's bone"], ["hotdogged dogma", "nothing", "endog"]]
    measured = generations.leak_rate(samples, ["dog", " puppy "])
    assert measured.value == pytest.approx(3 / 6)
    assert measured.n == 6
    # Prompts are resampled whole: either always or never.
    assert (measured.low, measured.high) == (0, 1)
    assert generations.leak_rate([["a (puppy)"]], ["dog", "puppy"]).value == 1


def test_words_are_never_patterns():
    assert generations.leak_rate([["a dog"]], ["d.g"]).value == 0
    assert generations.leak_rate([["c++ code"]], ["c++"]).value == 1
    with pytest.raises(BadInput, match="at least one word"):
        generations.leak_rate([["a dog"]], [" "])


def test_a_leak_rate_of_nothing_is_not_certain():
    never = generations.leak_rate([["no word"] * 20] * 5, ["dog"])
    assert (never.value, never.low) == (0, 0)
    # Wilson's upper end for 0 of 100: z^2 / (n + z^2).
    assert never.high == pytest.approx(1.959964**2 / (100 + 1.959964**2), rel=1e-5)
    always = generations.leak_rate([["a dog"] * 20] * 5, ["dog"])
    assert always.low == pytest.approx(1 - never.high)
