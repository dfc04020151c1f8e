"""What is said of two readings: sentences, Holm's correction and the headline."""

from dataclasses import replace

import pytest
from readings import compared, part, reading

from rotate_edit.evaluation.compare import Plan
from rotate_edit.evaluation.harness import Scores

PLAN = Plan(concepts=("dogs",))


def test_a_clear_loss_and_an_unclear_one_read_differently():
    base = reading([1.0] * 60)
    lost = compared(base, reading([0.0] * 50 + [1.0] * 10), [part(range(60))], PLAN)
    assert "chance does not explain" in lost["rows"][0]["sentence"]
    assert lost["rows"][0]["difference"]["value"] == pytest.approx(-50 / 60)
    unclear = compared(base, reading([0.0] * 2 + [1.0] * 58), [part(range(60))], PLAN)
    assert "no difference was shown" in unclear["rows"][0]["sentence"]
    assert "cannot be excluded" in unclear["rows"][0]["sentence"]
    assert any("Fewer than 100 items" in words for words in unclear["words"])
    assert any("neighbouring concepts" in words for words in unclear["words"])


def test_p_values_are_corrected_over_the_used_rows_only():
    base = {
        "one": Scores("one", "accuracy", "acc", 0.25, (1.0,) * 8, (), {}),
        "two": Scores("two", "accuracy", "acc", 0.25, (0.0,) * 8, (), {}),
        "three": Scores("three", "accuracy", "acc", 0.25, (1.0,) * 8, (), {}),
    }
    after = {name: Scores(name, "accuracy", "acc", 0.25, (0.0,) * 8, (), {}) for name in base}
    parts = [part(range(8), task=name) for name in base]
    rows = compared(base, after, parts, PLAN)["rows"]
    assert [row["used"] for row in rows] == [True, False, True]
    assert rows[0]["p"] == 2 / 2**8
    assert rows[0]["p_holm"] == pytest.approx(2 * 2 / 2**8)
    assert rows[1]["p_holm"] is None


def test_type_a_is_the_headline_and_type_b_only_when_there_is_no_a():
    base, after = reading([1.0] * 40), reading([0.0] * 20 + [1.0] * 20)
    words, facts = part(range(20)), part(range(20, 40), kind="B")
    assert compared(base, after, [words, facts], PLAN)["summary"]["efficacy"]["value"] == 1
    assert compared(base, after, [facts], PLAN)["summary"]["efficacy"]["value"] == 0
    assert compared(base, after, [part(range(20), role="general")], PLAN)["summary"]["efficacy"]["value"] is None


def test_a_concept_that_is_amplified_beside_another_does_not_count_as_kept():
    plan = Plan(concepts=("dogs", "cats"), amplified=("Cats",))
    assert plan.suppressed == ("dogs",)
    assert not plan.only_amplifies
    assert (plan.amplifies("cats"), plan.amplifies("DOGS")) == (True, False)
    base, after = reading([1.0] * 40), reading([0.0] * 20 + [1.0] * 20)
    parts = [replace(part(range(20)), concept="dogs"), replace(part(range(20, 40), title="cats"), concept="cats")]
    found = compared(base, after, parts, plan)
    assert found["summary"]["efficacy"]["value"] == 1
    assert "amplification" not in found["summary"]
    assert found["words"][0].startswith("Of what the base model knew of the words of dogs above chance, 100% is gone")
    both = compared(base, after, parts, Plan(concepts=("dogs", "cats"), amplified=("dogs", "cats")))
    assert both["summary"]["efficacy"]["value"] is None
    assert Plan(concepts=("dogs", "cats"), amplified=("dogs", "cats")).only_amplifies
    assert not Plan(concepts=()).only_amplifies


def test_facts_that_the_headline_leaves_out_are_told_beside_it():
    base, after = reading([1.0] * 40), reading([0.0] * 20 + [1.0] * 20)
    words, facts = part(range(20)), part(range(20, 40), kind="B", title="dogs: facts")
    said = compared(base, after, [words, facts], PLAN)["words"]
    assert any("leaves out dogs: facts, where accuracy was 1 before and is 1 after" in sentence for sentence in said)
    assert not any("leaves out" in sentence for sentence in compared(base, after, [facts], PLAN)["words"])
    assert not any("leaves out" in sentence for sentence in compared(base, after, [words], PLAN)["words"])


def test_general_tasks_alone_say_nothing_of_a_removal():
    said = compared(reading([1.0] * 40), reading([1.0] * 40), [part(range(40), role="general", kind="")], Plan(()))
    assert said["summary"]["specificity"]["value"] == 1
    assert not any("Removal" in sentence for sentence in said["words"])


def test_several_concepts_count_alike_whatever_their_items():
    base, after = reading([1.0] * 50), reading([0.0] * 10 + [1.0] * 40)
    parts = [part(range(10), title="dogs"), part(range(10, 50), title="ships")]
    assert compared(base, after, parts, PLAN)["summary"]["efficacy"]["value"] == pytest.approx(0.5)


def test_perplexity_rows_compare_texts():
    base = reading([-10.0, -20.0], "perplexity", weights=[5, 10])
    after = reading([-12.0, -21.0], "perplexity", weights=[5, 10])
    (row,) = compared(base, after, [part(range(2), role="general", kind="")], PLAN)["rows"]
    assert row["base"]["value"] == pytest.approx(2.718281828**2)
    assert row["edited"]["value"] == pytest.approx(2.718281828 ** (33 / 15))
    assert row["difference"]["value"] == pytest.approx(row["edited"]["value"] - row["base"]["value"])
    assert row["kept"]["value"] == pytest.approx(2.718281828 ** (-3 / 15))


def test_a_probability_is_not_called_knowledge_above_chance():
    base, after = reading([0.5] * 40, "probability"), reading([0.1] * 40, "probability")
    said = compared(base, after, [part(range(40))], PLAN)["words"][0]
    assert said.startswith("Of the probability of words of dogs, 80% is gone")
    asked = compared(reading([1.0] * 40), reading([0.0] * 40), [part(range(40))], PLAN)["words"][0]
    assert asked.startswith("Of what the base model knew of the words of dogs above chance, 100% is gone")
