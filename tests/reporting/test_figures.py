"""The report's figures hold what they are given: every method, every neuron, every interval."""

import math
import re
from typing import Any

import pytest

from rotate_edit.edits.methods import method_names, style_of
from rotate_edit.reporting import drawing, figures
from rotate_edit.reporting.figures import CurvePoint, EditedNeuron, ForestRow


def point(strength: float, mass: float, damage: float) -> CurvePoint:
    return CurvePoint(strength, mass, damage, damage / 2, damage * 2)


CURVES = {
    "channel-located": [point(1, 0.5, 1e-3), point(4, 0.05, 1e-2)],
    "direction-everywhere": [point(1, 0.4, 1e-2), point(4, 0.01, 1e-1)],
    "zero-neurons": [point(1, 0.9, 1e-3)],
}


def texts(figure: Any) -> list[str]:
    drawn = drawing.svg(figure, "x", "", "")
    return re.findall(r"<text[^>]*>([^<]*)</text>", drawn)


def test_every_method_has_a_look_of_its_own() -> None:
    methods = method_names()
    looks = [style_of(method) for method in methods]
    assert len({(colour, str(dashes), marker) for colour, dashes, marker in looks}) == len(methods)
    # Never by hue alone.
    assert len({(str(dashes), marker) for _, dashes, marker in looks}) == len(methods)
    assert all(colour in drawing.COLOURS for colour, _, _ in looks)


@pytest.mark.parametrize("narrow", [False, True])
def test_every_curve_is_named_and_the_chosen_strength_is_ringed(narrow: bool) -> None:
    written = texts(figures.removal_damage(CURVES, "channel-located", strength=2.0, narrow=narrow))
    assert {"channel-located (chosen)", "direction-everywhere", "zero-neurons", "strength 2"} <= set(written)


def test_points_that_cannot_be_drawn_are_left_out() -> None:
    def row(strength: Any, mass: Any, damage: Any) -> dict[str, Any]:
        return {"strength": strength, "mass": {"value": mass}, "collateral_kl": {"value": damage}}

    rows = [row(4, 0.1, 0.2), row(1, None, 0.1), row(2, 0.5, 0.0), row(3, math.nan, 1.0), row(-1, 0.9, 0.1)]
    assert [(found.strength, found.mass) for found in figures.curve_points(rows)] == [(-1, 0.9), (4, 0.1)]


def test_between_measured_strengths_logarithms_are_linear() -> None:
    found = figures.point_at(CURVES["channel-located"], 2.5)
    assert found is not None
    assert found.mass == pytest.approx(math.sqrt(0.5 * 0.05))
    assert found.damage == pytest.approx(math.sqrt(1e-3 * 1e-2))
    assert figures.point_at(CURVES["channel-located"], 5.0) is None
    assert figures.point_at(CURVES["channel-located"], None) is None


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("layers", [3, 80])
def test_a_strip_has_a_tick_for_every_neuron_and_counts_them(narrow: bool, layers: int) -> None:
    neurons = [
        EditedNeuron(0, 5, "out"),
        EditedNeuron(2, 7, "out"),
        EditedNeuron(2, 9, "out"),
        EditedNeuron(2, 9, "in"),
    ]
    figure = figures.layer_strip(neurons, layers, 10, narrow=narrow)
    ticks = [
        (round(float(x) - 0.5), int(y)) for line in figure.axes[0].lines for x, y in line.get_xydata()[::3].tolist()
    ]
    assert sorted(ticks) == [(5, 0), (7, 2), (9, 2), (9, 2)]
    written = texts(figure)
    assert "3" in written
    assert {"in", "out"} <= set(written)


@pytest.mark.parametrize("narrow", [False, True])
def test_a_forest_shows_every_interval_on_the_scale_of_its_panel(narrow: bool) -> None:
    rows = [
        ForestRow("dogs", "concept", "the concept: accuracy", -90.0, -100.0, -80.0, "1 → 0.1", True),
        ForestRow("cats", "neighbour", "the rest: accuracy", 0.5, -1.0, 2.0, "0.8 → 0.8", False),
        ForestRow(
            "a very long name of a task that nobody can read", "general", "the rest: accuracy", 0, 0, 0, "", False
        ),
    ]
    figure = figures.forest(rows, narrow=narrow)
    assert len(figure.axes) == 2
    first, second = figure.axes
    assert first.get_xlim()[0] < -100
    assert first.get_xlim()[1] > 0
    assert second.get_xlim()[0] > -3
    bars = [tuple(line.get_xdata()) for axes in figure.axes for line in axes.lines if len(line.get_xdata()) == 2]
    assert bars == [(-100.0, -80.0), (-1.0, 2.0), (0, 0)]
    filled = [
        line.get_markerfacecolor() != drawing.LIGHT["paper"]
        for axes in figure.axes
        for line in axes.lines
        if line.get_marker() == "o"
    ]
    assert filled == [True, False, False]
    assert any(text.endswith("…") for text in texts(figure))
