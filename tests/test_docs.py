"""What the documents show is true: links lead to files, examples run."""

import re
from pathlib import Path

import pytest
import torch
from places import ROOT
from test_edit import applied, target

from rotate_edit.edits.edit import METHODS

PAGES = sorted([ROOT / "README.md", ROOT / "evals" / "README.md", *(ROOT / "docs").glob("*.md")])


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link]
    assert all((page.parent / link).exists() for link in local), local


def test_the_example_of_a_method_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rotate_edit.edits.edit.METHODS", dict(METHODS))
    exec(blocks(ROOT / "docs" / "methods.md", "python")[0], {})
    seen = target()
    after = applied("strongest-half", seen, 1.0)
    held = (seen.vectors @ seen.direction.read).abs()
    changed = (after != seen.vectors).any(dim=1)
    assert changed.sum() == 2
    assert set(changed.nonzero()[:, 0].tolist()) <= set(seen.located.tolist())
    # Strength 1 leaves nothing of the concept in the changed rows, and these were the strongest.
    assert torch.allclose(after[changed] @ seen.direction.read, torch.zeros(2), atol=1e-5 * float(held.max()))
    assert held[changed].min() >= held[seen.located][~changed[seen.located]].max()


@pytest.mark.slow
def test_the_python_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = blocks(ROOT / "README.md", "python")
    assert len(example.strip().splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    written = capsys.readouterr().out
    assert "Edgar looked at the" in written
    assert "spaniel" not in written
    assert (tmp_path / "runs" / "dogs" / "report.html").is_file()
