"""Edits along the gradient of text about a concept, without what that gradient shares with all text."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from rotate_edit.edits.edit import MatrixChange
from rotate_edit.edits.material import GRADIENT_TOKENS, Concept, Material
from rotate_edit.edits.methods.base import Decimal, Distribution, EditMethod, Whole, edit_method
from rotate_edit.edits.methods.token_rows import added_tokens, row_changes
from rotate_edit.edits.selective_gradient import largest_part, strongest_rows, without_common
from rotate_edit.machine import Cost
from rotate_edit.models.checkpoint import read_matrix
from rotate_edit.models.cost import ModelSize

# Of the matrices' norm, what all changes together have at strength 1.
SIZE = 0.001
# The cost of the eigenvectors of a matrix of width d, in units of d^3 operations.
ROOTS = 25


@edit_method(
    "selective-gradient",
    title="against the gradient of text about the concept, without what it shares with all text",
    reference="after RepSelect, arXiv 2606.17168",
    unit="a change of a thousandth of the size of the edited matrices",
    reads=("text",),
    writes=("gate", "in", "out"),
    whole_concept=True,
    keeps_words=False,
    removes_knowledge=True,
    style=("ochre", "-", "X"),
)
@dataclass(frozen=True)
class SelectiveGradient(EditMethod):
    """`W <- W - strength G'` in every `gate`, `in` and `out` matrix that may be edited.

    G is the gradient of the mean log-probability of text about the concept. G' is G with its largest singular
    directions flattened, which are those of language at large (`selective_gradient.without_common`). Without that the
    edit would be gradient ascent, which harms everything alike. The LoRA epoch that the paper puts first is left out.

    Of each matrix's G' the largest part of the given rank is taken, so that the edit is as small as a LoRA adapter. All
    matrices share one scale. The strength 1 is set by the size of the whole change.

    Attributes:
        common: How many directions are flattened, as a share of d_model.
        rank: How many directions the change of a matrix has.
        neurons: The share of the neuron vectors that are changed: those that change most.
        skip_words: Whether the concept's own tokens do not count in the text, so that what is said of it does.
    """

    common: Annotated[
        float, Field(ge=0, lt=1, description="How many directions are flattened, as a share of d_model.")
    ] = 0.125
    rank: Annotated[int, Field(gt=0, description="How many directions the change of a matrix has.")] = 64
    neurons: Annotated[
        float, Field(gt=0, le=1, description="The share of the neuron vectors that are changed, the strongest.")
    ] = 1.0
    skip_words: Annotated[
        bool, Field(description="Leave the concept's own tokens out of what the gradient lowers.")
    ] = False

    def build(self, material: Material, concept: Concept) -> Iterator[MatrixChange]:
        """The changes of all matrices together."""
        yield from self.factored(material, concept)[0]

    def notes(self, material: Material, concept: Concept) -> tuple[str, ...]:
        """What the rank leaves out."""
        share = self.factored(material, concept)[1]
        return (
            f"{concept.name}: rank {self.rank} holds {share:.0%} of the gradient's change (of its squared size); "
            "the rest is left out.",
        )

    def changes_matrices_of(self, concept: Concept) -> bool:
        """No: all matrices are changed together."""
        return False

    def factored(self, material: Material, concept: Concept) -> tuple[list[MatrixChange], float]:
        """The changes at strength 1, and the share of the change's squared norm that their rank holds."""
        key = ("selective gradient", concept.identity, material.sites, self.common, self.rank, self.neurons)
        return material.once((*key, self.skip_words), lambda: self._factored(material, concept))

    def _factored(self, material: Material, concept: Concept) -> tuple[list[MatrixChange], float]:
        gradients = material.gradients(concept, skip_words=self.skip_words)
        flattened = round(self.common * material.checkpoint.hidden_size)
        specific: Iterable[Tensor] = (without_common(gradient, flattened) for gradient in gradients.values())
        rows: Iterable[Tensor] = (torch.arange(len(gradient)) for gradient in gradients.values())
        if self.neurons < 1:
            # All matrices have to be at hand to find the strongest rows; elsewhere one at a time is.
            specific = list(specific)
            rows = strongest_rows(specific, self.neurons)
        whole = held = matrices = 0.0
        changes = []
        for site, change, chosen in zip(gradients, specific, rows, strict=True):
            vectors = read_matrix(material.checkpoint, site.layer, site.matrix, site.expert_or_none)
            matrices += float(vectors.double().square().sum())
            wanted = change[chosen]
            whole += float(wanted.double().square().sum())
            if not bool(wanted.any()):
                continue
            left, right = largest_part(wanted, self.rank)
            held += float(left.double().square().sum())
            changes.append(
                MatrixChange(
                    site.matrix, site.layer, site.expert_or_none, chosen, -left, right, strength=1.0,
                    concept=concept.name,
                )
            )  # fmt: skip
        scale = SIZE * (matrices / max(held, 1e-300)) ** 0.5
        return [replace(made, left=scale * made.left) for made in changes], held / max(whole, 1e-300)

    def cost(self, size: ModelSize, self_text_tokens: int) -> Cost:
        """A pass there and two back for every token, and the singular directions of every matrix twice."""
        matrix, matrices = size.neurons * size.hidden_size, 3 * size.layers
        passes = 3 * 2 * size.parameters * GRADIENT_TOKENS
        directions = 2 * matrices * (4 * matrix * size.hidden_size + ROOTS * size.hidden_size**3)
        # The gradients as they are and flattened, in float32, and one matrix in float64.
        return Cost(passes + directions, start=0.0, memory=2 * 4 * matrices * matrix + 4 * 8 * matrix)

    def search_space(self, size: ModelSize) -> dict[str, Distribution]:
        """How much is flattened, and the rank."""
        return {"common": Decimal(0.02, 0.5, log=True), "rank": Whole(8, min(256, size.hidden_size), log=True)}


@edit_method(
    "remove-concept",
    title="out of the concept's token rows, and against the gradient of text about it",
    reference="after EMBER, arXiv 2606.03695, and RepSelect, arXiv 2606.17168",
    unit="a change of a thousandth of the size of the edited matrices, and so much of the rows' projection as is set",
    reads=("text",),
    writes=("gate", "in", "out", "embedding", "unembedding"),
    whole_concept=True,
    keeps_words=False,
    removes_knowledge=True,
    style=("red", (0, (5, 2)), "X"),
)
@dataclass(frozen=True)
class RemoveConcept(SelectiveGradient):
    """What is known of a concept and its words at once: `token-embeddings` and `selective-gradient` with one strength.

    The rows reach only the tokens of the words. The gradient reaches what is said of the concept without them.

    Attributes:
        rows: The rows' strength for each unit of strength.
        rows_most: The rows' largest strength. 1 takes the direction out. Past it the rows point the other way, where
            the gradient's change may raise the words again.
        more_tokens: How many tokens near the concept's are edited too.
    """

    rows: Annotated[float, Field(ge=0, description="The rows' strength for each unit of the edit's strength.")] = 1.0
    rows_most: Annotated[float, Field(gt=0, description="The largest strength that the rows get.")] = 1.0
    more_tokens: Annotated[
        int, Field(ge=0, description="How many tokens near the concept's are edited too, beside those of its words.")
    ] = 0

    def build(self, material: Material, concept: Concept) -> Iterator[MatrixChange]:
        """The rows' changes, then those of all matrices."""
        for change in row_changes(material, concept, self.more_tokens) if self.rows else ():
            # The change goes no further than the strength at which the rows get their largest one.
            yield replace(change, left=self.rows * change.left, most=self.rows_most / self.rows)
        yield from super().build(material, concept)

    def notes(self, material: Material, concept: Concept) -> tuple[str, ...]:
        """The tokens that were added to the user's, and what the rank leaves out."""
        return (*added_tokens(material, concept, self.more_tokens), *super().notes(material, concept))
