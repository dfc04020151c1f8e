"""What a report says, as plain data."""

import json
from pathlib import Path
from typing import Any

import pytest
from made_up_run import run_folder

from rotate_edit.reporting import content as report_content


def run_json() -> str:
    channel = {"concept": "HOSTILE", "z_scores": [-10.0, -6.0, -1.0]}
    return json.dumps(
        {
            "concepts": [{"name": "HOSTILE", "tokens": [" dog"]}],
            "selected_channels": [
                {**channel, "name": "L1.N2.out#0", "support": 2.0, "tokens": [" dog", " cat", " a"]},
                {**channel, "name": "L1.N2.out#1", "support": 4.0, "tokens": [" dog", " cow", " a"]},
            ],
        }
    )


def test_chips_are_sized_by_strength_and_the_concept_is_told_apart() -> None:
    result = json.loads((run_json()).replace("HOSTILE", "dogs"))
    rows = report_content.channel_rows(result, result["concepts"][0])
    assert [row["name"] for row in rows] == ["L1.N2.out#1", "L1.N2.out#0"]
    assert [chip["size"] for chip in rows[0]["chips"]] == [5, 3, 1]
    assert [chip["own"] for chip in rows[0]["chips"]] == [True, False, False]


def test_the_same_channel_found_twice_is_shown_once() -> None:
    result = json.loads(run_json().replace(" cow", " cat"))
    rows = report_content.channel_rows(result, result["concepts"][0])
    assert [row["name"] for row in rows] == ["L1.N2.out#0, #1"]


def test_rows_that_were_not_used_are_not_drawn(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", "dogs")
    result = json.loads((folder / "evaluation.json").read_text())
    result["variants"]["edited"]["rows"][0]["used"] = False
    rows = report_content.forest_rows(result)
    assert [(row.group, row.panel) for row in rows] == [
        ("general", "the rest: perplexity (lower is better)"),
        ("neighbour", "the rest: probability of the right word, points"),
    ]
    assert [row.value for row in rows] == [0.5, 50.0]
    assert not any(row.clear for row in rows)


def test_what_is_no_neuron_is_left_out_of_the_strip(tmp_path: Path) -> None:
    result = json.loads((run_folder(tmp_path / "run", "dogs") / "evaluation.json").read_text())
    found = report_content.edited_neurons(result, "dogs")
    assert [(neuron.layer, neuron.place, neuron.matrix) for neuron in found] == [(0, 3, "out"), (2, 9, "gate")]
    assert report_content.layer_counts(found) == {0: 1, 2: 1}


def measured(**measures: tuple[float, float, float]) -> dict[str, Any]:
    found = {
        name: {"value": value, "low": low, "high": high, "n": 40, "baseline": 1.0}
        for name, (value, low, high) in measures.items()
    }
    return {"variants": {"edited": {"measures": found}}, "plan": {}}


KNOWLEDGE = [
    ((0.2, 0.1, 0.4), (2.0, 1.0, 3.0), "removed"),
    ((0.2, 0.1, 0.6), (2.0, 1.0, 3.0), "weakened, not removed"),
    ((1.0, 1.0, 1.0), (0.5, 0.1, 1.3), "weakened, not removed"),
    ((0.96, 0.88, 1.0), (0.4, -0.2, 1.1), "no change shown"),
]


@pytest.mark.parametrize(("kept", "drop", "verdict"), KNOWLEDGE)
def test_removed_is_said_of_knowledge_that_is_gone_with_its_whole_interval(
    kept: tuple[float, float, float], drop: tuple[float, float, float], verdict: str
) -> None:
    parts = report_content.outcome(measured(knowledge_kept=kept, knowledge_drop=drop))
    assert [part["name"] for part in parts] == ["knowledge", "words", "reading", "everything else"]
    assert parts[0]["verdict"] == verdict
    assert {part["verdict"] for part in parts[1:]} == {"not measured"}


def test_each_of_the_four_says_what_its_figures_say() -> None:
    parts = report_content.outcome(
        measured(
            concept_mass_fraction=(2e-5, 1e-9, 1e-4),
            comprehension_rise=(0.27, 0.15, 0.42),
            comprehension_elsewhere=(0.05, 0.04, 0.06),
            comprehension_selectivity=(0.22, 0.1, 0.37),
            collateral_kl=(0.0135, 0.011, 0.016),
            general_kept=(0.8, 0.7, 0.9),
        )
    )
    verdicts = {part["name"]: part["verdict"] for part in parts}
    assert verdicts == {
        "knowledge": "not measured",
        "words": "silenced",
        "reading": "harder on its subject",
        "everything else": "some was lost, or too little was asked",
    }
    sentences = {part["name"]: part["sentence"] for part in parts}
    assert "under 0.01 % (under 0.01 to 0.01) of the words' probability is left" in sentences["words"]
    assert "80 % (70 to 90) of other knowledge is left" in sentences["everything else"]
    for unsilenced, verdict in (((0.4, 0.0, 0.8), "lowered"), ((0.9, 0.7, 1.1), "no change shown")):
        assert report_content.outcome(measured(concept_mass_fraction=unsilenced))[1]["verdict"] == verdict
    assert report_content.outcome({"variants": {}, "plan": {}}) == []
    only_raised = measured(concept_mass_fraction=(2.0, 1.5, 3.0)) | {"plan": {"only_amplifies": True}}
    assert report_content.outcome(only_raised) == []
