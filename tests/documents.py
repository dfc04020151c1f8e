"""The documents, and the examples in them."""

import re
from pathlib import Path

from places import ROOT

PAGES = sorted([ROOT / "README.md", ROOT / "evals" / "README.md", *(ROOT / "docs").glob("*.md")])


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
