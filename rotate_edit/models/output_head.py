"""The output head of a loaded model: everything from what its last MLP writes to its prediction.

A change in the last MLP needs only this part to be computed again. The functions call the model's own modules in
float32. So every norm, scale and cap is as the model has it.
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rotate_edit.models.architectures import architecture_of
from rotate_edit.models.batches import Passages, pass_through, real_positions
from rotate_edit.models.hooks import layer_modules
from rotate_edit.models.parameters import live_parameter

Function = Callable[[Tensor], Tensor]
# Number of positions whose predictions are computed together.
AT_ONCE = 4000


@dataclass(frozen=True)
class Positions:
    """What the last layer holds at positions of texts, float32 on the model's device.

    Attributes:
        neurons: The input of the MLP's last matrix, [n, neurons].
        residual: The residual stream before the last norm, [n, d_model].
        written: What the MLP wrote before the norm after it, [n, d_model]; None where there is no such norm.
    """

    neurons: Tensor
    residual: Tensor
    written: Tensor | None

    def at(self, places: Tensor) -> "Positions":
        """Select some of the positions.

        Args:
            places: Indices, int64 [m], or a mask, bool [n].

        Returns:
            The selected positions.
        """
        return Positions(
            self.neurons[places], self.residual[places], None if self.written is None else self.written[places]
        )


@dataclass(frozen=True)
class OutputHead:
    """The functions of the output head, which follow the last MLP.

    Attributes:
        after_mlp: The MLP's own norm, from [n, d_model] to [n, d_model]; None for most models.
        norm: The last norm, from [n, d_model] to [n, d_model].
        head: The head with its scales and cap, from [n, d_model] to logits [n, V].
        added: Factor by which a block multiplies what its MLP adds.
    """

    after_mlp: Function | None
    norm: Function
    head: Function
    added: float

    def moved(self, positions: Positions, change: Tensor) -> Tensor:
        """Compute the residual stream after a change of what the MLP writes.

        Args:
            positions: What the last layer holds without the change, at n positions.
            change: What the MLP writes in addition, float32 [n, d_model].

        Returns:
            The residual stream before the last norm, float32 [n, d_model].
        """
        if self.after_mlp is None or positions.written is None:
            return positions.residual + self.added * change
        return positions.residual + self.added * (
            self.after_mlp(positions.written + change) - self.after_mlp(positions.written)
        )

    def log_probabilities(self, residual: Tensor) -> Tensor:
        """Compute the log-probabilities of every next token.

        Args:
            residual: The residual stream before the last norm, float32 [n, d_model].

        Returns:
            Log-probabilities in nats, float32 [n, V].
        """
        return self.head(self.norm(residual)).log_softmax(-1)


def output_head_of(model: Any) -> OutputHead:
    """Build the output head of a dense model.

    Args:
        model: A loaded transformers model.

    Returns:
        The output head, with float32 copies of the model's modules.

    Raises:
        BadInput: If the model is a mixture of experts.
    """
    config = model.config.get_text_config()
    architecture = architecture_of(model.config.to_dict())
    last, after = _norms(model)
    head, project = _float32(model.get_output_embeddings()), _module(model, architecture.head_projection)
    cap = getattr(config, "final_logit_softcapping", None)
    factor = logit_factor(model)
    project = _float32(project) if project is not None else torch.nn.Identity()

    def predict(normed: Tensor) -> Tensor:
        logits = factor * head(project(normed))
        return cap * torch.tanh(logits / cap) if cap else logits

    return OutputHead(
        _float32(after) if after is not None else None,
        _float32(last),
        predict,
        _number(config, architecture.residual_scale),
    )


def logit_factor(model: Any) -> float:
    """Compute the factor by which a model multiplies what its head gives.

    Args:
        model: A loaded transformers model.

    Returns:
        The factor.
    """
    config, architecture = model.config.get_text_config(), architecture_of(model.config.to_dict())
    return _number(config, architecture.logit_scale) / _number(config, architecture.logit_divisor)


def positions(model: Any, texts: Passages) -> Positions:
    """Record what the output head starts from, at every position of texts, in one pass.

    Args:
        model: A loaded transformers model.
        texts: The texts.

    Returns:
        What the last layer holds at all real positions, batch after batch.

    Raises:
        BadInput: If the model is a mixture of experts.
    """
    last, after = _norms(model)
    kept: dict[str, Tensor] = {}
    found: dict[str, list[Tensor]] = {}

    def keeping(name: str) -> Any:
        def hook(_module: Any, inputs: tuple[Tensor, ...]) -> None:
            kept[name] = inputs[0].detach()

        return hook

    with ExitStack() as stack:
        hooked = {"neurons": _out(model)[0], "residual": last} | ({"written": after} if after is not None else {})
        for name, module in hooked.items():
            stack.enter_context(_removed(module.register_forward_pre_hook(keeping(name))))
        for batch, lengths in zip(pass_through(model, texts), texts.lengths, strict=True):
            real = real_positions(batch, lengths)
            for name, values in kept.items():
                # Some implementations flatten rows and positions before the MLP.
                found.setdefault(name, []).append(values.reshape(*batch.shape, -1)[real.to(values.device)].float())
    joined = {name: torch.cat(parts) for name, parts in found.items()}
    return Positions(joined["neurons"], joined["residual"], joined.get("written"))


def _removed(handle: Any) -> AbstractContextManager[Any]:
    # A hook's handle removes itself at the end of a `with`.
    return handle


def _out(model: Any) -> tuple[torch.nn.Module, str]:
    """Find the module of the last layer's `out` matrix, and the prefix of the body that holds it."""
    layer = model.config.get_text_config().num_hidden_layers - 1
    out, _ = layer_modules(model, layer)
    pattern = architecture_of(model.config.to_dict()).dense["out"].name.format(layer=layer)
    return out, live_parameter(model, "out", layer)[1].name.removesuffix(pattern)


def _norms(model: Any) -> tuple[torch.nn.Module, torch.nn.Module | None]:
    """Find the norm before the head, and the one between the last MLP and the residual stream (None without one)."""
    architecture = architecture_of(model.config.to_dict())
    layer = model.config.get_text_config().num_hidden_layers - 1
    last = _module(model, architecture.final_norm)
    after = _module(model, architecture.post_mlp_norm and architecture.post_mlp_norm.format(layer=layer))
    if last is None:
        # A model that norms after each addition ends with its last block's norm.
        last, after = after, None
    return (last if last is not None else torch.nn.Identity()), after


def _module(model: Any, name: str | None) -> torch.nn.Module | None:
    """Find the module of a tensor's name in the body; None where the model has none."""
    if name is None:
        return None
    try:
        return model.get_submodule((_out(model)[1] + name).rsplit(".", 1)[0])
    except AttributeError:
        return None


def _float32(module: torch.nn.Module) -> torch.nn.Module:
    return copy.deepcopy(module).float().requires_grad_(requires_grad=False)


def _number(config: Any, name: str | None) -> float:
    return float(getattr(config, name, 1.0)) if name else 1.0
