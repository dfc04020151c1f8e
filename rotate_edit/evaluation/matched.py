"""One concept's edits at matched removal: strengths searched on a live model, sums kept by document.

What is kept is enough to resample documents later (`matching`), so that many concepts can be pooled in one table.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rotate_edit.edits.apply import applied
from rotate_edit.edits.edit import Edit
from rotate_edit.errors import BadInput
from rotate_edit.evaluation import measures
from rotate_edit.evaluation.curves import MATCHED_TARGET, STRONGEST
from rotate_edit.models import batches
from rotate_edit.models.batches import Passages

WEAKEST = 0.5
REFINEMENTS = 3
# The strength is near enough when the concept's mass is within this factor of the target.
NEAR_ENOUGH = 1.05
# The damage is measured where the edit has removed at least two fifths; the curve below does not matter.
MOST_MASS = 0.6


@dataclass(frozen=True)
class Texts:
    """Passages and the document that each one comes from: `documents` is int64 [texts]."""

    passages: Passages
    documents: NDArray[np.int64]


@dataclass(frozen=True)
class Proof:
    """What one concept's edits are measured on, with the base model's answers.

    concept_ids, near_ids: tokens of the concept and of its neighbours (None without); concept: texts with the concept;
    others: texts without it; near: texts with a neighbour and without the concept; size: how many documents there are;
    base: sums by document, float64 [documents] each: mass, counts, likelihood, predicted, near; others_base: the
    base's log-probabilities on `others`.
    """

    concept_ids: Tensor
    near_ids: Tensor | None
    concept: Texts
    others: Texts
    near: Texts | None
    size: int
    base: dict[str, NDArray[np.float64]]
    others_base: tuple[Tensor, ...]


def texts_of(tokenizer: Any, rows: Sequence[tuple[int, str]], vocabulary: int, *, longest: int, limit: int) -> Texts:
    """Tokenise (document, text) rows, at most `longest` tokens of each and about `limit` together."""
    passages = batches.tokenise(
        tokenizer, [text for _, text in rows], vocabulary_size=vocabulary, longest=longest, token_limit=limit
    )
    return Texts(passages, np.array([document for document, _ in rows[: passages.texts]]))


def prepare(
    model: Any, concept_ids: Tensor, concept: Texts, others: Texts, near: tuple[Tensor, Texts] | None, size: int
) -> Proof:
    """Measure the base model once. Raises BadInput when the concept's texts hold none of its tokens."""
    near_ids, near_texts = near if near else (None, None)
    mass, positions = measures.mass_by_text(model, concept.passages, concept_ids)
    if not float(positions.sum()):
        raise BadInput("the concept's texts hold none of its tokens; give other texts.")
    others_base = measures.every_position(model, others.passages)
    _, counts, likelihood, predicted = measures.damage_by_text(model, others.passages, others_base)
    base = {
        "mass": by_document(mass, concept, size),
        "positions": by_document(positions, concept, size),
        "counts": by_document(counts, others, size),
        "likelihood": by_document(likelihood, others, size),
        "predicted": by_document(predicted, others, size),
    }
    if near_ids is not None and near_texts is not None:
        base["near"] = by_document(measures.mass_by_text(model, near_texts.passages, near_ids)[0], near_texts, size)
    return Proof(concept_ids, near_ids, concept, others, near_texts, size, base, others_base)


def by_document(sums: Tensor, texts: Texts, size: int) -> NDArray[np.float64]:
    """Sums by text [texts] added up by document: float64 [size]."""
    return np.bincount(texts.documents, weights=sums.numpy(), minlength=size).astype(np.float64)


def trace(model: Any, proof: Proof, edit: Edit, *, target: float = MATCHED_TARGET) -> dict[str, Any]:
    """The curve of one method around the smallest strength that leaves `target` of the concept's mass.

    Strengths double from 0.5 until the target is reached and once more, or until 64 is passed; then the crossing is
    narrowed down. Returns
    plain values: `reached`; `strength` (None when never reached); `points`, ascending in strength, with the sums by
    document `mass` and, where damage was measured, `damage` and `likelihood`; `near`, the neighbours at the crossing.
    """
    masses: dict[float, NDArray[np.float64]] = {}
    if not edit.does_something:
        return {"reached": False, "strength": None, "points": [], "near": None}

    def left(strength: float) -> float:
        with applied(model, edit, strength):
            sums, _ = measures.mass_by_text(model, proof.concept.passages, proof.concept_ids)
        masses[strength] = by_document(sums, proof.concept, proof.size)
        return float(masses[strength].sum() / proof.base["mass"].sum())

    before, strength = (0.0, 1.0), WEAKEST
    after = (strength, left(strength))
    while after[1] > target and strength < STRONGEST:
        strength *= 2
        before, after = after, (strength, left(strength))
    reached = after[1] <= target
    if reached:
        # Documents drawn again may need more strength than these: one step more keeps them between two points.
        left(2 * after[0])
    grid = set(masses)
    strength = _narrowed(left, before, after, target) if reached else strength
    points = []
    for at in sorted(masses):
        fraction = float(masses[at].sum() / proof.base["mass"].sum())
        point: dict[str, Any] = {"strength": at, "fraction": fraction, "mass": masses[at]}
        if at == strength or (at in grid and (fraction <= MOST_MASS or at == before[0])):
            with applied(model, edit, at):
                sums, _, likelihood, _ = measures.damage_by_text(model, proof.others.passages, proof.others_base)
            point["damage"] = by_document(sums, proof.others, proof.size)
            point["likelihood"] = by_document(likelihood, proof.others, proof.size)
        points.append(point)
    near = None
    if reached and proof.near is not None and proof.near_ids is not None:
        with applied(model, edit, strength):
            near = by_document(
                measures.mass_by_text(model, proof.near.passages, proof.near_ids)[0], proof.near, proof.size
            )
    return {"reached": reached, "strength": strength if reached else None, "points": points, "near": near}


def _narrowed(left: Any, before: tuple[float, float], after: tuple[float, float], target: float) -> float:
    """The strength of the crossing between two points (strength, fraction), by interpolating the fraction's logarithm.

    The bracket stays around the crossing, and a step never falls within a tenth of its ends."""
    strength = after[0]
    for _ in range(REFINEMENTS):
        share = math.log(before[1] / target) / math.log(before[1] / max(after[1], 1e-12))
        strength = before[0] + min(0.9, max(0.1, share)) * (after[0] - before[0])
        fraction = left(strength)
        if 1 / NEAR_ENOUGH < fraction / target < NEAR_ENOUGH:
            break
        before, after = ((strength, fraction), after) if fraction > target else (before, (strength, fraction))
    return strength


def describe(edit: Edit) -> dict[str, int]:
    """How many neuron vectors an edit changes, and in how many matrices."""
    rows = {(change.matrix, change.layer, change.expert, int(row)) for change in edit.changes for row in change.rows}
    rows |= {("out", clamp.layer, None, int(row)) for clamp in edit.clamps for row in clamp.rows}
    return {"vectors": len(rows), "matrices": len({entry[:3] for entry in rows})}


def kept_ratio(numerator: NDArray[np.float64] | None, base: NDArray[np.float64] | None) -> float:
    """`sum / base sum`, not-a-number where either is missing."""
    if numerator is None or base is None or not base.sum():
        return math.nan
    return float(np.asarray(numerator).sum() / base.sum())


def perplexity_rise(likelihood: NDArray[np.float64], base: dict[str, NDArray[np.float64]]) -> float:
    """`perplexity / base perplexity - 1` from summed log-likelihoods by document."""
    return math.expm1(float((base["likelihood"].sum() - np.asarray(likelihood).sum()) / base["predicted"].sum()))
