"""One concept's edits at matched removal: strengths are searched on a live model, sums are kept by document.

What is kept is enough to resample documents later (`matching`). So many concepts can be pooled in one table.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rotate_edit.edits.apply import applied, first_changed_layer
from rotate_edit.edits.edit import Edit
from rotate_edit.edits.strength import cross
from rotate_edit.errors import BadInput
from rotate_edit.evaluation import measures
from rotate_edit.evaluation.curves import MATCHED_TARGET
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
    """Passages and the document that each one comes from.

    Attributes:
        passages: The tokenised texts.
        documents: int64 [texts], the index of each text's document.
    """

    passages: Passages
    documents: NDArray[np.int64]


@dataclass(frozen=True)
class Proof:
    """What one concept's edits are measured on, with the base model's answers.

    Attributes:
        concept_ids: int64 [k], tokens of the concept.
        near_ids: int64 [m], tokens of its neighbours. None without neighbours.
        concept: Texts with the concept.
        others: Texts without it.
        near: Texts with a neighbour and without the concept. None without neighbours.
        size: Number of documents.
        base: The base model's sums by document, float64 [documents] each. `mass` is the concept's probability and
            `positions` the number of positions behind it. On `others`, `counts` is the number of positions behind the
            damage. `likelihood` is the log-likelihood in nats and `predicted` the number of predicted tokens. `near` is
            the neighbours' probability, where there are neighbours.
        others_base: The base's log-probabilities on `others`, in nats, float32 [positions, vocabulary] for each batch.
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
    """Tokenise texts and keep their documents.

    Args:
        tokenizer: The model's tokenizer.
        rows: Pairs of a document's index and a text.
        vocabulary: Number of tokens in the vocabulary.
        longest: At most this many tokens of each text.
        limit: About this many tokens of all texts together.

    Returns:
        The tokenised texts with their documents.
    """
    passages = batches.tokenise(
        tokenizer, [text for _, text in rows], vocabulary_size=vocabulary, longest=longest, token_limit=limit
    )
    return Texts(passages, np.array([document for document, _ in rows[: passages.texts]]))


def prepare(
    model: Any, concept_ids: Tensor, concept: Texts, others: Texts, near: tuple[Tensor, Texts] | None, size: int
) -> Proof:
    """Measure the base model once.

    Args:
        model: The loaded base model.
        concept_ids: int64 [k], tokens of the concept.
        concept: Texts with the concept.
        others: Texts without it.
        near: Tokens of the neighbours int64 [m] and texts with a neighbour. None without neighbours.
        size: Number of documents.

    Returns:
        What edits are measured on, with the base's answers.

    Raises:
        BadInput: When the concept's texts hold none of its tokens.
    """
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
    """Add up sums by text to sums by document.

    Args:
        sums: Tensor [texts], one sum per text.
        texts: The texts with their documents.
        size: Number of documents.

    Returns:
        float64 [size].
    """
    return np.bincount(texts.documents, weights=sums.numpy(), minlength=size).astype(np.float64)


def trace(model: Any, proof: Proof, edit: Edit, *, target: float = MATCHED_TARGET) -> dict[str, Any]:
    """Trace one method's curve around the smallest strength that leaves `target` of the concept's mass.

    Strengths double from 0.5 until the target is reached and once more, or until 64 is passed. Then the crossing is
    narrowed down.

    Args:
        model: The loaded base model.
        proof: What edits are measured on.
        edit: The edit.
        target: The wanted mass, as a fraction of the base's.

    Returns:
        Plain values. `reached` says whether the target was reached. `strength` is the strength at the crossing, None
        when never reached. `points` ascend in strength. Each has `strength`, `fraction` (the mass left) and the sums by
        document `mass`. Where damage was measured, it also has the sums `damage` and `likelihood`. `near` has the
        neighbours' sums at the crossing. Sums are float64 [documents].
    """
    masses: dict[float, NDArray[np.float64]] = {}
    if not edit.does_something:
        return {"reached": False, "strength": None, "points": [], "near": None}

    first = first_changed_layer(model, edit)
    concept, others = proof.concept.passages.starting_at(first), proof.others.passages.starting_at(first)

    def left(strength: float) -> float:
        with applied(model, edit.at(strength)):
            sums, _ = measures.mass_by_text(model, concept, proof.concept_ids)
        masses[strength] = by_document(sums, proof.concept, proof.size)
        return float(masses[strength].sum() / proof.base["mass"].sum())

    found = cross(left, target, start=WEAKEST, near=NEAR_ENOUGH, steps=REFINEMENTS)
    reached = found.reached
    doubled = [WEAKEST * 2**power for power in range(8)]
    if reached:
        # Documents drawn again may need more strength than these: one step more keeps them between two points.
        left(2 * min(strength for strength in doubled if strength >= found.high))
    grid = {strength for strength in doubled if strength in masses} | {max(masses)}
    strength = found.high if reached else max(masses)
    points = []
    for at in sorted(masses):
        fraction = float(masses[at].sum() / proof.base["mass"].sum())
        point: dict[str, Any] = {"strength": at, "fraction": fraction, "mass": masses[at]}
        if at == strength or (at in grid and (fraction <= MOST_MASS or at == found.low)):
            with applied(model, edit.at(at)):
                sums, _, likelihood, _ = measures.damage_by_text(model, others, proof.others_base)
            point["damage"] = by_document(sums, proof.others, proof.size)
            point["likelihood"] = by_document(likelihood, proof.others, proof.size)
        points.append(point)
    near = None
    if reached and proof.near is not None and proof.near_ids is not None:
        with applied(model, edit.at(strength)):
            near = by_document(
                measures.mass_by_text(model, proof.near.passages, proof.near_ids)[0], proof.near, proof.size
            )
    return {"reached": reached, "strength": strength if reached else None, "points": points, "near": near}


def describe(edit: Edit) -> dict[str, int]:
    """Count how many neuron vectors an edit changes, and in how many matrices.

    Args:
        edit: The edit.

    Returns:
        The counts `vectors` and `matrices`.
    """
    rows = {(change.matrix, change.layer, change.expert, int(row)) for change in edit.changes for row in change.rows}
    rows |= {("out", clamp.layer, None, int(row)) for clamp in edit.clamps for row in clamp.rows}
    return {"vectors": len(rows), "matrices": len({entry[:3] for entry in rows})}


def kept_ratio(numerator: NDArray[np.float64] | None, base: NDArray[np.float64] | None) -> float:
    """Compute `sum / base sum`.

    Args:
        numerator: float64 [documents], or None.
        base: float64 [documents], or None.

    Returns:
        The ratio. Not-a-number where either is missing or the base sums to 0.
    """
    if numerator is None or base is None or not base.sum():
        return math.nan
    return float(np.asarray(numerator).sum() / base.sum())


def perplexity_rise(likelihood: NDArray[np.float64], base: dict[str, NDArray[np.float64]]) -> float:
    """Compute `perplexity / base perplexity - 1` from summed log-likelihoods by document.

    Args:
        likelihood: float64 [documents], the edited model's log-likelihoods in nats.
        base: The base's sums (see `Proof.base`).

    Returns:
        The relative rise of the perplexity.
    """
    return math.expm1(float((base["likelihood"].sum() - np.asarray(likelihood).sum()) / base["predicted"].sum()))
