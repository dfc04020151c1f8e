"""What a model writes, by hand."""

import pytest

from rotate_edit.evaluation.compare import Plan
from rotate_edit.evaluation.metrics import MeasuredModel, find_metric

PLAN = Plan(concepts=("dogs",), words=("dog",))
ABOUT = (True, False, None)


def model(samples=(), texts=()):
    return MeasuredModel(PLAN, {}, texts=tuple(texts), samples=tuple(samples), about=ABOUT[: len(samples)])


def measured(name, edited, base):
    return find_metric(name).measure(edited, base, find_metric(name).prepare(base))


def test_leaks_are_counted_where_the_concept_is_asked_for_and_where_it_is_not():
    base = model([["a dog", "dogs", "dog", "a cat"], ["a dog", "", "", ""], ["dog"] * 4])
    edited = model([["a cat", "dogs", "a cat", "a cat"], ["", "", "", ""], ["dog"] * 4])
    asked, neutral = (measured(f"leak_rate_{when}", edited, base) for when in ("asked", "neutral"))
    assert (asked.value, asked.baseline, asked.n) == (0.25, 0.75, 4)
    assert (neutral.value, neutral.baseline, neutral.n) == (0, 0.25, 4)


def test_there_is_no_leak_rate_without_samples_of_such_prompts():
    greedy = model(texts=["a dog"])
    assert measured("leak_rate_asked", greedy, greedy) is None
    only = MeasuredModel(PLAN, {}, samples=(["a dog"],), about=(True,))
    assert measured("leak_rate_asked", only, only).value == 1
    assert measured("leak_rate_neutral", only, only) is None


def test_repetition_and_variety_are_of_the_samples_or_else_of_the_greedy_texts():
    looped, plain = "a b c d a b c d a b c d", "a b c d e f g h"
    base, edited = model(texts=[plain]), model(texts=[looped])
    repeated = measured("repetition_4", edited, base)
    assert (repeated.value, repeated.baseline) == (pytest.approx(1 - 4 / 9), 0)
    varied = measured("distinct_2", edited, base)
    assert (varied.value, varied.baseline) == (pytest.approx(4 / 11), 1)
    sampled = model([[plain, looped]], texts=[plain])
    assert measured("repetition_4", sampled, base).value == pytest.approx((1 - 4 / 9) / 2)
    assert measured("repetition_4", model(), base) is None
    assert measured("distinct_2", model(), base) is None
