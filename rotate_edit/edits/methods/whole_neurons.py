"""Whole vectors, or whole channels of them, out of the located neurons."""

import torch

from rotate_edit.edits.methods.base import EditMethod, Factors, Target, edit_method


@edit_method(
    "project-channel",
    title="the located neurons' channels, projected out",
    reference="arXiv 2604.06005 for the channels",
    unit="the projection on the channels: 1 removes it",
    writes=("gate", "in", "out"),
    locator="channels",
    whole_vectors=True,
    style=("purple", (0, (5, 2)), "P"),
)
class ProjectChannel(EditMethod):
    """The located neurons' own channel vectors, projected out: `w - (w . q) q` over an orthonormal basis q of them."""

    def change(self, target: Target) -> Factors | None:
        """A block for each neuron: its coordinates in its basis, times the basis."""
        bases = [torch.linalg.qr(target.channels[int(row)].T).Q.T for row in target.rows]
        right = torch.cat(bases) if bases else target.vectors.new_zeros(0, target.vectors.shape[1])
        left = right.new_zeros(len(target.rows), len(right))
        column = 0
        for place, (row, basis) in enumerate(zip(target.rows, bases)):
            left[place, column : column + len(basis)] = -(basis @ target.vectors[row])
            column += len(basis)
        return target.rows, left, right


@edit_method(
    "zero-neurons",
    title="the located neurons switched off",
    unit="the share of the vector that is taken away",
    writes=("gate", "in", "out"),
    locator="channels",
    whole_vectors=True,
    style=("grey", (0, (3, 2)), "X"),
)
class ZeroNeurons(EditMethod):
    """The located neurons' whole vectors taken away: strength 1 switches the neurons off."""

    def change(self, target: Target) -> Factors | None:
        """Minus the identity, times the vectors."""
        return target.rows, -torch.eye(len(target.rows)), target.vectors[target.rows]
