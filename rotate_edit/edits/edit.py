"""An edit as data: low-rank changes of weight matrices, and activations that are held while the model runs.

Nothing here reads or writes a file. `apply` switches an edit on in a loaded model, `edit_file` keeps it on disk, and
`writing` rewrites checkpoints with it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

MATRICES = ("gate", "in", "out", "embedding", "unembedding", "out_bias")


@dataclass(frozen=True)
class MatrixChange:
    """A change `W[rows] += strength * left @ right` of one matrix whose rows are vectors in the residual stream.

    Attributes:
        matrix: "gate" or "in" (a row is what a neuron reads), "out" (a row is what a neuron writes), "embedding" or
            "unembedding" (a row is a token), "out_bias" (one row).
        layer: The layer of the matrix. None for the embeddings.
        expert: The expert of the matrix. None in a dense layer and for the embeddings.
        rows: Which rows change, int64 [n], ascending, without repeats.
        left: float32 [n, r].
        right: float32 [r, d_model].
        strength: The multiple of the change that is written, in the unit of the edit method. Below 0 it amplifies.
        concept: The name of the concept that this change belongs to.
        most: `at` goes no further than this strength.
    """

    matrix: str
    layer: int | None
    expert: int | None
    rows: Tensor
    left: Tensor
    right: Tensor
    strength: float
    concept: str
    most: float = math.inf

    def at(self, strength: float) -> "MatrixChange":
        """The same change at another strength, at most at `most`."""
        return replace(self, strength=min(strength, self.most))

    def delta(self) -> Tensor:
        """What is added to the rows: `strength * left @ right`, float32 [n, d_model]."""
        return self.strength * (self.left @ self.right)


@dataclass(frozen=True)
class EditedVector:
    """What an edit did to one neuron's vector, in float32 and before rounding to the stored dtype.

    Attributes:
        address: The neuron, for instance "L3.N12".
        matrix: "gate", "in" or "out".
        concept: The concept that the change belongs to.
        channels: The channels that located the neuron, as "L3.N12.out#0". Empty where none did.
        score: The concept's LM-head z-score in this vector.
        cosine: Of the edited vector with the original.
        norm_before: Euclidean norm of the original vector.
        norm_after: Euclidean norm of the edited vector.
    """

    address: str
    matrix: str
    concept: str
    channels: tuple[str, ...]
    score: float
    cosine: float
    norm_before: float
    norm_after: float


@dataclass(frozen=True)
class Clamp:
    """Neurons whose activations are held at fixed values while the model runs: `strength * values`.

    No weight can say this in a model without an MLP bias. So an edit with clamps is applied live only.

    Attributes:
        layer: A layer of a dense model.
        rows: The neurons, int64 [n].
        values: Their activations at strength 1, float32 [n].
        strength: What the values are multiplied by.
        concept: The name of the concept that the clamp belongs to.
    """

    layer: int
    rows: Tensor
    values: Tensor
    strength: float
    concept: str

    def at(self, strength: float) -> "Clamp":
        """The same clamp at another strength."""
        return replace(self, strength=strength)


@dataclass(frozen=True)
class Edit:
    """An edit of one checkpoint: what is changed, how, and why.

    Attributes:
        method: The name of the edit method.
        changes: What is added to which rows.
        vectors: What became of each edited neuron vector.
        base: The identity of the checkpoint it was made for (see `models.checkpoint.identity`).
        settings: The settings it was made with, as plain JSON values.
        clamps: What is done to activations while the model runs.
        notes: What a reader should know of it, one sentence each, such as which tokens were added to the user's.
    """

    method: str
    changes: tuple[MatrixChange, ...]
    vectors: tuple[EditedVector, ...] = ()
    base: dict[str, Any] = field(default_factory=dict[str, Any])
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    clamps: tuple[Clamp, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def concepts(self) -> tuple[str, ...]:
        """The names of the concepts it edits, in the order of its changes."""
        named = [change.concept for change in self.changes] + [clamp.concept for clamp in self.clamps]
        return tuple(dict.fromkeys(named))

    @property
    def does_something(self) -> bool:
        """Whether there is anything to apply."""
        return bool(self.changes or self.clamps)

    def at(self, strength: float | Mapping[str, float]) -> "Edit":
        """The same edit at another strength. The factors do not depend on it.

        Args:
            strength: One strength for all concepts, or one for each concept by its name. Concepts that are not named
                keep theirs.
        """

        def of(part: MatrixChange | Clamp) -> float:
            return strength.get(part.concept, part.strength) if isinstance(strength, Mapping) else strength

        changes = tuple(change.at(of(change)) for change in self.changes)
        return replace(self, changes=changes, clamps=tuple(clamp.at(of(clamp)) for clamp in self.clamps))

    def only(self, concept: str) -> "Edit":
        """The part of the edit that belongs to one concept."""
        return replace(
            self,
            changes=tuple(change for change in self.changes if change.concept == concept),
            vectors=tuple(vector for vector in self.vectors if vector.concept == concept),
            clamps=tuple(clamp for clamp in self.clamps if clamp.concept == concept),
        )
