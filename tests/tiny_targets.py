"""A random matrix, a vocabulary and texts as edit methods see them, and what a method does to the matrix."""

from typing import Any

import torch

from rotate_edit.channels.locators import MatrixView, find_locator
from rotate_edit.edits.directions import concept_mean, least_collateral_direction, mean_direction, token_covariance
from rotate_edit.edits.edit import Clamp, MatrixChange
from rotate_edit.edits.methods import Target, declaration, make_method
from rotate_edit.models.hooks import LayerActivations

NEURONS, WIDTH, CONCEPT = 12, 16, (3, 5, 8)
# Three neurons that channels locate, and two that the scores of `view` do.
LOCATED, SCORED = (1, 4, 7), (0, 4)


def projection(seed: int = 0, vocabulary: int = 200, width: int = WIDTH) -> torch.Tensor:
    """A table of token vectors, anisotropic on purpose: an isotropic one makes both directions the same."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(vocabulary, width, generator=generator) * torch.logspace(0, 1, width) + 0.5


def view(located: tuple[int, ...] = LOCATED, *, is_last: bool = True, seed: int = 0) -> MatrixView:
    """The matrix as locators see it."""
    scores = torch.full((NEURONS,), 0.9)
    scores[list(SCORED)] = torch.tensor([-1.0, 2.5])
    return MatrixView(NEURONS, is_last, torch.tensor(located, dtype=torch.int64), scores, 1.0, seed)


def text(seed: int) -> LayerActivations:
    """What one layer computes at 30 positions."""
    generator = torch.Generator().manual_seed(seed)
    neurons = torch.rand(30, NEURONS, generator=generator)
    return LayerActivations(neurons, torch.randn(30, WIDTH, generator=generator) + 0.2 * seed)


def target_of(
    method: str, *, seed: int = 0, located: tuple[int, ...] = LOCATED, layer: int = 2, matrix: str = "out"
) -> Target:
    """The matrix as a method sees it, with the rows that its locator chooses and everything that it may read."""
    generator = torch.Generator().manual_seed(seed)
    table = projection(seed)
    mean = concept_mean(table, torch.tensor(CONCEPT))
    rows = find_locator(declaration(method).locator).rows(view(located, seed=seed))
    return Target(
        layer=layer,
        expert=None,
        matrix=matrix,
        layers=6,
        vectors=torch.randn(NEURONS, WIDTH, generator=generator),
        rows=rows,
        direction=least_collateral_direction(mean, token_covariance(table)),
        mean_direction=mean_direction(mean),
        channels={row: torch.randn(2, WIDTH, generator=generator) for row in located},
        key=torch.randn(len(rows), generator=generator),
        text=(text(1), text(2)),
        seed=seed,
    )


def change_of(method: str, target: Target, **settings: Any) -> MatrixChange:
    """The change that a method makes of the matrix at strength 1."""
    made = make_method(method, settings).change(target)
    assert made is not None
    assert not isinstance(made, Clamp)
    return MatrixChange(target.matrix, target.layer, target.expert, *made, strength=1.0, concept="c")


def edited(method: str, target: Target, strength: float = 1.0, **settings: Any) -> torch.Tensor:
    """All neurons after a method's edit."""
    made = change_of(method, target, **settings).at(strength)
    after = target.vectors.clone()
    after[made.rows] += made.delta()
    return after
