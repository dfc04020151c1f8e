"""The notebook: it runs from top to bottom without a network, and prints what it shows."""

import io
import json
import re
from contextlib import redirect_stdout

import pytest
from places import ROOT

NOTEBOOK = ROOT / "recipes" / "demo.ipynb"


@pytest.fixture(scope="module")
def cells() -> list[dict]:
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert content["nbformat"] == 4
    return [cell for cell in content["cells"] if cell["cell_type"] == "code"]


@pytest.fixture(scope="module")
def printed(cells: list[dict], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What each cell prints when all are run in order, in one namespace."""
    space: dict = {}
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("notebook"))
        patch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("written")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        for number, cell in enumerate(cells, start=1):
            output = io.StringIO()
            with redirect_stdout(output):
                exec(compile("".join(cell["source"]), f"cell {number}", "exec"), space)
            said.append(output.getvalue())
    return said


def test_every_cell_runs_and_prints_as_much_as_it_shows(cells: list[dict], printed: list[str]) -> None:
    shown = ["".join(text for output in cell["outputs"] for text in output["text"]) for cell in cells]
    assert len(cells) == 10
    assert all(shown)
    assert [text.count("\n") for text in printed] == [text.count("\n") for text in shown]
    # Fractions may differ from machine to machine; words and counts of what is done may not.
    for place in (0, 2, 6, 7, 9):
        assert re.sub(r"\d+\.\d+", "#", printed[place]) == re.sub(r"\d+\.\d+", "#", shown[place])


def test_the_concept_goes_and_the_undo_is_exact(printed: list[str]) -> None:
    together = "".join(printed)
    left = re.search(r"mass on the concept's words: ([\d.]+)%", together)
    damage = re.search(r"elsewhere: ([\d.]+) nats", together)
    assert left is not None
    assert damage is not None
    assert float(left.group(1)) < 20
    assert float(damage.group(1)) < 0.02
    assert "47 tensors compared, 0 problems" in together
    assert "undone bit for bit: True" in together


def test_no_path_of_the_machine_it_was_made_on(cells: list[dict]) -> None:
    assert "/tmp" not in NOTEBOOK.read_text(encoding="utf-8")
    assert all(cell["execution_count"] == number for number, cell in enumerate(cells, start=1))
