"""Locators: how the neurons of one matrix are chosen, each one short function that is found by its name.

A locator declares what it needs. One that needs no channels triggers no channel search.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rotate_edit.errors import BadInput


@dataclass(frozen=True)
class MatrixView:
    """One matrix as a locator sees it.

    Attributes:
        neurons: How many neurons it has.
        is_last: Whether it is the last of the matrices that are edited.
        by_channels: The neurons whose supported channels carry the concept, int64, ascending.
        scores: Each neuron's LM-head z-score of the concept, float32 [neurons]. None where no locator asks for it.
        least_score: |z| from which on a neuron counts as located by its score.
        seed: For locators that choose at random.
    """

    neurons: int
    is_last: bool
    by_channels: Tensor
    scores: Tensor | None
    least_score: float
    seed: int


Locate = Callable[[MatrixView], Tensor]


@dataclass(frozen=True)
class Locator:
    """A way to choose neurons.

    Attributes:
        name: What an edit method names it by.
        title: What it does, in a few words.
        reads: What it needs: "channels", "scores", or nothing.
        rows: From a matrix to the chosen neurons, int64, ascending, without repeats.
    """

    name: str
    title: str
    reads: frozenset[str]
    rows: Locate


_LOCATORS: dict[str, Locator] = {}


def locator(name: str, *, title: str, reads: tuple[str, ...] = ()) -> Callable[[Locate], Locate]:
    """Register a function as a locator.

    Args:
        name: The name that edit methods use.
        title: What it does, in a few words.
        reads: What it needs: "channels", "scores", or nothing.
    """

    def register(rows: Locate) -> Locate:
        _LOCATORS[name] = Locator(name, title, frozenset(reads), rows)
        return rows

    return register


def find_locator(name: str) -> Locator:
    """The locator of a name.

    Raises:
        BadInput: There is none of that name.
    """
    if name not in _LOCATORS:
        raise BadInput(f"there is no locator {name!r}; there are {', '.join(_LOCATORS)}.")
    return _LOCATORS[name]


@locator("all", title="every neuron")
def every_neuron(matrix: MatrixView) -> Tensor:
    """Every neuron of the matrix."""
    return torch.arange(matrix.neurons)


@locator("last-matrix", title="every neuron of the last matrix")
def of_the_last_matrix(matrix: MatrixView) -> Tensor:
    """Every neuron of the last matrix that is edited, and none of the others."""
    return torch.arange(matrix.neurons if matrix.is_last else 0)


@locator("channels", title="neurons with a supported channel of the concept", reads=("channels",))
def by_channels(matrix: MatrixView) -> Tensor:
    """Neurons whose supported vocabulary channels carry the concept."""
    return matrix.by_channels


@locator("lm-head", title="neurons with a high LM-head z-score of the concept", reads=("scores",))
def by_lm_head(matrix: MatrixView) -> Tensor:
    """Neurons by the mean LM-head z-score of the concept's tokens alone."""
    assert matrix.scores is not None  # what a locator declares is there
    return (matrix.scores.abs() >= matrix.least_score).nonzero()[:, 0]


@locator("random", title="as many random neurons as channels locate", reads=("channels",))
def at_random(matrix: MatrixView) -> Tensor:
    """As many neurons as channels locate, drawn at random: the control for locating."""
    generator = torch.Generator().manual_seed(matrix.seed)
    return torch.randperm(matrix.neurons, generator=generator)[: len(matrix.by_channels)].sort().values
