"""Baselines that read texts about the concept and texts without it."""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from rotate_edit.edits.directions import coverage, mean_direction, subtract_direction
from rotate_edit.edits.edit import Clamp
from rotate_edit.edits.methods.base import EditMethod, Factors, Target, edit_method
from rotate_edit.edits.semi_nmf import concept_score, semi_nmf
from rotate_edit.models.hooks import LayerActivations

# Semi-NMF is fitted on at most this many positions of each kind of text.
POSITIONS = 1500


@edit_method(
    "difference-of-means",
    title="difference of means out of every neuron",
    reference="Arditi et al. 2024",
    unit="the projection on the direction: 1 removes it",
    reads=("text",),
    writes=("out",),
    whole_concept=True,
    keeps_words=False,
    style=("purple", "-", "<"),
)
class DifferenceOfMeans(EditMethod):
    """The direction in which text about the concept moves the residual stream, out of every neuron of the layer.

    This is abliteration with a direction read from text, one for each layer, on the MLP's `out` matrix.
    """

    def change(self, target: Target) -> Factors | None:
        """The neurons' projections, times the layer's direction."""
        own, rest = _text(target)
        direction = mean_direction(own.residual.mean(0) - rest.residual.mean(0))
        return target.rows, *subtract_direction(target.vectors, direction)


@edit_method(
    "snmf-features",
    title="semi-NMF feature of the concept's activations",
    reference="EMBER, arXiv 2606.03695",
    unit="the projection on the feature: 1 removes it",
    reads=("text",),
    writes=("in", "out"),
    whole_concept=True,
    keeps_words=False,
    style=("teal", "-", "h"),
)
@dataclass(frozen=True)
class SnmfFeatures(EditMethod):
    """EMBER's eraser: the vector that the concept's semi-NMF feature reads or writes, out of its own neurons.

    `W[rows] -= strength (W[rows] . f) f` on the neurons that hold 95 % of the feature. It never edits the gate.

    Attributes:
        features: How many features a layer gets.
        fit_seed: Of the factorisation.
    """

    features: Annotated[int, Field(gt=0, description="How many semi-NMF features a layer gets.")] = 50
    fit_seed: Annotated[int, Field(description="Seed of the factorisation.")] = 0

    def change(self, target: Target) -> Factors | None:
        """The projections of the feature's neurons, times the feature's vector."""
        feature = concept_feature(*_text(target), features=self.features, seed=self.fit_seed)
        rows = coverage(feature.square(), 0.95)
        return rows, *subtract_direction(target.vectors[rows], mean_direction(feature @ target.vectors))


def concept_feature(own: LayerActivations, rest: LayerActivations, *, features: int, seed: int) -> Tensor:
    """The semi-NMF feature of a layer that tells the concept's positions from others best, float32 [neurons].

    Args:
        own: What the concept's positions activate.
        rest: What other text activates.
        features: How many features are fitted.
        seed: Of the factorisation.
    """
    table = torch.cat([own.neurons[:POSITIONS], rest.neurons[:POSITIONS]])
    is_concept = torch.arange(len(table)) < min(len(own.neurons), POSITIONS)
    parts, weights = semi_nmf(table.T, min(features, len(table)), seed=seed)
    return parts[:, int(concept_score(weights, is_concept).argmax())]


@edit_method(
    "clamp-neurons",
    title="neurons with high LM-head scores held against the concept",
    reference="Flash Interpretability, arXiv 2501.02688",
    unit="the neurons' usual activation",
    reads=("text",),
    writes=("out",),
    locator="lm-head",
    whole_concept=True,
    keeps_words=False,
    live=True,
    style=("ochre", (0, (5, 2)), ">"),
)
class ClampNeurons(EditMethod):
    """The neurons with the highest LM-head score held at `strength` times their usual size, against the concept.

    The paper finds neurons by their LM-head projection and fixes their activations. It publishes no value. So the mean
    |activation| before the concept's tokens is taken, with the sign that lowers the concept.
    """

    def change(self, target: Target) -> Clamp | None:
        """The clamp of one layer. None where no neuron is found."""
        if not len(target.rows):
            return None
        own, _ = _text(target)
        sign = (target.vectors[target.rows] @ target.mean_direction.read).sign()
        values = -sign * own.neurons.abs().mean(0)[target.rows]
        return Clamp(target.layer, target.rows, values, 1.0, "")


def _text(target: Target) -> tuple[LayerActivations, LayerActivations]:
    assert target.text is not None  # what a method declares is there
    return target.text
