"""The report: hostile text stays text, the files are self-contained, everything that was measured is in them."""

import html
import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from browser import Page, browser, chromium
from made_up_run import HOSTILE, run_folder

from rotate_edit.errors import BadInput
from rotate_edit.reporting.report import fence, markdown, without_home, write_report


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    written = run_folder(tmp_path_factory.mktemp("runs") / "run")
    write_report(written)
    return written


@pytest.fixture
def page(folder: Path) -> str:
    return (folder / "report.html").read_text()


@pytest.fixture
def text(folder: Path) -> str:
    return (folder / "report.md").read_text()


def test_hostile_text_stays_text_in_html(page: str) -> None:
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert "{{ 7*7 }}" in html.unescape(page)


def test_hostile_text_stays_text_in_markdown(text: str) -> None:
    opening = re.search(r"^(`{3,})yaml$", text, flags=re.MULTILINE)
    assert opening is not None
    # The recipe stands in a block that no run of backticks inside it can end; nothing else is left unescaped.
    before, block = text[: opening.start()], text[opening.end() :]
    assert block.count(opening.group(1)) == 1
    assert "\x1b" not in text
    assert "<script" not in before.replace("\\<", "")
    assert not re.search(r"(?<!\\)\]\(", before)
    tables = [line for line in before.splitlines() if line.startswith("|")]
    cells = [len(re.findall(r"(?<!\\)\|", line)) for line in tables]
    separators = [number for number, line in enumerate(tables) if set(line) <= set("|-")]
    for start, end in zip(separators, [*separators[1:], len(tables) + 1]):
        assert len(set(cells[start - 1 : end - 1])) == 1


def test_a_fence_is_longer_than_any_run_in_the_text() -> None:
    assert fence("no ticks") == "```"
    assert fence("a ``` b ````` c") == "``````"


def test_the_page_needs_nothing_from_outside(page: str) -> None:
    assert "default-src 'none'" in page
    assert page.count("<svg") == 6
    assert "<title>" in page
    assert 'src="http' not in page
    assert "<link" not in page
    assert "url(http" not in page


def test_both_reports_hold_what_was_measured(page: str, text: str) -> None:
    seen = html.unescape(page).replace("\u00a0", " ")
    for value in ("90 %", "80 %", "25 %", "never removes that much", "512 MB", "4 seconds", "seed", "How to undo it"):
        assert value in seen
    assert "0.9 (0.45 to 1.8)" in text
    assert "| locate | 3.0 |" in text
    assert "| 0 | 1 |" in text
    assert "no difference was shown" in text


def test_words_of_the_concept_are_marked_as_whole_words(page: str, text: str) -> None:
    assert "a <mark>DOG</mark>, two <mark>dogs</mark>" in page
    assert "a hotdog" in page
    assert "a **DOG**, two **dogs**" in text


def test_no_home_folder_in_a_report(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", "dogs")
    write_report(folder)
    for name in ("report.html", "report.md"):
        written = (folder / name).read_text()
        assert f"{Path.home()}/" not in written
        assert "~/models/demo" in written
    assert without_home(f"{Path.home()}less") == f"{Path.home()}less"


def test_a_failed_run_says_why(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", failure="No channel carries it.", curves={}, matched={}, summary={})
    write_report(folder)
    assert "No channel carries it." in (folder / "report.html").read_text()
    assert markdown("No channel carries it.") in (folder / "report.md").read_text()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="not a run folder"):
        write_report(tmp_path)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything in a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, entry in inside for found in leaves(entry, (*path, key)))]


WRONG = [HOSTILE, None, [], {}, -1, 1e308]


@pytest.mark.parametrize(
    "share", [0.02, pytest.param(0.2, marks=pytest.mark.slow)], ids=["a few places", "many places"]
)
def test_whatever_stands_in_an_evaluation_is_refused_or_harmless(tmp_path: Path, share: float) -> None:
    folder = run_folder(tmp_path / "run", "dogs")
    write_report(folder, drawn=False)
    assert "<svg" not in (folder / "report.html").read_text()
    good = (folder / "evaluation.json").read_text()
    cases = [(path, wrong) for path in leaves(json.loads(good))[1:] for wrong in WRONG]
    chosen = random.Random(0).sample(cases, int(share * len(cases)))
    refused: list[str] = []
    for path, wrong in chosen:
        result = json.loads(good)
        place = result
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = wrong
        (folder / "evaluation.json").write_text(json.dumps(result))
        try:
            write_report(folder, drawn=False)
        except BadInput as error:
            refused.append(str(error))
        assert "<script" not in (folder / "report.html").read_text()
        text = (folder / "report.md").read_text()
        assert "<script" not in text.replace("\\<", "")
        assert "\x1b" not in text
    assert all("evaluation.json" in sentence for sentence in refused)
    assert len(refused) < len(chosen)


# In a browser.

CONTRAST = """(() => {
  const linear = v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const luminance = c => { const [r, g, b] = c.map(v => linear(v / 255));
    return .2126 * r + .7152 * g + .0722 * b; };
  const numbers = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const behind = element => { for (let e = element; e; e = e.parentElement) {
      const c = numbers(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] === 1) return c.slice(0, 3); } return [255, 255, 255]; };
  const poor = [];
  for (const element of document.querySelectorAll('body *')) {
    const own = [...element.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || !element.getClientRects().length) continue;
    const style = getComputedStyle(element);
    const front = numbers(element instanceof SVGElement ? style.fill : style.color).slice(0, 3);
    const [a, b] = [luminance(front), luminance(behind(element))].sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05);
    if (ratio < 4.5) poor.push([element.tagName, element.textContent.slice(0, 30), ratio]);
  }
  return poor; })()"""
SHOWN_FIGURES = """[...document.querySelectorAll('svg[role=img]')].filter(s => s.getClientRects().length).map(s => ({
  title: s.querySelector('title').textContent, described: s.querySelector('desc').textContent.length,
  labelled: s.getAttribute('aria-labelledby').split(' ').every(id => document.getElementById(id)),
  width: s.getBoundingClientRect().width,
  shapes: s.querySelectorAll('path').length, texts: s.querySelectorAll('text').length }))"""


@pytest.fixture(scope="module")
def opened(folder: Path) -> Any:
    if chromium() is None:
        pytest.skip("there is no Chromium here")
    with browser() as page:
        yield page, folder


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(opened: tuple[Page, Path], width: int, dark: bool) -> None:
    page, folder = opened
    page.messages.clear()
    page.open(folder / "report.html", width=width, dark=dark)
    page.screenshot(folder / f"report-{width}-{'dark' if dark else 'light'}.png")
    assert page.messages == []
    assert page.ask("document.title").endswith("rotate_edit report")
    assert page.ask("document.documentElement.lang") == "en"
    assert page.ask("document.documentElement.scrollWidth") <= width
    assert page.ask("document.querySelectorAll('script, img:not([alt])').length") == 0
    # The first table, damage at equal removal, is read without scrolling on a phone as well.
    assert page.ask("(table => table.scrollWidth <= table.clientWidth)(document.querySelector('.scroll'))")
    figures = page.ask(SHOWN_FIGURES)
    assert len(figures) == 3
    for figure in figures:
        assert figure["title"]
        assert figure["described"] > 10
        assert figure["labelled"]
        assert 300 <= figure["width"] <= width
        assert figure["shapes"] > 5
        assert figure["texts"] >= 3
    page.ask("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.ask(CONTRAST) == []
    assert page.ask("document.documentElement.scrollWidth") <= width
    assert (page.ask("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)") == dark
    assert (folder / f"report-{width}-{'dark' if dark else 'light'}.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_every_link_leads_somewhere_and_headings_go_down_in_steps(opened: tuple[Page, Path]) -> None:
    page, folder = opened
    page.open(folder / "report.html", width=1280, dark=False)
    targets = page.ask("[...document.querySelectorAll('a')].map(a => !!document.querySelector(a.getAttribute('href')))")
    assert targets
    assert all(targets)
    levels = page.ask("[...document.querySelectorAll('h1,h2,h3,h4')].map(h => Number(h.tagName[1]))")
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


@pytest.mark.slow
def test_a_page_prints_on_white_in_full(opened: tuple[Page, Path]) -> None:
    page, folder = opened
    page.open(folder / "report.html", width=1280, dark=True)
    page.call("Emulation.setEmulatedMedia", media="print")
    assert page.ask("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert page.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.call("Page.printToPDF")["data"]
