"""How a matrix of neuron vectors lies inside a stored tensor or a live parameter."""

from dataclasses import replace

from torch import Tensor

from rotate_edit.errors import BadInput
from rotate_edit.models.architectures import Place
from rotate_edit.models.safetensors_file import Stored


def matrix_shape(stored: Stored, place: Place) -> tuple[int, int]:
    """Neurons and d_model of a matrix that lies at `place` in a stored tensor. Raises BadInput."""
    shape = stored.shape[1:] if place.stacked else stored.shape
    if len(shape) == 1:
        shape = (1, *shape)
    if len(shape) != 2:
        raise BadInput(f"{place.name} has shape {list(stored.shape)}, which is not a matrix.")
    neurons, width = shape if place.neurons == "rows" else (shape[1], shape[0])
    if neurons % place.parts:
        raise BadInput(f"{place.name} cannot hold {place.parts} matrices: it has {neurons} neurons.")
    return neurons // place.parts, width


def neuron_rows(tensor: Tensor, place: Place, expert: int | None = None) -> Tensor:
    """A view of a stored or live tensor as [neurons, d_model], whatever its orientation; writes go through it."""
    if place.stacked:
        tensor = tensor[0 if expert is None else expert]
    if tensor.ndim == 1:
        tensor = tensor[None]
    if place.neurons == "columns":
        tensor = tensor.T
    count = tensor.shape[0] // place.parts
    return tensor.narrow(0, place.part * count, count)


def expert_slice(stored: Stored, place: Place, expert: int | None) -> Stored:
    """The bytes of one expert in a tensor that stacks them; the tensor itself otherwise."""
    if not place.stacked:
        return stored
    size = (stored.end - stored.start) // stored.shape[0]
    start = stored.start + (expert or 0) * size
    return replace(stored, shape=stored.shape[1:], start=start, end=start + size)
