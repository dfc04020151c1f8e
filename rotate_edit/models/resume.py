"""A forward pass that starts at a later layer: what enters that layer on fixed texts is computed once and kept.

An edit changes nothing below its first layer. So the residual stream that enters that layer stays the same.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rotate_edit.models.parameters import live_parameter


@dataclass(frozen=True)
class Entered:
    """What entered a layer in one forward pass.

    Attributes:
        hidden: The residual stream, [rows, length, d_model].
        tupled: Whether the blocks of this model return tuples.
    """

    hidden: Tensor
    tupled: bool


def block_of(model: Any, layer: int) -> torch.nn.Module:
    """Find a layer's whole block.

    Args:
        model: A loaded transformers model.
        layer: Index of the layer.

    Returns:
        The block.

    Raises:
        BadInput: The model has no such layer.
    """
    name = live_parameter(model, "attention_out", layer)[1].name
    return model.get_submodule(name.split(f".{layer}.")[0] + f".{layer}")


@contextmanager
def entering(model: Any, layer: int) -> Iterator[list[Entered]]:
    """Collect what enters a layer in every forward pass.

    Args:
        model: A loaded transformers model.
        layer: Index of the layer, 1 or more.

    Yields:
        A list that grows by one entry for each pass.
    """
    found: list[Entered] = []
    tupled: list[bool] = []

    def look(_module: Any, _inputs: Any, output: Any) -> None:
        tupled.append(isinstance(output, tuple))

    def keep(_module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        found.append(Entered((inputs[0] if inputs else named["hidden_states"]).detach(), tupled[-1]))

    below, block = block_of(model, layer - 1), block_of(model, layer)
    with below.register_forward_hook(look), block.register_forward_pre_hook(keep, with_kwargs=True):
        yield found


@contextmanager
def resumed(model: Any, layer: int, entered: Entered) -> Iterator[None]:
    """Skip the blocks below a layer inside a `with` block.

    The model's own loop over its layers runs, with its masks and position embeddings. The blocks below the layer hand
    on what they are given. The layer itself is given what entered it before.

    Args:
        model: A loaded transformers model.
        layer: Index of the first layer that is computed, 1 or more.
        entered: What enters it.
    """

    def enter(_module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if inputs:
            return (entered.hidden, *inputs[1:]), named
        return inputs, named | {"hidden_states": entered.hidden}

    with ExitStack() as stack:
        stack.enter_context(block_of(model, layer).register_forward_pre_hook(enter, with_kwargs=True))
        for below in range(layer):
            stack.enter_context(_handing_on(block_of(model, below), tupled=entered.tupled))
        yield


@contextmanager
def _handing_on(block: Any, *, tupled: bool) -> Iterator[None]:
    """Let a block return what it is given, as long as the `with` block runs."""
    own = block.__dict__.get("forward")

    def hand_on(*inputs: Any, **named: Any) -> Any:
        given = inputs[0] if inputs else named["hidden_states"]
        return (given, None) if tupled else given

    block.forward = hand_on
    try:
        yield
    finally:
        del block.forward
        if own is not None:
            block.forward = own
