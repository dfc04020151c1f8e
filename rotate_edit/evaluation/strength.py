"""The strength of an edit that reaches a goal, measured on a live model and validation texts."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rotate_edit.edits.apply import applied, first_changed_layer
from rotate_edit.edits.edit import Edit
from rotate_edit.edits.strength import BISECTIONS, STRONGEST, Goal, cross
from rotate_edit.errors import Failure
from rotate_edit.evaluation import measures
from rotate_edit.evaluation.measures import Reference

MORE_TO_WORK_WITH = (
    "give the edit more to work with: more neurons (lower select.share, raise locate.candidates), or more "
    "self-generated text (raise edit.self_text)"
)


# An edit that cannot reach its goal takes the weakest strength that gets so near to the most that any reached.
NEARLY_ALL = 0.9
# A budget is used up to the square of this factor.
BUDGET_SLACK = 1.02
# What counts as no effect at all, in nats.
NO_EFFECT = 0.01


@dataclass(frozen=True)
class Solved:
    """The strength of an edit, and whether it reaches its goal.

    Attributes:
        strength: The strength; below 0 where the goal amplifies.
        missed: What was reached in place of the goal and how to go further, as one sentence. None where it is reached.
    """

    strength: float
    missed: str | None = None


def solve_strength(model: Any, known: Reference, edit: Edit, goal: Goal) -> Solved:
    """The strength at which an edit of one concept reaches its goal, or comes nearest to it.

    Args:
        model: The loaded base, nothing switched on.
        known: Its answers on validation texts.
        edit: The edit, of one concept.
        goal: What is to be reached.

    Returns:
        The strength, rounded to three digits after the point. Before rounding it lies on the side that meets the goal,
        within 1.6 % of the crossing above 1 and within 1/64 below. Where no strength up to 64 reaches the goal, it is
        the weakest that gets nine tenths of the way that any got, in nats.

    Raises:
        Failure: No strength up to 64 does anything, or every one exceeds the budget.
    """
    if goal.kind == "strength":
        return Solved(goal.value)
    known = known.starting_at(first_changed_layer(model, edit))
    measure, seen = _MEASURES[goal.kind](model, known, edit), {}

    def measured(strength: float) -> float:
        seen[strength] = value = measure(strength)
        return value

    if goal.kind == "budget":
        # Aimed a little below the budget, so that what comes near enough from above does not exceed it.
        found = cross(measured, goal.value / BUDGET_SLACK, falling=False, near=BUDGET_SLACK)
        if found.reached and found.at <= goal.value:
            return Solved(round(found.high, 3))
        if not found.low:
            raise Failure(_why(goal))
        return Solved(round(found.low, 3))
    found = cross(measured, goal.value, falling=goal.kind == "remaining")
    sign = -1 if goal.amplifies else 1
    if found.reached:
        return Solved(round(sign * found.high, 3))
    # How far each strength got, in nats.
    effects = {strength: -sign * math.log(max(value, 1e-30)) for strength, value in seen.items()}
    most = max(effects.values())
    if most < NO_EFFECT:
        raise Failure(_why(goal))
    best = min(strength for strength, effect in effects.items() if effect >= NEARLY_ALL * most)
    return Solved(round(sign * best, 3), _missed(goal, seen[best]))


def _missed(goal: Goal, reached: float) -> str:
    if goal.kind == "odds":
        return (
            f"the concept's odds are {reached:.3g} times as large, not {goal.value:g} times, which no strength up to "
            f"{STRONGEST:g} reaches; lower odds, or choose another edit.method."
        )
    return (
        f"{reached:.0%} of the concept's probability is left, not {goal.value:.0%}, which no strength up to "
        f"{STRONGEST:g} reaches; raise remaining, choose another edit.method, or {MORE_TO_WORK_WITH}."
    )


def _why(goal: Goal) -> str:
    if goal.kind == "odds":
        return f"no strength up to {STRONGEST:g} makes the concept's odds {goal.value:g} times as large; lower odds."
    if goal.kind == "budget":
        return (
            f"no strength from {2.0**-BISECTIONS:.2g} up keeps the KL divergence on other texts within {goal.value:g} "
            "nats; raise budget, or give a strength."
        )
    return (
        f"no strength up to {STRONGEST:g} takes the concept down to {goal.value:.0%} of its probability; raise "
        f"remaining, or {MORE_TO_WORK_WITH}."
    )


def _remaining(model: Any, known: Reference, edit: Edit) -> Callable[[float], float]:
    def share(strength: float) -> float:
        with applied(model, edit.at(strength)):
            sums, _ = measures.mass_by_text(model, known.concept, known.concept_ids)
        return float(sums.sum() / known.concept_mass[0].sum())

    return share


def _damage(model: Any, known: Reference, edit: Edit) -> Callable[[float], float]:
    def nats(strength: float) -> float:
        with applied(model, edit.at(strength)):
            return measures.collateral_kl(model, known.others, known.others_base, draws=1).value

    return nats


def _odds(model: Any, known: Reference, edit: Edit) -> Callable[[float], float]:
    before = measures.mean_log_odds(known.others_base, known.concept_ids)

    def times(strength: float) -> float:
        with applied(model, edit.at(-strength)):
            after = measures.mean_log_odds(measures.every_position(model, known.others), known.concept_ids)
        return math.exp(after - before)

    return times


_MEASURES = {"remaining": _remaining, "budget": _damage, "odds": _odds}


def cost_of_removal(model: Any, known: Reference, edit: Edit, remaining: float) -> float:
    """Collateral KL in nats at the strength that leaves a share of the concept; infinite where none does."""
    try:
        solved = solve_strength(model, known, edit, Goal("remaining", remaining))
    except Failure:
        return math.inf
    if solved.missed:
        return math.inf
    return _damage(model, known.starting_at(first_changed_layer(model, edit)), edit)(solved.strength)
