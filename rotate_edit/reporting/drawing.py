"""What all figures share: palette, type, a canvas in pixels, and output as SVG text or PNG bytes.

An SVG for a page carries no colour of its own. Each colour is a CSS variable (`--ink`, `--blue`, ...) with the light
one as its fallback. So the page decides between light and dark. Every size is in pixels.
"""

import io
import re
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rotate_edit.console import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Every colour has at least 4.5 to 1 against the page, in both columns: light page, dark page.
COLOURS = {
    "paper": ("#ffffff", "#15181c"),
    "ink": ("#1b1f24", "#e8eaed"),
    "muted": ("#59616a", "#a3abb5"),
    "rule": ("#d5d9de", "#3a4048"),
    "blue": ("#0b5cad", "#6cb2ff"),
    "green": ("#0a7558", "#4fc9a0"),
    "red": ("#b23c0c", "#ff9568"),
    "ochre": ("#855800", "#e0b04c"),
    "purple": ("#8a3c78", "#e08fcb"),
    "teal": ("#35667a", "#7fbdd4"),
    "grey": ("#676d75", "#9aa2ab"),
}
LIGHT = {name: light for name, (light, _) in COLOURS.items()}

WIDE, NARROW = 800, 352


@contextmanager
def style() -> Iterator[None]:
    """Put matplotlib's settings for all figures in force inside the block.

    Yields:
        Nothing.
    """
    import matplotlib

    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "rotate-edit",
        "text.parse_math": False,
        "font.size": 13,
        "font.family": ["DejaVu Sans"],
        "text.color": LIGHT["ink"],
        "axes.edgecolor": LIGHT["muted"],
        "axes.labelcolor": LIGHT["muted"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": LIGHT["muted"],
        "ytick.color": LIGHT["muted"],
        "xtick.labelsize": 12,
        "ytick.labelsize": 12,
        "lines.solid_capstyle": "round",
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # A token may be in any script; a page brings its own fonts, so a glyph missing here does not matter.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


def canvas(width: float, height: float) -> "Figure":
    """Make an empty figure.

    Args:
        width: Width in pixels.
        height: Height in pixels.

    Returns:
        The figure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    FigureCanvasAgg(figure)
    return figure


def axes_at(figure: "Figure", left: float, top: float, width: float, height: float) -> "Axes":
    """Add axes at a place given in pixels from the figure's upper left corner.

    Args:
        figure: The figure.
        left: Distance from the left edge in pixels.
        top: Distance from the upper edge in pixels.
        width: Width in pixels.
        height: Height in pixels.

    Returns:
        The axes.
    """
    whole_width, whole_height = figure.get_size_inches() * 72
    box = (left / whole_width, 1 - (top + height) / whole_height, width / whole_width, height / whole_height)
    return figure.add_axes(box)


def svg(figure: "Figure", name: str, title: str, description: str) -> str:
    """Write the figure as an SVG element for a page.

    It is coloured by CSS variables, and its ids are prefixed by `name`. Untrusted text in the title, the description
    and the figure stays text.

    Args:
        figure: The figure.
        name: Prefix of the ids, unique on the page.
        title: Title, read out by screen readers.
        description: Description, read out by screen readers.

    Returns:
        The SVG element as text.
    """
    stream = io.StringIO()
    with style():
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    root = ElementTree.fromstring(stream.getvalue().encode())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style", "}title")):
                parent.remove(child)
    for element in root.iter():
        _for_page(element, name)
    width, height = figure.get_size_inches() * 72
    root.attrib = {
        "xmlns": "http://www.w3.org/2000/svg",
        "viewBox": f"0 0 {width:g} {height:g}",
        "role": "img",
        "aria-labelledby": f"{name}-title {name}-description",
        "stroke-linejoin": "round",
    }
    for place, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(tag, {"id": f"{name}-{'title' if tag == 'title' else 'description'}"})
        element.text = plain(text)
        root.insert(place, element)
    return ElementTree.tostring(root, encoding="unicode")


def _for_page(element: ElementTree.Element, name: str) -> None:
    """Drop namespaces, keep ids apart from those of other figures, turn colours and fonts into CSS variables."""
    element.tag = element.tag.rsplit("}", 1)[-1]
    attributes = {key.rsplit("}", 1)[-1]: value for key, value in element.attrib.items()}
    if "id" in attributes:
        attributes["id"] = f"{name}-{attributes['id']}"
    for key in ("href", "clip-path"):
        if key in attributes:
            attributes[key] = attributes[key].replace("#", f"#{name}-", 1)
    for key, value in attributes.items():
        if key in ("style", "fill", "stroke"):
            for colour, light in LIGHT.items():
                value = value.replace(light, f"var(--{colour}, {light})")
            attributes[key] = re.sub(r"font-family: [^;]*", "font-family: var(--font, system-ui, sans-serif)", value)
    element.attrib = attributes


def png(figure: "Figure", *, pixels_per_unit: float = 2.0) -> bytes:
    """Write the figure as a PNG on a white page, for places that show no SVG.

    Args:
        figure: The figure.
        pixels_per_unit: Image pixels for one pixel of the figure.

    Returns:
        The bytes of the PNG file.
    """
    stream = io.BytesIO()
    with style():
        figure.savefig(stream, format="png", dpi=72 * pixels_per_unit, facecolor="white", metadata={"Software": None})
    return stream.getvalue()
