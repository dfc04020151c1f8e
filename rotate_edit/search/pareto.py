"""Which of many trade-offs between removal and damage are worth a look (maths only)."""

import math
from collections.abc import Sequence

import numpy as np

Point = tuple[float, float]

# Damage below this many nats is nothing that texts of a few thousand tokens can tell from no damage.
LEAST_DAMAGE = 1e-6


def front(points: Sequence[Point]) -> list[int]:
    """Find the points that no other point beats: the Pareto front.

    A point is beaten by one with at least its removal and at most its damage that differs in one of them. Of equal
    points the first stays. Points with a number that is not finite are left out.

    Args:
        points: Pairs (removal, damage).

    Returns:
        The places of the points on the Pareto front, ascending in removal.
    """
    finite = [place for place, point in enumerate(points) if all(math.isfinite(value) for value in point)]
    ordered = sorted(finite, key=lambda place: (-points[place][0], points[place][1], place))
    kept: list[int] = []
    for place in ordered:
        if not kept or points[place][1] < points[kept[-1]][1]:
            kept.append(place)
    return kept[::-1]


def knee(points: Sequence[Point]) -> int:
    """Find the point of a Pareto front that lies farthest below the line between its ends.

    The axes are removal and the logarithm of damage. Each is scaled to the extent of the Pareto front, so that no unit
    matters.

    Args:
        points: Pairs (removal, damage), ascending in both, at least one.

    Returns:
        The place of the point. With fewer than three points, or when none lies below the line, the one of the highest
        removal.

    Raises:
        ValueError: Without points.
    """
    if not points:
        raise ValueError("an empty front has no knee")
    removals = [removal for removal, _ in points]
    damages = [math.log(max(damage, LEAST_DAMAGE)) for _, damage in points]
    wide, high = removals[-1] - removals[0], damages[-1] - damages[0]
    if len(points) < 3 or wide <= 0 or high <= 0:
        return len(points) - 1
    gains = [
        (removal - removals[0]) / wide - (damage - damages[0]) / high for removal, damage in zip(removals, damages)
    ]
    best = max(range(len(points)), key=gains.__getitem__)
    return best if gains[best] > 0 else len(points) - 1


def within_budget(points: Sequence[Point], budget: float) -> int | None:
    """Find the point with the highest removal of those whose damage is at most `budget`.

    Args:
        points: Pairs (removal, damage).
        budget: The largest damage, in nats.

    Returns:
        The place of the point. None when every damage is larger.
    """
    inside = [place for place, (_, damage) in enumerate(points) if damage <= budget]
    return max(inside, key=lambda place: points[place][0]) if inside else None


def savings(points: Sequence[Point], own: Sequence[Point]) -> dict[int, float]:
    """Compare the damage of points with that of the recipe's own points at equal removal.

    Between own points the logarithm of the damage is taken as linear in that of the share that is left.

    Args:
        points: Pairs (removal, damage).
        own: The own points, as such pairs.

    Returns:
        By the place of a point, its damage over the own points' damage at its removal. Points beyond the removals of
        the own points are left out.
    """
    reached = sorted((math.log(max(1 - removal, 1e-9)), math.log(damage)) for removal, damage in own if damage > 0)
    if not reached:
        return {}
    lefts, damages = zip(*reached)
    found = {}
    for place, (removal, damage) in enumerate(points):
        left = math.log(max(1 - removal, 1e-9))
        if lefts[0] <= left <= lefts[-1]:
            found[place] = damage / math.exp(float(np.interp(left, lefts, damages)))
    return found
