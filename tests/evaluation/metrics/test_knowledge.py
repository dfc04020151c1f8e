"""Metrics of knowledge: on the questions that the base knows, what its measures say."""

from dataclasses import replace

import pytest
from tiny_edits import silencing
from tiny_items import write_items
from tiny_words import tiny_model, tiny_tokenizer

from rotate_edit.edits.apply import applied
from rotate_edit.evaluation import knowledge
from rotate_edit.evaluation.compare import Plan
from rotate_edit.evaluation.metrics import MeasuredModel, find_metric
from rotate_edit.evaluation.questions import questions_of
from rotate_edit.evaluation.tasks import open_items

NAMES = (
    "knowledge_kept", "knowledge_drop", "knowledge_drop_5shot", "neighbours_kept", "neighbours_drop", "general_kept"
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = write_items(tmp_path_factory.mktemp("items"))
    lines = (folder / "choice-all.jsonl").read_text().replace('"type": "A"', '"type": "B"')
    (folder / "choice-all.jsonl").write_text(lines)
    items = open_items(folder)
    counts = {noun: lines.count(f'"concept": "{noun}"') for noun in ("dog", "cat", "bird", "fish", "mat", "tree")}
    own, near = sorted(counts, key=lambda noun: -counts[noun])[:2]
    return MeasuredModel(Plan((own,), (near,)), {}, tiny_model(0), tiny_tokenizer(), items)


def measured(base, word, strength=1.0):
    known = {name: find_metric(name).prepare(base) for name in NAMES}
    edited = MeasuredModel(base.plan, {}, base.model, base.tokenizer, base.items)
    with applied(base.model, silencing(base.model, word).at(strength)):
        return {name: find_metric(name).measure(edited, base, known[name]) for name in NAMES}


def test_they_are_the_measures_own_on_known_questions(base):
    word = base.plan.concepts[0]
    found = measured(base, word)
    asked = questions_of(base.items, base.plan, "concept")
    before = knowledge.read_answers(base.model, base.tokenizer, asked)
    known = knowledge.known_places(before)
    with applied(base.model, silencing(base.model, word).at(1.0)):
        after = knowledge.read_answers(base.model, base.tokenizer, asked)
    assert len(known) >= 10
    assert found["knowledge_drop"] == knowledge.log_odds_drop(before.of(known), after.of(known))
    assert found["knowledge_kept"] == knowledge.accuracy_kept(before.of(known), after.of(known))
    # The word is the answer to all of these questions, and a row that is gone says it no more.
    assert found["knowledge_kept"].value == 0
    assert found["knowledge_drop"].low > 0


def test_no_edit_takes_nothing(base):
    found = measured(base, base.plan.concepts[0], 0.0)
    for name, measure in found.items():
        if measure is not None:
            assert measure.value == measure.baseline == (1 if name.endswith("kept") else 0)


def test_nothing_is_measured_without_questions_or_a_model(base):
    none = replace(base, items=None, values={})
    few = replace(base, plan=Plan((base.plan.concepts[0],), items=3), values={})
    listed = replace(base, plan=replace(base.plan, words=base.plan.concepts), values={})
    for model in (none, few, listed, replace(base, model=None, values={})):
        metric = find_metric("knowledge_drop")
        assert metric.prepare(model) is None
        assert metric.measure(model, model, None) is None
