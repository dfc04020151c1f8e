"""The probability of a concept's words and how far other predictions moved, against the measures themselves."""

from dataclasses import replace

import pytest
import torch
from tiny_edits import silencing
from tiny_items import write_items
from tiny_words import WORDS, ids, tiny_model, tiny_tokenizer

from rotate_edit.edits.apply import applied
from rotate_edit.evaluation import measures
from rotate_edit.evaluation.compare import Plan
from rotate_edit.evaluation.items import texts_about
from rotate_edit.evaluation.metrics import MeasuredModel, all_metrics, find_metric
from rotate_edit.evaluation.tasks import open_items
from rotate_edit.models.batches import tokenise

OF_TEXTS = ("concept_mass", "concept_mass_fraction", "collateral_kl")
OF_PROMPTS = ("first_token_kl", "concept_probability", "amplification")
PLAN = Plan(concepts=("cat",))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> MeasuredModel:
    items = open_items(write_items(tmp_path_factory.mktemp("items")))
    return MeasuredModel(PLAN, {}, tiny_model(0), tiny_tokenizer(), items, ids("cat"), ids("cat"))


@pytest.fixture(scope="module")
def known(base):
    return {name: find_metric(name).prepare(base) for name in (*OF_TEXTS, *OF_PROMPTS)}


def measured(base, known, strength):
    edited = MeasuredModel(base.plan, {}, base.model, base.tokenizer, base.items)
    with applied(base.model, silencing(base.model, "cat").at(strength)):
        return {name: find_metric(name).measure(edited, base, known[name]) for name in known}


def test_the_base_is_read_once_for_all_metrics(base, known):
    assert len({id(known[name]) for name in OF_TEXTS}) == 1
    assert len({id(known[name]) for name in OF_PROMPTS}) == 1


def test_they_are_the_measures_own(base, known):
    own, others = texts_about(base.items, ["cat"])
    reference = measures.reference(
        base.model, base.tokenizer, ids("cat"), concept_texts=own, other_texts=others, longest=64
    )
    prompts = tokenise(base.tokenizer, base.items.prompts, vocabulary_size=len(WORDS), longest=64)
    before = measures.last_position(base.model, prompts)
    found = measured(base, known, 1.0)
    with applied(base.model, silencing(base.model, "cat").at(1.0)):
        mass = measures.concept_mass(base.model, reference.concept, ids("cat"), reference.concept_mass)
        assert found["concept_mass"] == mass
        assert found["collateral_kl"] == measures.collateral_kl(base.model, reference.others, reference.others_base)
        assert found["first_token_kl"] == measures.first_token_kl(base.model, prompts, before)
        chance = measures.concept_probability(base.model, prompts, ids("cat"), before)
        assert found["concept_probability"] == chance
    share = found["concept_mass_fraction"]
    assert (share.value, share.low) == pytest.approx((mass.value / mass.baseline, mass.low / mass.baseline))
    assert found["amplification"].value == pytest.approx(chance.value / chance.baseline)
    assert share.baseline == found["amplification"].baseline == 1


def test_they_follow_the_strength(base, known):
    nothing, less, more = (measured(base, known, strength) for strength in (0.0, 1.0, -0.5))
    for name in (*OF_TEXTS, *OF_PROMPTS):
        assert nothing[name].value == pytest.approx(nothing[name].baseline)
    assert less["concept_mass_fraction"].value < 0.5 < 1 < more["concept_mass_fraction"].value
    assert less["amplification"].value < 1 < more["amplification"].value
    assert less["collateral_kl"].value > 0 < more["first_token_kl"].value


@pytest.mark.parametrize(
    ("missing", "names"),
    [
        ({"items": None}, (*OF_TEXTS, *OF_PROMPTS)),
        ({"model": None}, (*OF_TEXTS, *OF_PROMPTS)),
        ({"concept_ids": None}, (*OF_TEXTS, "concept_probability")),
        ({"amplified_ids": None}, ("amplification",)),
    ],
)
def test_without_what_they_need_nothing_is_measured(base, missing, names):
    without = replace(base, values={}, **missing)
    found = {
        metric.name: metric.measure(without, without, metric.prepare(without))
        for metric in all_metrics()
        if metric.name in (*OF_TEXTS, *OF_PROMPTS)
    }
    assert {name for name, measure in found.items() if measure is None} == set(names)


def test_an_amplified_concept_is_no_collateral_of_a_suppressed_one(base):
    plan = Plan(concepts=("cat", "dog"), amplified=("dog",))
    both = replace(base, plan=plan, values={})
    known = find_metric("collateral_kl").prepare(both)
    own, _ = texts_about(base.items, ["cat"])
    _, others = texts_about(base.items, ["cat", "dog"])
    assert known.concept.texts == len(own)
    assert known.others.texts == len(others) < len(texts_about(base.items, ["cat"])[1])
    assert torch.equal(known.concept_ids, ids("cat"))
