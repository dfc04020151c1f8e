"""A direction out of some neurons, whoever chose them: the concept's direction, or its mean direction."""

from rotate_edit.edits.directions import subtract_direction
from rotate_edit.edits.methods.base import EditMethod, Factors, Target, edit_method

UNIT = "the projection on the direction: 1 removes it, more pushes against it"
NEURONS = ("gate", "in", "out")


@edit_method(
    "random-neurons",
    title="direction out of random neurons",
    unit=UNIT,
    writes=NEURONS,
    locator="random",
    whole_vectors=True,
    control=True,
    style=("grey", (0, (1, 2)), "."),
)
@edit_method(
    "least-collateral-everywhere",
    title="direction out of every neuron",
    unit=UNIT,
    writes=NEURONS,
    style=("ochre", "-", "D"),
)
@edit_method(
    "lm-head-located",
    title="direction out of the neurons with high LM-head scores",
    reference="arXiv 2501.02688 for the scores",
    unit=UNIT,
    writes=NEURONS,
    locator="lm-head",
    control=True,
    style=("green", "-", "s"),
)
@edit_method(
    "channel-located",
    title="direction out of the neurons that channels locate",
    reference="arXiv 2604.06005 for the channels",
    unit=UNIT,
    writes=NEURONS,
    locator="channels",
    style=("teal", "-", "p"),
)
class DirectionOut(EditMethod):
    """The concept's direction out of the located neurons: `w <- w - strength (w . read) write`."""

    def change(self, target: Target) -> Factors | None:
        """The located neurons' projections, times the writing direction."""
        return target.rows, *subtract_direction(target.vectors[target.rows], target.direction)


@edit_method(
    "direction-everywhere",
    title="mean direction out of every neuron",
    reference="Arditi et al. 2024, on the MLP",
    unit=UNIT,
    writes=NEURONS,
    whole_concept=True,
    keeps_words=False,
    control=True,
    style=("red", "-", "^"),
)
class MeanDirectionOut(EditMethod):
    """The concept's mean direction out of every neuron: the abliteration formula on the MLP's matrices."""

    def change(self, target: Target) -> Factors | None:
        """The neurons' projections, times the mean direction."""
        return target.rows, *subtract_direction(target.vectors[target.rows], target.mean_direction)


@edit_method(
    "layer-kernel",
    title="mean direction out of every neuron, with a weight for each layer",
    reference="heretic",
    unit=UNIT,
    writes=NEURONS,
    whole_concept=True,
    keeps_words=False,
    style=("teal", (0, (5, 2)), "v"),
)
class LayerKernel(EditMethod):
    """The mean direction out of every neuron with a weight for each layer, as heretic writes it.

    The weight is `max_weight + distance / min_weight_distance * (min_weight - max_weight)` in layers from
    `max_weight_position`, and nothing beyond. Here the weights are 1 and 0, the position is 80 % of the depth (the
    middle of heretic's searched range), and the distance is 60 % (its largest). heretic also edits the attention's
    output.
    """

    def change(self, target: Target) -> Factors | None:
        """The neurons' projections by the layer's weight, times the mean direction."""
        depth = target.layer / max(1, target.layers - 1)
        weight = max(0.0, 1.0 - abs(depth - 0.8) / 0.6)
        left, right = subtract_direction(target.vectors[target.rows], target.mean_direction)
        return target.rows, weight * left, right
