"""Record what the layers of a loaded model compute while it reads texts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rotate_edit.errors import BadInput
from rotate_edit.models.batches import Passages, pass_through, real_positions
from rotate_edit.models.parameters import live_parameter


@dataclass(frozen=True)
class LayerActivations:
    """What one layer computed at the wanted positions of texts.

    Attributes:
        neurons: Activations of the neurons (the input of the MLP's last matrix), float32 [positions, neurons].
        residual: The residual stream after the layer, float32 [positions, d_model].
    """

    neurons: Tensor
    residual: Tensor


@contextmanager
def recorded(model: Any, layers: Sequence[int]) -> Iterator[dict[int, dict[str, Tensor]]]:
    """Keep what layers compute in the last forward pass.

    Args:
        model: A loaded transformers model.
        layers: Indices of the layers.

    Yields:
        For each layer, `neurons` [rows, length, neurons] and `residual` [rows, length, d_model]. Every forward pass
        replaces them.

    Raises:
        BadInput: If a layer is a mixture of experts.
    """
    kept: dict[int, dict[str, Tensor]] = {layer: {} for layer in layers}
    handles = []

    def keep_input(layer: int) -> Any:
        def hook(_module: Any, inputs: tuple[Tensor, ...]) -> None:
            kept[layer]["neurons"] = inputs[0].detach()

        return hook

    def keep_output(layer: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            kept[layer]["residual"] = (output[0] if isinstance(output, tuple) else output).detach()

        return hook

    try:
        for layer in layers:
            last, block = layer_modules(model, layer)
            handles += [
                last.register_forward_pre_hook(keep_input(layer)),
                block.register_forward_hook(keep_output(layer)),
            ]
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def layer_modules(model: Any, layer: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Find the module of a layer's `out` matrix and the layer's whole block.

    Args:
        model: A loaded transformers model.
        layer: Index of the layer.

    Returns:
        The module that holds the `out` matrix, and the block.

    Raises:
        BadInput: If the layer is a mixture of experts.
    """
    try:
        _, place = live_parameter(model, "out", layer)
    except BadInput as error:
        raise BadInput(
            "activations are read from dense layers only, and this model's layers are mixtures of experts; choose a "
            "method that needs no text."
        ) from error
    name = place.name.rsplit(".", 1)[0]
    return model.get_submodule(name), model.get_submodule(name.split(f".{layer}.")[0] + f".{layer}")


def record(
    model: Any, passages: Passages, layers: Sequence[int], next_ids: Tensor | None
) -> dict[int, LayerActivations]:
    """Record what layers compute on texts.

    Args:
        model: A loaded transformers model.
        passages: The texts.
        layers: Indices of the layers.
        next_ids: Token ids, int64 [n]. Only positions before one of these tokens are kept. None keeps all positions.

    Returns:
        For each layer, what it computed at the kept positions, on the CPU.

    Raises:
        BadInput: If a layer is a mixture of experts.
    """
    found: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}
    with recorded(model, layers) as kept:
        for index, batch in enumerate(pass_through(model, passages)):
            wanted = real_positions(batch, passages.lengths[index])
            if next_ids is not None:
                wanted = wanted[:, 1:] & torch.isin(batch, next_ids.cpu())[:, 1:]
                wanted = torch.nn.functional.pad(wanted, (0, 1))
            for layer in layers:
                values = kept[layer]
                # Some implementations flatten rows and positions before the MLP.
                neurons = values["neurons"].reshape(*batch.shape, -1)
                chosen = wanted.to(neurons.device)
                found[layer].append((neurons[chosen].float().cpu(), values["residual"][chosen].float().cpu()))
    return {
        layer: LayerActivations(torch.cat([one for one, _ in pieces]), torch.cat([other for _, other in pieces]))
        for layer, pieces in found.items()
    }


@dataclass(frozen=True)
class InputMoments:
    """What an MLP reads over texts, in moments.

    Attributes:
        mean: float32 [d_model].
        second: The mean of x x', not centred, float32 [d_model, d_model].
    """

    mean: Tensor
    second: Tensor


def mlp_inputs(model: Any, passages: Passages, layers: Sequence[int]) -> dict[int, InputMoments]:
    """Average what the MLPs of layers read over all positions of texts.

    That is the residual stream after the norm before the MLP. Sums are float64.

    Args:
        model: A loaded transformers model.
        passages: The texts.
        layers: Indices of the layers.

    Returns:
        For each layer the moments, on the CPU.

    Raises:
        BadInput: If a layer is a mixture of experts.
    """
    seen: dict[int, Tensor] = {}
    sums: dict[int, tuple[Tensor, Tensor]] = {}
    handles = []

    def keep(layer: int) -> Any:
        def hook(_module: Any, inputs: tuple[Tensor, ...]) -> None:
            seen[layer] = inputs[0].detach()

        return hook

    try:
        for layer in layers:
            layer_modules(model, layer)
            _, place = live_parameter(model, "in", layer)
            module = model.get_submodule(place.name.rsplit(".", 1)[0])
            handles.append(module.register_forward_pre_hook(keep(layer)))
        for batch, lengths in zip(pass_through(model, passages), passages.lengths, strict=True):
            real = real_positions(batch, lengths).flatten()
            for layer in layers:
                read = seen[layer].flatten(0, -2)[real.to(seen[layer].device)].cpu().double()
                mean, second = sums.get(layer, (0.0, 0.0))
                sums[layer] = (mean + read.sum(0), second + read.T @ read)
    finally:
        for handle in handles:
            handle.remove()
    count = passages.tokens()
    return {
        layer: InputMoments((mean / count).float(), (second / count).float()) for layer, (mean, second) in sums.items()
    }
