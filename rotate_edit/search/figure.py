"""The figure of a search: every trial, the Pareto front and what was chosen."""

from collections.abc import Sequence

from rotate_edit.reporting.drawing import png
from rotate_edit.reporting.figures import LIGHT, canvas, style
from rotate_edit.search.pareto import LEAST_DAMAGE, Point

# The width and height of a number in the figure's pixels.
LABEL = (22, 16)


def front_figure(points: Sequence[Point], front: Sequence[int], chosen: int) -> bytes:
    """Draw removal against damage.

    Args:
        points: Pairs (removal, damage). Removal is a share, damage is in nats.
        front: The places of the points on the Pareto front.
        chosen: The chosen place on the Pareto front.

    Returns:
        The figure as PNG.
    """
    with style():
        figure = canvas(640, 420)
        axes = figure.add_axes((0.12, 0.14, 0.84, 0.8))
        damages = [max(damage, LEAST_DAMAGE) for _, damage in points]
        axes.scatter([removal for removal, _ in points], damages, s=22, color=LIGHT["grey"], label="trials")
        line = [(points[place][0], damages[place]) for place in front]
        axes.plot([x for x, _ in line], [y for _, y in line], "-o", color=LIGHT["blue"], markersize=5, label="front")
        axes.plot(*line[chosen], "D", color=LIGHT["red"], markersize=10, label="chosen")
        axes.set_yscale("log")
        # A number is left out where it would lie on the last one; the table beside the figure has them all.
        written: tuple[float, float] | None = None
        for number, place in enumerate(line, start=1):
            x, y = axes.transData.transform(place)
            if written is None or abs(x - written[0]) > LABEL[0] or abs(y - written[1]) > LABEL[1]:
                axes.annotate(
                    str(number), place, (6, -12), textcoords="offset points", fontsize=11, color=LIGHT["muted"]
                )
                written = (x, y)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("removed share of the concept's probability mass")
        axes.set_ylabel("collateral KL (nats)")
        axes.legend(frameon=False, loc="upper left")
    return png(figure)
