"""How a matrix of neuron vectors lies inside a stored tensor or a parameter of a loaded model."""

from dataclasses import replace

from torch import Tensor

from rotate_edit.errors import BadInput
from rotate_edit.models.architectures import Place
from rotate_edit.models.safetensors_file import Stored


def matrix_shape(stored: Stored, place: Place) -> tuple[int, int]:
    """Compute the shape of a matrix inside a stored tensor.

    Args:
        stored: The stored tensor.
        place: Where the matrix lies.

    Returns:
        The number of neurons, and d_model.

    Raises:
        BadInput: If the tensor is not a matrix or cannot be divided into the parts of the place.
    """
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
    """View a tensor as neuron vectors, whatever its orientation.

    Writing to the view changes the tensor.

    Args:
        tensor: A stored tensor or a parameter of a loaded model.
        place: Where the matrix lies in it.
        expert: Index of the expert in a tensor that stacks experts; None means the first.

    Returns:
        The view [neurons, d_model] in the tensor's dtype.
    """
    if place.stacked:
        tensor = tensor[0 if expert is None else expert]
    if tensor.ndim == 1:
        tensor = tensor[None]
    if place.neurons == "columns":
        tensor = tensor.T
    count = tensor.shape[0] // place.parts
    return tensor.narrow(0, place.part * count, count)


def expert_slice(stored: Stored, place: Place, expert: int | None) -> Stored:
    """Find the bytes of one expert in a tensor that stacks experts.

    Args:
        stored: The stored tensor.
        place: Where the matrix lies.
        expert: Index of the expert; None means the first.

    Returns:
        The expert's part of the tensor; the tensor itself if it does not stack experts.
    """
    if not place.stacked:
        return stored
    size = (stored.end - stored.start) // stored.shape[0]
    start = stored.start + (expert or 0) * size
    return replace(stored, shape=stored.shape[1:], start=start, end=start + size)
