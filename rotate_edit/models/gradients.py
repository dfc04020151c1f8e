"""Gradients of a loaded model's likelihood of texts, for single matrices."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from rotate_edit.errors import BadInput
from rotate_edit.models.batches import Passages, real_positions
from rotate_edit.models.layout import neuron_rows
from rotate_edit.models.parameters import live_parameter

# The logits of a pass hold at most so many numbers (128 MiB of float32), or those of one text. The pass back keeps
# several copies of them.
CELLS_AT_ONCE = 2**25
# A matrix, its layer and its expert, as `MatrixChange` names them.
MatrixName = tuple[str, int | None, int | None]


def likelihood_gradients(
    model: Any, passages: Passages, matrices: Iterable[MatrixName], *, skip: Tensor | None = None
) -> dict[MatrixName, Tensor]:
    """The gradient of the mean log-probability that a model gives the tokens of texts.

    Gradients are summed in float32, whatever the model's dtype. The model's parameters stay as they are.

    Args:
        model: A loaded transformers model.
        passages: The texts.
        matrices: The matrices.
        skip: Token ids whose own log-probability does not count, int64 [n]. They are still read as context.

    Returns:
        By matrix float32 [neurons, d_model] on the CPU, in nats a token.

    Raises:
        BadInput: The model has no such matrix, or the texts hold no token that counts.
    """
    places = {name: live_parameter(model, *name) for name in matrices}
    counted = 0
    with _summed({place.name: parameter for parameter, place in places.values()}, model) as sums, torch.enable_grad():
        device = next(model.parameters()).device
        for batch, lengths in _pieces(passages, model.config.get_text_config().vocab_size):
            wanted = real_positions(batch, lengths)[:, 1:]
            if skip is not None:
                wanted = wanted & ~torch.isin(batch[:, 1:], skip.cpu())
            if not bool(wanted.any()):
                continue
            counted += int(wanted.sum())
            tokens = batch.to(device)
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1][wanted.to(device)]
            following = tokens[:, 1:][wanted.to(device)]
            (-torch.nn.functional.cross_entropy(logits.float(), following, reduction="sum")).backward()
    if not counted:
        raise BadInput("the texts about the concept hold no token to read a gradient of; give longer texts.")
    return {
        name: neuron_rows(sums[place.name], place, name[2]).float().cpu() / counted
        for name, (_, place) in places.items()
    }


def _pieces(passages: Passages, vocabulary_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows of a batch at a time, with their lengths."""
    for batch, lengths in zip(passages.batches, passages.lengths, strict=True):
        rows = max(1, CELLS_AT_ONCE // (vocabulary_size * batch.shape[1]))
        yield from zip(batch.split(rows), lengths.split(rows), strict=True)


@contextmanager
def _summed(parameters: dict[str, torch.nn.Parameter], model: torch.nn.Module) -> Iterator[dict[str, Tensor]]:
    """Sum the gradients of some parameters alone, in float32, and leave all of them as they were."""
    sums = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    handles: list[RemovableHandle] = []

    def adds(name: str) -> Any:
        def add(parameter: torch.nn.Parameter) -> None:
            if parameter.grad is not None:
                sums[name] += parameter.grad.float()
                parameter.grad = None

        return add

    try:
        for parameter in before:
            parameter.requires_grad_(False)
        for name, parameter in parameters.items():
            parameter.requires_grad_(True)
            handles.append(parameter.register_post_accumulate_grad_hook(adds(name)))
        yield sums
    finally:
        for handle in handles:
            handle.remove()
        for parameter, wanted in before.items():
            parameter.requires_grad_(wanted)
