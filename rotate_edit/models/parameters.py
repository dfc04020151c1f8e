"""Find the parameters of a loaded model by the matrix that they hold."""

import torch

from rotate_edit.errors import BadInput
from rotate_edit.models.architectures import Architecture, Place, architecture_of, locate


def live_parameter(
    model: torch.nn.Module, matrix: str, layer: int | None = None, expert: int | None = None
) -> tuple[torch.nn.Parameter, Place]:
    """Find the parameter of a loaded model that holds a matrix.

    Args:
        model: A loaded transformers model.
        matrix: A name as in `MatrixChange`, or "attention_out". "unembedding" gives the embedding when the head is
            tied.
        layer: Index of the layer; None for the tables.
        expert: Index of the expert; None in a dense layer.

    Returns:
        The parameter, and how the neurons lie in it.

    Raises:
        BadInput: If the model has no such matrix, or the parameter does not hold plain numbers (quantised, or left on
            disk).
    """
    architecture = _architecture(model)
    parameters = dict(model.named_parameters())
    place = locate(architecture, parameters, matrix, layer, expert)
    if place is None and matrix == "unembedding":
        place = locate(architecture, parameters, "embedding")
    if place is None:
        where = "" if layer is None else f" in layer {layer}" + ("" if expert is None else f", expert {expert}")
        raise BadInput(f'the loaded {architecture.family} model has no matrix "{matrix}"{where}.')
    parameter = parameters[place.name]
    if parameter.is_meta or parameter.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise BadInput(f"{place.name} is not held in memory as floating-point numbers, so it cannot be edited.")
    return parameter, place


def _architecture(model: torch.nn.Module) -> Architecture:
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        raise BadInput("only a transformers model can be edited live, and this one has no config.")
    return architecture_of(config.to_dict())
