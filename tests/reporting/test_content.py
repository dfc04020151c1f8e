"""What a report says, as plain data."""

import json
from pathlib import Path

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
