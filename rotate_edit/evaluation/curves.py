"""Removal against damage: one method over its strengths, all methods side by side, and the strength for a target."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from rotate_edit.console import Report, silent
from rotate_edit.edits.apply import applied
from rotate_edit.edits.edit import Edit
from rotate_edit.errors import Failure
from rotate_edit.evaluation import measures
from rotate_edit.evaluation.statistics import Measure

MATCHED_TARGET = 0.1
STRONGEST = 64.0
BISECTIONS = 6

Points = dict[str, list[dict[str, Any]]]


def only(edit: Edit, concept: str) -> Edit:
    """The part of an edit that belongs to one concept."""
    return replace(
        edit,
        changes=tuple(change for change in edit.changes if change.concept == concept),
        clamps=tuple(clamp for clamp in edit.clamps if clamp.concept == concept),
    )


def draw(
    model: Any,
    known: measures.Reference,
    edits: dict[str, Edit],
    strengths: Sequence[float],
    chosen: float,
    report: Report = silent,
) -> Points:
    """Every method's curve as plain JSON: by method, one point a strength.

    model: the loaded base, nothing switched on; known: its answers (`measures.reference`); edits: by method, of one
    concept; strengths: positive; chosen: the strength of the edit itself, which gives the sign and one more point.
    """
    wanted = [math.copysign(size, chosen) for size in sorted({abs(s) for s in strengths} | {abs(chosen)})]
    points: Points = {}
    for number, (method, edit) in enumerate(edits.items()):
        report("curves", number, len(edits))
        curve = (
            measures.removal_curve(model, known, wanted, partial(applied, model, edit)) if edit.does_something else []
        )
        points[method] = [_plain(point) for point in curve]
    report("curves", len(edits), len(edits))
    return points


def solve_strength(model: Any, known: measures.Reference, edit: Edit, target: float) -> float:
    """The smallest strength, to 1 %, at which `target` of the concept's probability mass is left, by bisection.

    Raises Failure when no strength up to 64 gets there.
    """

    def left(strength: float) -> float:
        with applied(model, edit, strength):
            sums, _ = measures.mass_by_text(model, known.concept, known.concept_ids)
        return float(sums.sum() / known.concept_mass[0].sum())

    low, high = 0.0, 1.0
    while left(high) > target:
        low, high = high, 2 * high
        if high > STRONGEST:
            raise Failure(
                f"no strength up to {STRONGEST:g} takes the concept down to {target:.0%} of its probability; raise "
                "edit.target, or give the edit more to work with: more neurons (lower select.share, raise "
                "locate.candidates), or for fitted and keyed edits more text (raise edit.key_tokens)."
            )
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if left(middle) > target else (low, middle)
    return round(high, 3)


def cost_of_removal(model: Any, known: measures.Reference, edit: Edit, target: float) -> float:
    """Collateral KL in nats at the strength that leaves `target` of the concept; infinite where none does."""
    try:
        strength = solve_strength(model, known, edit, target)
    except Failure:
        return math.inf
    with applied(model, edit, strength):
        return measures.collateral_kl(model, known.others, known.others_base, draws=1).value


def matched_table(points: Points, chosen: str) -> dict[str, Any]:
    """Every method where it has taken the concept down to a tenth: its strength, its damage, its ratio to ours."""
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
    return measures.at_matched_removal(points, target=MATCHED_TARGET) if len(points) > 1 else None


def _plain(point: measures.CurvePoint) -> dict[str, Any]:
    return {
        "strength": point.strength,
        "mass": point.mass.plain(),
        "collateral_kl": point.collateral_kl.plain(),
        "first_token_kl": point.first_token_kl.plain() if point.first_token_kl else None,
    }
