"""Rank-one edits of `out` matrices: ROME's key on the neurons' side, the concept's direction on the residual's side."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from rotate_edit.edits.methods.base import Decimal, Distribution, EditMethod, Factors, Target, edit_method
from rotate_edit.models.cost import ModelSize

UNIT = "about one nat of the concept's mean logit where it comes next"
READS = ("self_text", "activations")


@edit_method(
    "rank-one-random",
    title="rank-one edit of random neurons",
    reference="arXiv 2202.05262",
    unit=UNIT,
    reads=READS,
    writes=("out",),
    locator="random",
    search_layers=2,
    style=("grey", (0, (3, 2)), "d"),
)
@edit_method(
    "rank-one-lm-head",
    title="rank-one edit of the neurons with high LM-head scores",
    reference="arXiv 2202.05262",
    unit=UNIT,
    reads=READS,
    writes=("out",),
    locator="lm-head",
    search_layers=2,
    style=("green", (0, (1, 2)), "d"),
)
@edit_method(
    "rank-one-channels",
    title="rank-one edit of the neurons that channels locate",
    reference="arXiv 2202.05262",
    unit=UNIT,
    reads=READS,
    writes=("out",),
    locator="channels",
    search_layers=2,
    style=("blue", (0, (5, 2)), "d"),
)
@edit_method(
    "rank-one",
    title="rank-one edit of the last layer (ROME key)",
    reference="arXiv 2202.05262",
    unit=UNIT,
    reads=READS,
    writes=("out",),
    locator="last-matrix",
    search_layers=2,
    style=("blue", (0, (1, 2)), "s"),
)
@dataclass(frozen=True)
class RankOne(EditMethod):
    """The concept's direction out of the located neurons, by as much as they say that the concept comes next.

    `w_n <- w_n - strength * c_n * write` with the coefficients c of `directions.key_coefficients`. What the layer
    writes changes only where the concept is about to be said, and then along the direction that moves other logits
    least. The key is fitted on text that the model writes itself, so no corpus is needed.

    Attributes:
        key_ridge: Ridge of the key, as a multiple of the neurons' mean square.
    """

    key_ridge: Annotated[
        float,
        Field(gt=0, allow_inf_nan=False, description="Ridge of the key, as a multiple of the neurons' mean square."),
    ] = 0.03

    def change(self, target: Target) -> Factors | None:
        """The coefficients of the neurons, times the writing direction."""
        if target.key is None:
            return None
        return target.rows, -target.key[:, None], target.direction.write[None]

    def search_space(self, size: ModelSize) -> dict[str, Distribution]:
        """The ridge, over three decades."""
        return {"key_ridge": Decimal(0.001, 1.0, log=True)}
