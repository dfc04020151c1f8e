"""The report of a run folder: report.md and a self-contained report.html, from its recipe.yaml and evaluation.json."""

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rotate_edit.console import plain
from rotate_edit.errors import BadInput
from rotate_edit.files import write_atomically
from rotate_edit.reporting import content as report_content
from rotate_edit.reporting import drawing, figures

if TYPE_CHECKING:
    import jinja2
    from matplotlib.figure import Figure

MARKDOWN_SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#+\-.!|~&])")
NO_FIGURES: dict[str, Any] = {"curves": {}, "strips": {}, "forest": None}
LINE_BREAKS = re.compile(r"\s*[\r\n\u2028\u2029]+\s*")


def write_report(folder: Path, *, drawn: bool = True) -> None:
    """Write both reports of a run folder.

    Args:
        folder: The run folder.
        drawn: Whether the page has its figures, which take most of the time.

    Raises:
        BadInput: The folder is not a run folder.
    """
    try:
        result = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        recipe = (folder / "recipe.yaml").read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise BadInput(f"{folder} is not a run folder: recipe.yaml and evaluation.json cannot be read.") from error
    from jinja2 import TemplateError

    try:
        content = _content(folder, result, without_home(recipe))
        page = _render("report.html.j2", content | (_figures(result) if drawn else NO_FIGURES), escape=True)
        text = _render("report.md.j2", content, escape=False)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, TemplateError) as error:
        raise BadInput(
            f"evaluation.json in {folder} does not have the form that a run writes; run it again."
        ) from error
    write_atomically(folder / "report.html", page)
    write_atomically(folder / "report.md", text)


def _content(folder: Path, result: dict[str, Any], recipe: str) -> dict[str, Any]:
    from rotate_edit.evaluation.generations import word_pattern

    words = report_content.concept_words(result)
    pattern = word_pattern(words) if words else None
    neurons = {
        concept["name"]: report_content.edited_neurons(result, concept["name"]) for concept in result["concepts"]
    }
    return {
        "result": result,
        "recipe": recipe,
        "variant": report_content.variant_of(result),
        "title": report_content.title(result),
        "headline": report_content.headline(result),
        "method": report_content.method_sentence(result),
        "tiles": report_content.tiles(result),
        "outcome": report_content.outcome(result),
        "channels": {c["name"]: report_content.channel_rows(result, c) for c in result["concepts"]},
        "layers": {name: report_content.layer_counts(found) for name, found in neurons.items()},
        "marked": lambda text: report_content.pieces(LINE_BREAKS.sub(" ↵ ", str(text)), pattern),
        "cost": report_content.cost(result),
        "provenance": report_content.provenance(result),
        "provenance_of": result.get("provenance") or {},
        "has": {
            name: (folder / path).exists()
            for name, path in (("undo", "edit/undo.safetensors"), ("model", "model"), ("adapter", "adapter"))
        },
    }


# Text in its place.


def number(value: Any) -> str:
    """Write a figure for a table.

    Args:
        value: The value.

    Returns:
        The figure, whole numbers in full. A dash for what is no number.
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def figure(value: Any, share: bool) -> str:
    """Write a figure for a tile.

    Args:
        value: The value.
        share: Whether the value is a share.

    Returns:
        The figure, in per cent when it is a share.
    """
    return f"{100 * value:.3g}\u00a0%" if share and isinstance(value, int | float) else number(value)


def interval(measure: dict[str, Any] | None) -> str:
    """Write a measure with its 95 % interval.

    Args:
        measure: The measure as plain JSON, or None.

    Returns:
        The text. A dash without a value, and no interval where there is none.
    """
    if measure is None or measure.get("value") is None:
        return "–"
    if measure.get("low") is None:
        return number(measure["value"])
    return f"{number(measure['value'])} ({number(measure['low'])} to {number(measure['high'])})"


def markdown(text: Any) -> str:
    """Write untrusted text as plain text in Markdown.

    Args:
        text: The text.

    Returns:
        Text without markup, cell borders or control characters.
    """
    return MARKDOWN_SPECIAL.sub(r"\\\1", plain(str(text)))


def fence(text: str) -> str:
    """Make a line of backticks longer than any in the text, so that the text cannot end the block it stands in.

    Args:
        text: The text.

    Returns:
        The line, at least three backticks.
    """
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    return "`" * max(3, longest + 1)


def without_home(text: str) -> str:
    """Write `~` for the home folder of whoever writes the report, which would give their name away.

    Args:
        text: The text.

    Returns:
        The text without the home folder.
    """
    home = str(Path.home())
    return re.sub(rf"{re.escape(home)}(?=[/\\\s'\"]|$)", "~", text) if len(home) > 1 else text


def _lines(text: str) -> str:
    return "\n".join(plain(line) for line in text.splitlines())


def _render(template: str, content: dict[str, Any], *, escape: bool) -> str:
    return _environment(escape).get_template(template).render(**content, colours=drawing.COLOURS)


@cache
def _environment(escape: bool) -> "jinja2.Environment":
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rotate_edit.reporting"), autoescape=escape, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "number": number,
        "figure": figure,
        "interval": interval,
        "markdown": markdown,
        "plain": plain,
        "lines": _lines,
        "fence": fence,
    }
    return environment


# Drawings in their place.


def _figures(result: dict[str, Any]) -> dict[str, Any]:
    """Every figure in its two widths as SVG: by concept the curve and the strip, and the forest plot."""
    curves, strips = {}, {}
    model = result.get("model") or {}
    for place, concept in enumerate(result["concepts"]):
        name = concept["name"]
        methods = (result.get("curves") or {}).get(name)
        if methods:
            curves[name] = _both(f"curve{place}", *_curve_text(name, methods), _curve(result, concept, methods))
        neurons = report_content.edited_neurons(result, name)
        if neurons and model.get("layers") and model.get("neurons"):
            width = max(int(model["neurons"]), 1 + max(neuron.place for neuron in neurons))
            counts = ", ".join(f"{n} in layer {k}" for k, n in report_content.layer_counts(neurons).items())
            title = f"Where the {len(neurons)} edited vectors of {plain(name)} stand in the model"
            strips[name] = _both(
                f"strip{place}", title, f"{counts}.",
                lambda narrow, n=neurons, w=width: figures.layer_strip(n, int(model["layers"]), w, narrow=narrow),
            )  # fmt: skip
    rows = report_content.forest_rows(result)
    forest = None
    if rows:
        told = "; ".join(f"{row.label}: {row.value:.3g} ({row.low:.3g} to {row.high:.3g})" for row in rows)
        forest = _both(
            "forest", "Differences of edited and base model with 95 % intervals", f"{told}.",
            lambda narrow: figures.forest(rows, narrow=narrow),
        )  # fmt: skip
    return {"curves": curves, "strips": strips, "forest": forest}


def _curve(result: Mapping[str, Any], concept: Mapping[str, Any], methods: Mapping[str, Any]) -> Any:
    points = {method: figures.curve_points(rows) for method, rows in methods.items()}
    strength = concept["strength"] if isinstance(concept["strength"], int | float) else None
    return lambda narrow: figures.removal_damage(points, result["chosen_method"], strength=strength, narrow=narrow)


def _curve_text(name: str, methods: Mapping[str, Any]) -> tuple[str, str]:
    lines = ", ".join(plain(method) for method in methods)
    return (
        f"Removal of {plain(name)} against damage",
        f"One line a method ({lines}); further right is more of the concept removed, lower is less damage.",
    )


def _both(name: str, title: str, description: str, draw: Any) -> str:
    """The wide and the narrow drawing one after another; the page shows the one that fits."""
    parts = []
    for width, narrow in (("wide", False), ("narrow", True)):
        drawn: Figure = draw(narrow)
        parts.append(f'<div class="only-{width}">{drawing.svg(drawn, f"{name}-{width}", title, description)}</div>')
    return "".join(parts)
