"""A file from outside the package that adds one of each: a method, a control, a metric and a family of models."""

from typing import Any

import torch

from rotate_edit import (
    Architecture,
    EditMethod,
    Measure,
    MeasuredModel,
    Metric,
    Target,
    add_architecture,
    edit_method,
    gated,
    metric,
    subtract_direction,
)


@edit_method(
    "strongest-half",
    title="direction out of the stronger half of the located neurons",
    unit="the projection on the direction",
    writes=("out",),
    locator="channels",
)
class StrongestHalf(EditMethod):
    """The concept's direction out of the half of the located neurons that hold most of it."""

    def change(self, target: Target) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The stronger neurons' projections, times the writing direction."""
        held = (target.vectors[target.rows] @ target.direction.read).abs()
        rows = target.rows[held >= held.median()] if len(held) else target.rows
        return rows, *subtract_direction(target.vectors[rows], target.direction)


@edit_method(
    "every-other-neuron",
    title="direction out of every other neuron",
    unit="the projection on the direction",
    writes=("out",),
    control=True,
)
class EveryOther(EditMethod):
    """A control that is drawn beside every edit."""

    def change(self, target: Target) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The projections of every other neuron, times the writing direction."""
        rows = target.rows[::2]
        return rows, *subtract_direction(target.vectors[rows], target.direction)


@metric("edited_parameters", title="parameters", note="of the model that was measured", tile=True)
class Parameters(Metric):
    """How many parameters the measured model has."""

    def measure(self, edited: MeasuredModel, base: MeasuredModel, known: Any) -> Measure:
        """A count has no interval."""
        count = float(sum(parameter.numel() for parameter in edited.model.parameters()))
        return Measure(count, count, count, 1, 0.0, count)


add_architecture(Architecture(family="Made up", model_type="made_up", dense=gated("layers.{layer}.mlp")))
