"""Metrics of reading: the rise of the loss outside the listed words, with and without the concept."""

from dataclasses import replace

import pytest
from tiny_edits import silencing
from tiny_items import write_items
from tiny_words import WORDS, tiny_model, tiny_tokenizer

from rotate_edit.edits.apply import applied
from rotate_edit.evaluation import comprehension, statistics
from rotate_edit.evaluation.compare import Plan
from rotate_edit.evaluation.items import texts_about
from rotate_edit.evaluation.metrics import MeasuredModel, find_metric
from rotate_edit.evaluation.tasks import open_items

NAMES = ("comprehension_rise", "comprehension_elsewhere", "comprehension_selectivity")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    items = open_items(write_items(tmp_path_factory.mktemp("items")))
    return MeasuredModel(Plan(("cat",), words=("cat",)), {}, tiny_model(0), tiny_tokenizer(), items)


def test_they_are_the_measures_own(base):
    known = {name: find_metric(name).prepare(base) for name in NAMES}
    edited = MeasuredModel(base.plan, {}, base.model, base.tokenizer, base.items)
    own, others = texts_about(base.items, ["cat"])
    marked = [
        comprehension.mark_words(base.tokenizer, texts, ["cat"], vocabulary_size=len(WORDS)) for texts in (own, others)
    ]
    before = [comprehension.read_losses(base.model, texts) for texts in marked]
    with applied(base.model, silencing(base.model, "cat")):
        found = {name: find_metric(name).measure(edited, base, known[name]) for name in NAMES}
        after = [comprehension.read_losses(base.model, texts) for texts in marked]
    rises = [comprehension.rise(*pair, seed=seed) for seed, pair in enumerate(zip(before, after))]
    assert found["comprehension_rise"] == statistics.measure(rises[0]).against(0)
    assert found["comprehension_elsewhere"] == statistics.measure(rises[1]).against(0)
    assert found["comprehension_selectivity"] == comprehension.selectivity(*rises)


def test_nothing_is_measured_without_words_or_texts(base):
    for model in (replace(base, items=None, values={}), replace(base, plan=Plan(("cat",)), values={})):
        for name in NAMES:
            assert find_metric(name).prepare(model) is None
            assert find_metric(name).measure(model, model, None) is None
