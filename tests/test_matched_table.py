"""The table of matched removal on made-up traces whose answer is known, and the scripts beside it."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from places import ROOT

EVALS = str(ROOT / "evals")
BOOKS = [f"book {number}" for number in range(20)]
PROVENANCE = {"command": "c", "date": "d", "python": "p", "torch": "t", "threads": 1, "seed": 0}


@pytest.fixture
def evals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EVALS)
    for name in ("matched", "matched_table", "material", "amplify", "limits", "unseen_words"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def trace(cost: float, *, reached: bool = True, likelihood: float = -3.0) -> dict:
    """Mass exp(-strength), damage cost * exp(strength), a crossing at ln 10."""
    base = np.linspace(1, 2, 20)
    points = [
        {
            "strength": strength,
            "mass": (np.exp(-strength) * base).tolist(),
            "damage": (cost * np.exp(strength) * np.full(20, 64.0)).tolist(),
            "likelihood": (np.full(20, 63.0) * likelihood).tolist(),
        }
        for strength in (1.0, float(np.log(10)), 4.0)
    ]
    return {
        "reached": reached,
        "strength": float(np.log(10)) if reached else None,
        "points": points,
        "near": (0.95 * base).tolist(),
        "vectors": 7,
        "matrices": 2,
    }


def result(concept: str, **methods: dict) -> dict:
    base = np.linspace(1, 2, 20)
    return {
        "concept": concept,
        "groups": 1,
        "documents": BOOKS,
        "about": {"settings": {}},
        "seconds": {"all": 1.0},
        "base": {
            "mass": base.tolist(),
            "positions": [10.0] * 20,
            "counts": [64.0] * 20,
            "likelihood": [-3.0 * 63] * 20,
            "predicted": [63.0] * 20,
            "near": base.tolist(),
        },
        "methods": {
            "channel-located": trace(0.001),
            **{name.replace("_", "-"): value for name, value in methods.items()},
        },
    }


@pytest.mark.usefixtures("evals")
def test_ratios_goals_and_what_never_got_there(tmp_path: Path) -> None:
    from matched_table import write_table

    results = [
        result("dogs", direction_everywhere=trace(0.005), layer_kernel=trace(0.0015), lm_head_located=trace(0.0011)),
        result("ships", direction_everywhere=trace(0.003), layer_kernel=trace(0.009, reached=False),
               lm_head_located=trace(0.0011)),
    ]  # fmt: skip
    summary = write_table(results, "channel-located", tmp_path, PROVENANCE)
    pooled = summary["pooled"]
    assert pooled["direction-everywhere"]["ratio"]["value"] == pytest.approx(np.sqrt(15), rel=1e-6)
    assert pooled["direction-everywhere"]["p"] < 0.01
    assert pooled["layer-kernel"]["never_reached"] == ["ships"]
    assert pooled["layer-kernel"]["concepts"] == 1
    assert summary["goals"]["direction-everywhere"]["met"] == ["dogs"]
    # Half of the best other method: lm-head-located stands apart, so ships is measured against direction-everywhere.
    assert summary["goals"]["the best other method"]["met"] == ["ships"]
    assert summary["goals"]["perplexity"]["met"] == ["dogs", "ships"]
    assert summary["goals"]["neighbours"]["met"] == ["dogs", "ships"]
    own = summary["concepts"][0]["methods"]["channel-located"]
    assert own["collateral_kl"] == pytest.approx(0.01)
    assert own["neighbours_kept"] == pytest.approx(0.95)
    text = (tmp_path / "table.md").read_text()
    assert "| ships | 1 | 7 |" in text
    assert "never" in text
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "summary.json").read_text())["target"] == 0.1


@pytest.mark.usefixtures("evals")
def test_a_chosen_method_that_never_gets_there_meets_no_goal(tmp_path: Path) -> None:
    from matched_table import write_table

    missed = result("dogs", direction_everywhere=trace(0.005))
    missed["methods"]["channel-located"] = trace(0.001, reached=False)
    summary = write_table([missed], "channel-located", tmp_path, PROVENANCE)
    assert all(goal["met"] == [] for goal in summary["goals"].values())
    assert summary["pooled"]["direction-everywhere"]["concepts"] == 0
    assert "| dogs | 1 | 7 | 0.150 | never |" in (tmp_path / "table.md").read_text()


@pytest.mark.usefixtures("evals")
def test_the_texts_without_a_concept_hold_none_and_each_document_is_told() -> None:
    import material as texts

    (material,) = texts.demo_materials(["dogs"])
    assert len(material.documents) == len(set(material.documents))
    assert not {place for place, _ in material.others} & {place for place, _ in material.concept}
    assert {place for place, _ in material.near} <= {place for place, _ in material.others}
    rows = texts._in_turn([["a", "b"], ["c"], ["d", "e"]])
    assert rows == [(0, "a"), (1, "c"), (2, "d"), (0, "b"), (2, "e")]


@pytest.mark.usefixtures("evals")
def test_the_weakest_strength_that_raises_enough() -> None:
    from amplify import weakest_strength

    assert weakest_strength(lambda strength: 1 + strength, 5.0) == pytest.approx(4.0, rel=0.03)
    assert weakest_strength(lambda strength: 1.0, 5.0) is None


@pytest.mark.usefixtures("evals")
def test_what_limits_an_edit_is_measured_at_the_target() -> None:
    import limits

    generator = torch.Generator().manual_seed(0)
    positions, neurons, width, vocabulary = 400, 24, 12, 60
    head = limits.Head(torch.ones(width), torch.randn(vocabulary, width, generator=generator), 1e-6)
    places = limits.LastLayerTexts(
        torch.randn(positions, neurons, generator=generator),
        torch.randn(positions, width, generator=generator),
        torch.randint(vocabulary, (positions,), generator=generator),
    )
    ids, near = torch.tensor([3, 4, 5]), torch.tensor([8, 9])
    rows = head.unembedding.double() - head.unembedding.double().mean(0)
    metric = limits._inverse(rows.T @ rows / vocabulary, 0.3, None)
    mean = rows[ids].mean(0)
    direction = metric @ mean / (mean @ metric @ mean)
    output_head = limits.OutputHead(
        None, lambda residual: residual / head.size(residual)[:, None], lambda normed: normed @ head.unembedding.T, 1.0
    )
    aim = limits.FitAim(ids, limits.TARGET, near, None)
    own = limits.Positions(places.neurons, places.residual, torch.zeros_like(places.residual))
    found = limits.variants(head, output_head, own, own, aim, direction, metric, steps=3)
    assert len(found) == 7
    texts = dict.fromkeys(("concept", "others", "near"), places)
    given = {name: limits.at_target(variant, head, texts, ids, near) for name, variant in found.items()}
    # A key that is given and logits that are lowered work at any place; a key that must be read off noise need not.
    assert 0 < given[limits.FLOOR]["kl"] < given[limits.GIVEN]["kl"]
    row = {"kl": 1.0, "perplexity": 0.02, "near": 0.95}
    lines = limits.table([{"rows": {limits.OURS: row, "other": row | {"kl": 0.5}}}] * 2).splitlines()
    assert lines[-1] == "| other | 2 | 0.50 | +2.00% | 0 | 2 |"


@pytest.mark.usefixtures("evals")
def test_words_that_an_edit_was_not_given_are_those_of_the_other_half() -> None:
    import material as texts
    from unseen_words import METHODS, recipe_of, table

    (material,) = texts.demo_materials(["dogs"])
    halves = [recipe_of("demo", material, material.words[half::2]).concepts[0].words for half in (0, 1)]
    assert sorted(halves[0] + halves[1]) == sorted(material.words)
    rows = [{"method": name, "left": 0.5, "kl": 0.01} for name in METHODS]
    rows += [row | {"left": None, "kl": None} for row in rows]
    assert table(rows).splitlines()[2] == "| silence-words | 1 of 2 | 0.10 | 0.50 | 0.01000 |"


@pytest.mark.usefixtures("evals")
def test_a_result_is_written_as_json_and_as_words(tmp_path: Path) -> None:
    from material import write_result

    write_result(tmp_path / "result", PROVENANCE, {"rows": [1]}, "Title", "Words.", "| table |")
    assert json.loads((tmp_path / "result.json").read_text()) == {**PROVENANCE, "rows": [1]}
    expected = "# Title\n\n`c`, d, Python p, torch t, seed 0. Words.\n\n| table |\n"
    assert (tmp_path / "result.md").read_text() == expected
