"""The report's figures: plain data goes in, a matplotlib figure comes out.

`drawing` turns the figure into SVG or PNG. Every size is in pixels. Every figure has a wide form for a page and a
narrow one for a phone.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rotate_edit.console import plain
from rotate_edit.edits.methods import style_of
from rotate_edit.reporting.drawing import LIGHT, NARROW, WIDE, axes_at, canvas, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MATRIX_COLOURS = {"gate": "ochre", "in": "green", "out": "blue"}
GROUP_COLOURS = {"concept": "blue", "neighbour": "ochre", "general": "grey"}

LEAST_MASS = 1e-4
NEAR_SPOTS = 8


@dataclass(frozen=True)
class CurvePoint:
    """One strength of one method.

    Attributes:
        strength: The edit's strength.
        mass: The concept's mass, as a fraction of the base's.
        damage: The damage, KL divergence in nats.
        low: Lower end of the damage's interval, in nats.
        high: Upper end of the damage's interval, in nats.
    """

    strength: float
    mass: float
    damage: float
    low: float
    high: float


@dataclass(frozen=True)
class ForestRow:
    """One task's paired difference (edited - base) with its 95 % interval.

    Attributes:
        label: Name of the task.
        group: "concept", "neighbour" or "general".
        panel: Title of the row's panel, which names the unit. Each unit has a panel of its own.
        value: The difference, in the unit of its panel.
        low: Lower end of the interval, in the same unit.
        high: Upper end of the interval, in the same unit.
        values: The text beside it, for instance "0.98 → 0.27".
        clear: Whether the corrected p-value is below 0.05.
    """

    label: str
    group: str
    panel: str
    value: float
    low: float
    high: float
    values: str
    clear: bool


# Removal against damage.


def curve_points(rows: Sequence[Mapping[str, Any]]) -> list[CurvePoint]:
    """Read the points of a curve of evaluation.json that can be drawn on logarithmic axes.

    Args:
        rows: The curve's rows, with `strength`, `mass` and `collateral_kl`.

    Returns:
        The points in the order of |strength|.
    """
    points = []
    for row in rows:
        mass, damage = row.get("mass") or {}, row.get("collateral_kl") or {}
        numbers = [row.get("strength"), mass.get("value"), damage.get("value"), damage.get("low"), damage.get("high")]
        strength, share, value, low, high = (
            float(item) if isinstance(item, (int, float)) and math.isfinite(item) else math.nan for item in numbers
        )
        if math.isfinite(strength) and share >= 0 and value > 0:
            bounds = (low if low > 0 else value, high if high > 0 else value)
            points.append(CurvePoint(strength, max(share, LEAST_MASS / 10), value, *bounds))
    return sorted(points, key=lambda point: abs(point.strength))


def point_at(points: Sequence[CurvePoint], strength: float | None) -> CurvePoint | None:
    """Interpolate a curve at a strength.

    The logarithms of mass and damage are linear in between.

    Args:
        points: The curve, ascending in |strength|.
        strength: The strength. None gives None.

    Returns:
        The point. None outside the measured range.
    """
    for point in points:
        if strength is not None and math.isclose(point.strength, strength, rel_tol=1e-9):
            return point
    for before, after in itertools.pairwise(points):
        if strength is not None and min(before.strength, after.strength) < strength < max(
            before.strength, after.strength
        ):
            share = (strength - before.strength) / (after.strength - before.strength)

            def between(first: float, second: float, share: float = share) -> float:
                return math.exp(math.log(first) * (1 - share) + math.log(second) * share)

            damage = between(before.damage, after.damage)
            return CurvePoint(strength, between(before.mass, after.mass), damage, damage, damage)
    return None


def removal_damage(
    curves: Mapping[str, Sequence[CurvePoint]],
    chosen_method: str,
    *,
    strength: float | None = None,
    target: float | None = 0.1,
    narrow: bool = False,
) -> "Figure":
    """Draw every method's curve: removal of the concept against damage.

    Removal is the share of the concept removed, or how many times it is amplified. A ring marks the chosen point. Both
    axes are logarithmic, in what is left of the concept's mass and in nats. So straight lines between measured
    strengths are the interpolation that the comparison at equal removal uses.

    Args:
        curves: Each method's points, by the method's name.
        chosen_method: Name of the method that was chosen.
        strength: Strength of the chosen point. None draws no ring.
        target: The mass at which methods are compared, as a fraction of the base's. None draws no line.
        narrow: Draw the form for a phone.

    Returns:
        The figure.
    """
    drawn = {method: list(points) for method, points in curves.items() if points}
    amplified = any(point.strength < 0 for point in drawn.get(chosen_method, ()))
    sign = 1 if amplified else -1
    with style():
        figure = canvas(NARROW if narrow else WIDE, 400 if narrow else 440)
        axes = axes_at(figure, 54, 26, 270, 318) if narrow else axes_at(figure, 66, 26, 586, 358)
        axes.set_yscale("log")
        lines: dict[str, list[tuple[float, float]]] = {}
        order = sorted(drawn, key=lambda method: method == chosen_method)
        for method in order:
            points = drawn[method]
            lines[method] = [
                (sign * math.log10(min(max(point.mass, LEAST_MASS), 1e4)), point.damage) for point in points
            ]
            _draw_curve(axes, method, points, lines[method], chosen=method == chosen_method)
        _removal_axis(axes, lines, amplified=amplified, narrow=narrow)
        _damage_axis(axes, lines)
        if target is not None and not amplified:
            axes.axvline(-math.log10(target), color=LIGHT["muted"], linewidth=1, linestyle=(0, (2, 3)), zorder=0)
        labels = {method: _curve_label(method, chosen_method) for method in reversed(order)}
        chosen = point_at(drawn.get(chosen_method, ()), strength)
        if chosen is not None:
            place = (sign * math.log10(min(max(chosen.mass, LEAST_MASS), 1e4)), chosen.damage)
            axes.plot(*place, "o", markersize=15, markerfacecolor="none", markeredgecolor=LIGHT["ink"], zorder=6)
            lines[""] = [place]
            labels = {"": f"strength {chosen.strength:.3g}"} | labels
        _place_labels(axes, lines, labels)
    return figure


def _curve_label(method: str, chosen_method: str) -> str:
    return plain(method)[:40] + (" (chosen)" if method == chosen_method else "")


def _draw_curve(
    axes: "Axes", method: str, points: Sequence[CurvePoint], line: Sequence[tuple[float, float]], *, chosen: bool
) -> None:
    colour, dashes, marker = style_of(method)
    horizontal, vertical = zip(*line)
    axes.plot(
        horizontal,
        vertical,
        color=LIGHT[colour],
        linestyle="-" if chosen else dashes,
        linewidth=2.8 if chosen else 1.5,
        marker=marker,
        markersize=6.5 if chosen else 4.5,
        markeredgecolor=LIGHT["paper"],
        markeredgewidth=0.6,
        zorder=5 if chosen else 3,
    )
    if chosen:
        low, high = [point.low for point in points], [point.high for point in points]
        axes.fill_between(horizontal, low, high, color=LIGHT[colour], alpha=0.15, linewidth=0, zorder=1)


def _removal_axis(
    axes: "Axes", lines: Mapping[str, Sequence[tuple[float, float]]], *, amplified: bool, narrow: bool
) -> None:
    furthest = max((place for line in lines.values() for place, _ in line), default=1.0)
    if amplified:
        ticks = {math.log10(times): f"{times}×" for times in (1, 2, 5, 10, 20, 50, 100, 1000)}
        axes.set_xlabel("the concept's probability mass, times the base model's")
        right = max(0.8, furthest)
    else:
        # Of two ticks that would overlap, the first in this order is shown.
        shares = (0, 0.9, 0.99, 0.999, 0.9999, 0.5, 0.8, 0.95)
        ticks = {-math.log10(1 - share): f"{100 * share:g} %" for share in shares}
        axes.set_xlabel(
            "share of the concept's mass removed" if narrow else "share of the concept's mass removed (log)"
        )
        right = max(1.2, furthest)
    axes.set_xlim(-0.08, right * 1.03)
    apart = 40 * right / axes.get_window_extent().width
    shown: dict[float, str] = {}
    for place, text in ticks.items():
        if place <= right * 1.03 and all(abs(place - other) >= apart for other in shown):
            shown[place] = text
    axes.set_xticks(list(shown), list(shown.values()))
    axes.minorticks_off()


def _damage_axis(axes: "Axes", lines: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    damages = [damage for line in lines.values() for _, damage in line] or [1e-3, 1.0]
    top = max(damages) * 1.6
    # Nine decades are more than a reader compares; what lies below is cut off.
    bottom = max(min(damages) / 1.6, top * 1e-9)
    axes.set_ylim(bottom, top)
    decades = range(math.ceil(math.log10(bottom)), math.floor(math.log10(top)) + 1)
    step = 1 + len(decades) // 7
    axes.set_yticks([10.0**power for power in decades[::step]], [f"{10.0**power:g}" for power in decades[::step]])
    axes.minorticks_off()
    axes.tick_params(length=0)
    axes.grid(axis="y", color=LIGHT["rule"], linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)
    text = "damage: KL divergence on texts without the concept, nats (log)"
    if axes.get_window_extent().width < 400:
        text = "damage: KL without the concept, nats (log)"
    axes.annotate(text, (0, 1), (-40, 12), "axes fraction", "offset points", color=LIGHT["muted"], fontsize=12)


def _place_labels(axes: "Axes", lines: Mapping[str, Sequence[tuple[float, float]]], labels: Mapping[str, str]) -> None:
    """Write each line's name beside it where it covers least: few curve points, no other label, near its end."""
    width = axes.bbox.width / axes.get_position().width
    frame = axes.get_window_extent()
    pixels = {name: [tuple(axes.transData.transform(place)) for place in line] for name, line in lines.items()}
    ink = [place for name in pixels for place in _along(pixels[name])]
    taken: list[tuple[float, float, float, float]] = []
    for name, text in labels.items():
        if not pixels.get(name):
            continue
        colour = "ink" if not name else style_of(name)[0]
        weight = "bold" if text.endswith("(chosen)") else "normal"
        sample = axes.text(0, 0, text, fontsize=12, fontweight=weight, color=LIGHT[colour], zorder=8)
        extent = sample.get_window_extent()
        best, cost = None, math.inf
        for back, (across, up) in enumerate(reversed(pixels[name])):
            for rank, (left, low) in enumerate(_spots(across, up, extent.width, extent.height)):
                box = (left, low, left + extent.width, low + extent.height)
                if box[0] < frame.x0 or box[2] > width - 2 or box[1] < frame.y0 + 2 or box[3] > frame.y1 + 4:
                    continue
                covered = sum(box[0] - 2 < x < box[2] + 2 and box[1] - 1 < y < box[3] + 1 for x, y in ink)
                # The last spots are far from the line, for labels that would lie on another one anywhere else.
                away = 300 if rank >= NEAR_SPOTS else 1.5 * rank
                price = 12 * back + away + 12 * covered + 4000 * sum(_overlap(box, other) for other in taken)
                if price < cost:
                    best, cost = box, price
        if best is None or cost >= 4000:
            # There is no space for it: the table under the figure names every method.
            sample.remove()
            continue
        taken.append(best)
        across, up = axes.transData.inverted().transform(best[:2])
        sample.set_position((float(across), float(up)))


def _spots(across: float, up: float, width: float, height: float) -> list[tuple[float, float]]:
    """Lower left corners of a label around a point: right, left, above, below, the corners, and further off."""
    gap, middle = 11, up - height / 2
    return [
        (across + gap, middle),
        (across + 7, up + 5),
        (across - width - gap, middle),
        (across - width - 6, up + 5),
        (across + 7, up - height - 6),
        (across - width / 2, up + 9),
        (across - width / 2, up - height - 10),
        (across - width - 6, up - height - 6),
        (across + 7, up + 24),
        (across + 7, up - height - 26),
        (across - width / 2, up + 40),
        (across - width / 2, up - height - 42),
    ]


def _along(places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points every few pixels along a line."""
    dense = list(places)
    for (left, low), (right, high) in itertools.pairwise(places):
        steps = max(1, int(math.hypot(right - left, high - low) / 6))
        dense += [(left + (right - left) * k / steps, low + (high - low) * k / steps) for k in range(1, steps)]
    return dense


def _overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


# Which neurons were edited.


@dataclass(frozen=True)
class EditedNeuron:
    """The place of one edited vector.

    Attributes:
        layer: Index of the layer.
        place: Index among the layer's neurons, experts one after another.
        matrix: "gate", "in" or "out".
    """

    layer: int
    place: int
    matrix: str


def layer_strip(neurons: Sequence[EditedNeuron], layers: int, width: int, *, narrow: bool = False) -> "Figure":
    """Draw a strip of the model: one row per layer, one tick per edited neuron.

    The number of edited neurons stands on the right. Each matrix has a colour and a lane of its own in every row.

    Args:
        neurons: The edited vectors.
        layers: Number of layers of the model.
        width: Number of neurons of a layer.
        narrow: Draw the form for a phone.

    Returns:
        The figure.
    """
    row = min(24.0, max(6.0, 420 / layers))
    height = row * layers
    matrices = [matrix for matrix in MATRIX_COLOURS if any(neuron.matrix == matrix for neuron in neurons)]
    counts = [sum(neuron.layer == layer for neuron in neurons) for layer in range(layers)]
    with style():
        whole = NARROW if narrow else WIDE
        figure = canvas(whole, height + 84)
        left, right = 44, 64 if narrow else 190
        axes = axes_at(figure, left, 28, whole - left - right, height)
        for lane, matrix in enumerate(matrices):
            _draw_ticks(axes, [n for n in neurons if n.matrix == matrix], MATRIX_COLOURS[matrix], lane, len(matrices))
        axes.set_xlim(-0.004 * width, 1.004 * width)
        axes.set_ylim(layers, 0)
        step = max(1, math.ceil(14 / row))
        shown = range(0, layers, step)
        axes.set_yticks([layer + 0.5 for layer in shown], [str(layer) for layer in shown])
        axes.hlines(range(layers + 1), 0, width, color=LIGHT["rule"], linewidth=0.8 if step == 1 else 0.3, zorder=0)
        axes.tick_params(length=0)
        axes.set_xticks([0, width // 2, width - 1])
        axes.set_xlabel("neuron")
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.annotate("layer", (0, 1), (-40, 12), "axes fraction", "offset points", color=LIGHT["muted"], fontsize=12)
        _draw_counts(figure, counts, left=whole - right + 10, row=row, step=step, narrow=narrow)
        if len(matrices) > 1:
            for place, matrix in enumerate(matrices):
                text: Any = {"color": LIGHT[MATRIX_COLOURS[matrix]], "fontsize": 12, "fontweight": "bold"}
                axes.annotate(matrix, (0, 1), (30 + 48 * place, 12), "axes fraction", "offset points", **text)
    return figure


def _draw_ticks(axes: "Axes", neurons: Sequence[EditedNeuron], colour: str, lane: int, lanes: int) -> None:
    """All ticks of one matrix as one path, so that ten thousand neurons are still a small file."""
    top, share = 0.1 + 0.8 * lane / lanes, 0.8 / lanes
    horizontal = [value for neuron in neurons for value in (neuron.place + 0.5, neuron.place + 0.5, math.nan)]
    vertical = [value for neuron in neurons for value in (neuron.layer + top, neuron.layer + top + share, math.nan)]
    axes.plot(horizontal, vertical, color=LIGHT[colour], linewidth=1.6, solid_capstyle="butt", zorder=3)


def _draw_counts(figure: "Figure", counts: Sequence[int], *, left: float, row: float, step: int, narrow: bool) -> None:
    width = 14 if narrow else 120
    axes = axes_at(figure, left, 28, width, row * len(counts))
    largest = max([1, *counts])
    if not narrow:
        axes.barh([layer + 0.5 for layer in range(len(counts))], counts, height=0.62, color=LIGHT["grey"], alpha=0.55)
    axes.set_xlim(0, largest)
    axes.set_ylim(len(counts), 0)
    axes.set_axis_off()
    written: list[int] = []
    for layer, count in sorted(enumerate(counts), key=lambda pair: -pair[1]):
        # The largest are written first; in a tall model there is no space for the others.
        if count and all(abs(layer - other) >= step for other in written):
            written.append(layer)
            axes.annotate(
                str(count),
                (0 if narrow else count, layer + 0.5),
                (5, 0),
                "data",
                "offset points",
                va="center",
                fontsize=12,
                color=LIGHT["ink"],
                annotation_clip=False,
            )
    title = "count" if narrow else "edited in the layer"
    axes.annotate(title, (0, 1), (0, 12), "axes fraction", "offset points", color=LIGHT["muted"], fontsize=12)


# Differences with their intervals.


def forest(rows: Sequence[ForestRow], *, narrow: bool = False) -> "Figure":
    """Draw every difference with its 95 % interval, and mark zero.

    Each unit has a panel with its own scale. A filled point is a difference that chance does not explain (after
    correction). An open point is one that chance may explain.

    Args:
        rows: The differences.
        narrow: Draw the form for a phone.

    Returns:
        The figure.
    """
    panels: dict[str, list[ForestRow]] = {}
    for row in rows:
        panels.setdefault(row.panel, []).append(row)
    line, above, below = (46, 34, 42) if narrow else (30, 34, 42)
    height = sum(above + line * len(found) + below for found in panels.values())
    with style():
        whole = NARROW if narrow else WIDE
        figure = canvas(whole, max(height, 60))
        top = 0.0
        for title, found in panels.items():
            left, width = (14, whole - 34) if narrow else (262, 350)
            axes = axes_at(figure, left, top + above, width, line * len(found))
            _forest_panel(axes, title, found, narrow=narrow, left=left)
            top += above + line * len(found) + below
    return figure


def _forest_panel(axes: "Axes", title: str, rows: Sequence[ForestRow], *, narrow: bool, left: int) -> None:
    reach = [0.0, *(value for row in rows for value in (row.low, row.high))]
    margin = (max(reach) - min(reach)) * 0.06 or 1.0
    axes.set_xlim(min(reach) - margin, max(reach) + margin)
    axes.set_ylim(len(rows), 0)
    for place, row in enumerate(rows):
        height = place + (0.68 if narrow else 0.5)
        axes.vlines(0, place + (0.42 if narrow else 0), place + 1, color=LIGHT["ink"], linewidth=1.2, zorder=1)
        colour = LIGHT[GROUP_COLOURS.get(row.group, "grey")]
        axes.plot([row.low, row.high], [height, height], color=colour, linewidth=2.2, zorder=3)
        face = colour if row.clear else LIGHT["paper"]
        axes.plot(
            row.value, height, "o", markersize=8, markerfacecolor=face, markeredgecolor=colour, markeredgewidth=1.8,
            zorder=4,
        )  # fmt: skip
        level = place + (0.24 if narrow else 0.5)
        label = plain(row.label)
        longest = 32 if narrow else 36
        label = label if len(label) <= longest else label[: longest - 1] + "…"
        behind = {"facecolor": LIGHT["paper"], "edgecolor": "none", "pad": 1}
        text: Any = {"va": "center", "fontsize": 12, "annotation_clip": False, "bbox": behind, "zorder": 5}
        edge = ("axes fraction", "data")
        axes.annotate(label, (0, level), (0 if narrow else 8 - left, 0), edge, "offset points", **text)
        axes.annotate(
            row.values, (1, level), (0 if narrow else 182, 0), edge, "offset points", ha="right",
            color=LIGHT["muted"], **text,
        )  # fmt: skip
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=LIGHT["rule"], linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.locator_params(axis="x", nbins=5 if narrow else 7)
    axes.annotate(
        title, (0, 1), (0 if narrow else 8 - left, 14), "axes fraction", "offset points", color=LIGHT["muted"],
        fontsize=12, fontweight="bold",
    )  # fmt: skip
