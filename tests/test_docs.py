"""What the documents show is true: links lead to files, tables are up to date, examples run."""

import re
from pathlib import Path

import pytest
import yaml
from documents import PAGES, blocks
from places import ROOT

from rotate_edit.edits.methods.table import method_table
from rotate_edit.recipe import parse_recipe


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link]
    assert all((page.parent / link).exists() for link in local), local


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_recipes_in_documents_are_recipes(page: Path) -> None:
    for block in blocks(page, "yaml"):
        content = yaml.safe_load(block)
        if isinstance(content, dict) and {"model", "concepts"} <= set(content):
            assert parse_recipe(content, page.name).concepts


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_sentences_are_short(page: Path) -> None:
    text = re.sub(r"```.*?```|^ {4}.*$|\|.*", " ", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    long = [sentence for sentence in re.split(r"(?<=[.!?:])\s+|\n\s*[*\d]+\.? ", text) if len(sentence.split()) > 40]
    assert not long, long


def test_the_table_of_methods_is_up_to_date() -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert text.split("<!-- methods -->")[1].split("<!-- /methods -->")[0].strip() == method_table()


def test_the_tree_names_every_package_and_module() -> None:
    text = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
    for path in (ROOT / "rotate_edit").iterdir():
        if path.suffix == ".py":
            assert f"── {path.name} " in text, path.name
        elif (path / "__init__.py").is_file():
            assert f"── {path.name}/ " in text, path.name


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
    assert (tmp_path / "dogs-silenced" / "model.safetensors").is_file()
