"""What all figures share: colours that can be read on both pages, SVG that a page can hold."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from rotate_edit.console import plain
from rotate_edit.reporting import drawing

HOSTILE = '</svg><script>alert("x")</script>&amp;\x1b[31m $x^2$'


def luminance(colour: str) -> float:
    """Relative luminance of "#rrggbb" (WCAG 2)."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("page", [0, 1], ids=["light", "dark"])
def test_every_colour_can_be_read_on_its_page(page: int) -> None:
    paper = luminance(drawing.COLOURS["paper"][page])
    for name, pair in drawing.COLOURS.items():
        lighter, darker = sorted((luminance(pair[page]), paper), reverse=True)
        if name not in ("paper", "rule"):
            assert (lighter + 0.05) / (darker + 0.05) >= 4.5, name


@pytest.fixture
def text() -> str:
    with drawing.style():
        figure = drawing.canvas(120, 80)
        axes = drawing.axes_at(figure, 10, 10, 100, 60)
        axes.plot([0, 1], [0, 1], color=drawing.LIGHT["blue"])
        axes.set_xlabel(plain(HOSTILE))
    return drawing.svg(figure, "one", HOSTILE, "what is to be seen")


def test_hostile_text_stays_text_in_an_svg(text: str) -> None:
    root = ElementTree.fromstring(text)
    assert "script" not in {element.tag.rsplit("}", 1)[-1] for element in root.iter()}
    assert "\x1b" not in text
    # Dollars do not start mathematics: every character is there as it was given.
    assert any("$x^2$" in (element.text or "") for element in root.iter())


def test_an_svg_is_described_and_takes_its_colours_from_the_page(text: str) -> None:
    root = ElementTree.fromstring(text)
    named = {element.get("id"): element.text for element in root if element.get("id")}
    assert root.get("role") == "img"
    assert [name in named for name in str(root.get("aria-labelledby")).split()] == [True, True]
    assert named["one-description"] == "what is to be seen"
    bare = [colour for colour in drawing.LIGHT.values() if re.search(rf"(?<!, ){colour}", text)]
    assert bare == []
    assert f"var(--blue, {drawing.LIGHT['blue']})" in text


def test_two_figures_of_one_page_share_no_id(text: str) -> None:
    with drawing.style():
        figure = drawing.canvas(120, 80)
        drawing.axes_at(figure, 10, 10, 100, 60).plot([0, 1], [0, 1])
    other = drawing.svg(figure, "two", "t", "d")
    ids = [set(re.findall(r' id="([^"]+)"', one)) for one in (text, other)]
    assert ids[0]
    assert not ids[0] & ids[1]
    for one, own in zip((text, other), ids):
        assert set(re.findall(r'href="#([^"]+)"', one)) | set(re.findall(r"url\(#([^)]+)\)", one)) <= own


def test_the_same_figure_is_the_same_text_and_picture() -> None:
    def draw() -> tuple[str, bytes]:
        with drawing.style():
            figure = drawing.canvas(60, 40)
            drawing.axes_at(figure, 5, 5, 50, 30).plot([0, 1], [1, 0])
        return drawing.svg(figure, "x", "t", "d"), drawing.png(figure)

    assert draw() == draw()
    assert draw()[1].startswith(b"\x89PNG")
