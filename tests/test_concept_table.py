"""The table of concepts: the split was drawn as it says, and the pooled numbers are those of the formulas."""

import importlib.util
import json
import random
from types import ModuleType

import numpy as np
import pytest
from places import ROOT

FOLDER = ROOT / "evals" / "concepts"


def script(name: str) -> ModuleType:
    """A module of the folder, which is no package."""
    spec = importlib.util.spec_from_file_location(f"concepts_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pooled():
    return script("pooled")


def test_the_split_is_the_seeded_shuffle():
    content = json.loads((FOLDER / "protocol.json").read_text(encoding="utf-8"))
    for source in ("ember", "opentriviaqa"):
        names = sorted(name for name, entry in content["concepts"].items() if entry["source"] == source)
        random.Random(content["seed"]).shuffle(names)
        assert [name for name in content["choose"] if name in names] == names[:5]
        assert [name for name in content["final"] if name in names] == names[5:]
    assert not set(content["choose"]) & set(content["final"])
    assert len(content["models"]) == 3
    definitions = json.loads((FOLDER / "definitions.json").read_text(encoding="utf-8"))
    assert set(definitions) == set(content["concepts"])


def test_intervals_resample_concepts_and_items(pooled):
    generator = np.random.default_rng(0)
    concepts = generator.normal(1.0, 0.5, 40)
    items = [generator.normal(concept, 0.2, 50) for concept in concepts]
    value, low, high = pooled.pooled(items)
    assert value == pytest.approx(np.mean([part.mean() for part in items]))
    # Concepts differ far more than items do, so their spread decides: 0.5 / sqrt(40).
    assert high - low == pytest.approx(2 * 1.96 * np.std(concepts) / 40**0.5, rel=0.15)
    assert np.isnan(pooled.pooled([])[0])


def test_paired_tests_see_a_difference_and_no_difference(pooled):
    generator = np.random.default_rng(1)
    first = [generator.normal(0, 1, 30) for _ in range(10)]
    better = [part + 0.5 for part in first]
    assert pooled.paired_p(first, better) < 0.01
    assert pooled.paired_p(better, first) < 0.01
    noise = [part + generator.normal(0, 1, 30) for part in first]
    assert pooled.paired_p(first, noise) > 0.05


def test_the_tables_hold_what_was_measured(pooled):
    drop = {"value": 1.0, "low": 0.5, "high": 1.5}
    asked = {"n": 20, "known": 12, "kept": {"value": 0.25}, "drop": drop, "drops": [1.0, 1.0]}
    cell = {
        "strength": 2.0,
        "knowledge": {"asked": asked, "five shots": asked, "neighbours": {**asked, "kept": {"value": 0.9}}},
        "relearning": {"full 5": {"drop": drop, "drops": [0.5, 0.5]}},
    }
    other = {"strength": 64.0, "knowledge": {"asked": {**asked, "drops": [0.75, 0.75]}}}
    content = {
        "cells": {"tiny | dogs | rank-one": cell, "tiny | cats | rank-one": {}, "tiny | dogs | token-rows": other},
        "against": "rank-one",
        "table": "choosing", "date": "2000-01-01", "python": "3", "torch": "2", "budget": 0.03,
        "questions": 20, "general": 5, "tokens": 100,
    }  # fmt: skip
    text = pooled.markdown(content)
    assert "| rank-one | 1 | 0 | 0.25 | 1.00 [1.00, 1.00] |" in text
    assert "| rank-one | 0.50 [0.50, 0.50] |" in text
    assert "| token-rows | 1 | 0.25 [0.25, 0.25] |" in text
    assert "| dogs | 12 of 20 | 0.25, +1.00 | 0.25, +1.00 |" in text
    # What was not measured is empty, and never a zero.
    assert "cats" not in text
