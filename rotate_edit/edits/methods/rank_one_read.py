"""A rank-one edit of what early MLPs read: their neurons no longer see what the concept adds to their input."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

from rotate_edit.edits.directions import key_coefficients
from rotate_edit.edits.edit import MatrixChange
from rotate_edit.edits.material import Concept, Material
from rotate_edit.edits.methods.base import Decimal, Distribution, EditMethod, edit_method
from rotate_edit.models.checkpoint import read_matrix
from rotate_edit.models.cost import ModelSize


@edit_method(
    "rank-one-read",
    title="rank-one edit of what the MLPs of early layers read of the concept",
    reference="after ROME, arXiv 2202.05262",
    unit="the concept's mean contribution to every neuron's input: 1 removes it",
    reads=("text",),
    writes=("gate", "in"),
    whole_concept=True,
    keeps_words=False,
    style=("teal", (0, (1, 2)), "v"),
)
@dataclass(frozen=True)
class RankOneRead(EditMethod):
    """`w <- w - strength (w . m) r'` for every `gate` and `in` vector w of the first layers.

    x is what a layer's MLP reads. m is the mean of x in texts about the concept less its mean in texts without it, and
    S the second moments of x in the latter. `r = (S + l I)^-1 m / (m' (S + l I)^-1 m)` is the linear reading that is 1
    along m and as small as can be elsewhere (`directions.key_coefficients`). That is ROME's key, read.
    The texts without the concept should hold its neighbours, or they suffer with it.

    Attributes:
        depth: The share of the layers that are edited, from the first.
        key_ridge: l as a multiple of the mean of S's diagonal.
    """

    depth: Annotated[
        float, Field(gt=0, le=1, description="The share of the layers that are edited, from the first.")
    ] = 0.34
    key_ridge: Annotated[
        float,
        Field(gt=0, allow_inf_nan=False, description="Ridge of the reading, as a multiple of the inputs' mean square."),
    ] = 0.03

    def build(self, material: Material, concept: Concept) -> Iterator[MatrixChange]:
        """One change for each matrix that reads, in the first layers."""
        last = max(1, round(self.depth * material.checkpoint.layers))
        sites = [site for site in material.sites if site.matrix in ("gate", "in") and site.layer < last]
        layers = sorted({site.layer for site in sites})
        moments = material.mlp_inputs(concept, layers) if layers else {}
        for site in sites:
            own, rest = moments[site.layer]
            added = own.mean - rest.mean
            read = key_coefficients(rest.second, added, ridge=self.key_ridge).float()
            vectors = read_matrix(material.checkpoint, site.layer, site.matrix)
            rows = torch.arange(len(vectors))
            yield MatrixChange(
                site.matrix, site.layer, None, rows, -(vectors @ added)[:, None], read[None], 1.0, concept.name
            )

    def changes_matrices_of(self, concept: Concept) -> bool:
        """No: what the layers read is averaged for all of them together."""
        return False

    def search_space(self, size: ModelSize) -> dict[str, Distribution]:
        """How deep it goes, and the ridge."""
        return {"depth": Decimal(0.1, 0.7), "key_ridge": Decimal(0.003, 0.3, log=True)}
