"""What is gone of a concept and kept of the rest, by hand."""

import pytest
from readings import measured, part, reading

from rotate_edit.evaluation.compare import Plan

PLAN = Plan(concepts=("dogs",))


def test_efficacy_is_what_is_gone_above_chance():
    # 30 of 40 right before and 15 after: (15/40 - 1/4) / (30/40 - 1/4) is kept.
    base, after = reading([1.0] * 30 + [0.0] * 10), reading([1.0] * 15 + [0.0] * 25)
    found = measured("efficacy", base, after, [part(range(40))], PLAN)
    assert found.value == pytest.approx(1 - 0.125 / 0.5)
    assert (found.baseline, found.n) == (0, 40)
    assert found.low < found.value < found.high


def test_specificity_weighs_general_items_and_neighbours_alike():
    base = reading([0.5] * 40, "probability")
    after = reading([0.4] * 10 + [0.2] * 30, "probability")
    general, near = part(range(10), role="general", kind=""), part(range(10, 40), role="neighbour", kind="")
    found = measured("specificity", base, after, [general, near], PLAN)
    assert found.value == pytest.approx(2 / (1 / 0.8 + 1 / 0.4))
    assert found.baseline == 1
    alone = measured("specificity", base, after, [general], PLAN)
    assert alone.value == pytest.approx(0.8)


def test_harmonic_is_the_mean_of_both_and_needs_both():
    base, after = reading([0.5] * 40, "probability"), reading([0.1] * 20 + [0.4] * 20, "probability")
    own, rest = part(range(20)), part(range(20, 40), role="general", kind="")
    assert measured("harmonic", base, after, [own, rest], PLAN).value == pytest.approx(0.8)
    assert measured("harmonic", base, base, [own, rest], PLAN).value == 0
    for parts in ([own], [rest]):
        assert measured("harmonic", base, after, parts, PLAN) is None


def test_accuracy_of_words_counts_before_facts_and_both_before_cloze():
    base = reading([1.0] * 40) | reading([0.5] * 20, "probability", task="cloze")
    after = reading([0.0] * 20 + [1.0] * 20) | reading([0.25] * 20, "probability", task="cloze")
    words, facts = part(range(20)), part(range(20, 40), kind="B")
    cloze = part(range(20), kind="A", task="cloze")
    assert measured("efficacy", base, after, [words, facts, cloze], PLAN).value == 1
    assert measured("efficacy", base, after, [facts, cloze], PLAN).value == 0
    assert measured("efficacy", base, after, [cloze], PLAN).value == pytest.approx(0.5)


def test_nothing_is_measured_where_nothing_was_asked():
    base = reading([1.0] * 20)
    assert measured("efficacy", base, base, [part(range(20), role="general")], PLAN) is None
    assert measured("specificity", base, base, [part(range(20))], PLAN) is None
    # What the base does not know above chance cannot be removed.
    guessing = reading([1.0] * 5 + [0.0] * 15)
    assert measured("efficacy", guessing, base, [part(range(20))], PLAN) is None
