"""Removal against damage: one method over its strengths, and all methods side by side."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from rotate_edit.console import Report, silent
from rotate_edit.edits.apply import applied, first_changed_layer
from rotate_edit.edits.edit import Edit
from rotate_edit.evaluation import measures
from rotate_edit.evaluation.statistics import Measure

MATCHED_TARGET = 0.1

Points = dict[str, list[dict[str, Any]]]


def draw(
    model: Any,
    known: measures.Reference,
    edits: dict[str, Edit],
    strengths: Sequence[float],
    chosen: float,
    report: Report = silent,
    *,
    sparse: bool = False,
) -> Points:
    """Measure every method's curve.

    Args:
        model: The loaded base, nothing switched on.
        known: Its answers (`measures.reference`).
        edits: By method, of one concept.
        strengths: Positive strengths. A method that suppresses is measured from the weakest on, up to the first that
            leaves a tenth of the concept. What lies beyond tells nothing of the damage at equal removal.
        chosen: The strength of the edit itself, which is the first of the edits. It gives the sign, and one more point.
            The edit's own curve goes this far at least.
        report: Receives the progress.
        sparse: Measure the damage of a method that suppresses only where it is asked for: at the strengths on either
            side of a tenth, at `chosen` for the edit itself, and where nothing gets to a tenth at the one that gets
            nearest. What is left of the concept is read off far fewer tokens.

    Returns:
        The curves as plain JSON: by method, one point for each strength that was measured. Damage is in nats.
    """
    wanted = [math.copysign(size, chosen) for size in sorted({abs(s) for s in strengths} | {abs(chosen)})]
    points: Points = {}
    for number, (method, edit) in enumerate(edits.items()):
        report("curves", number, len(edits))
        points[method] = []
        if edit.does_something:
            furthest = abs(chosen) if number == 0 else 0.0
            asked = _needed(model, known, edit, wanted, furthest) if sparse and chosen > 0 else wanted
            points[method] = [_plain(point) for point in _curve(model, known, edit, asked, furthest)]
    report("curves", len(edits), len(edits))
    return points


def _needed(
    model: Any, known: measures.Reference, edit: Edit, strengths: Sequence[float], furthest: float
) -> list[float]:
    """The strengths at which damage is asked for, ascending, found by what is left of the concept alone."""
    known = known.starting_at(first_changed_layer(model, edit))
    whole, left = float(known.concept_mass[0].sum()), {}
    for strength in strengths:
        with applied(model, edit.at(strength)):
            left[strength] = float(measures.mass_by_text(model, known.concept, known.concept_ids)[0].sum()) / whole
        if left[strength] <= MATCHED_TARGET:
            break
    measured = list(left)
    if left[measured[-1]] <= MATCHED_TARGET:
        asked = set(measured[-2:])
    else:
        asked = {min(left, key=lambda strength: left[strength])}
    return sorted(asked | ({furthest} if furthest else set()))


def _curve(
    model: Any, known: measures.Reference, edit: Edit, strengths: Sequence[float], furthest: float
) -> Iterator[measures.CurvePoint]:
    """One point a strength, up to the first at or past `furthest` that leaves a tenth of the concept."""
    known = known.starting_at(first_changed_layer(model, edit))
    for strength in strengths:
        with applied(model, edit.at(strength)):
            point = measures.curve_point(model, known, strength)
        yield point
        if strength >= max(furthest, 0) and point.mass.value <= MATCHED_TARGET:
            return


def matched_table(points: Points, chosen: str) -> dict[str, Any]:
    """Tabulate every method where it has taken the concept down to a tenth.

    Args:
        points: The curves, from `draw`.
        chosen: The run's own method.

    Returns:
        The `target` and `rows`. A row has the method's strength, its damage in nats and the ratio of its damage to the
        chosen method's. They are None where there is no crossing.
    """
    crossings = {method: _crossing(curve) for method, curve in points.items()}
    own = crossings.get(chosen)
    rows = []
    for method, crossing in crossings.items():
        rows.append(
            {
                "method": method,
                "strength": crossing.strength if crossing else None,
                "collateral_kl": crossing.damage if crossing else None,
                "ratio": crossing.damage / own.damage if crossing and own else None,
            }
        )
    return {"target": MATCHED_TARGET, "rows": rows}


def _crossing(curve: list[dict[str, Any]]) -> Any:
    points = [
        measures.CurvePoint(point["strength"], Measure(**point["mass"]), Measure(**point["collateral_kl"]), None)
        for point in curve
    ]
    return measures.at_matched_removal(points, target=MATCHED_TARGET) if points else None


def _plain(point: measures.CurvePoint) -> dict[str, Any]:
    return {
        "strength": point.strength,
        "mass": point.mass.plain(),
        "collateral_kl": point.collateral_kl.plain(),
        "first_token_kl": point.first_token_kl.plain() if point.first_token_kl else None,
    }
