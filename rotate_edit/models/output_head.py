"""The end of a loaded model: from what its last MLP writes to its prediction, so that a change there needs one part.

It calls the model's own modules, in float32, so that every norm, scale and cap is as the model has it.
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
# Positions whose predictions are looked at together.
AT_ONCE = 4000


@dataclass(frozen=True)
class Positions:
    """What the last layer holds at positions of texts, on the model's device, float32.

    neurons: [n, neurons], the input of the MLP's last matrix; residual: [n, d_model], the residual stream before the
    last norm; written: [n, d_model], what the MLP wrote before the norm after it (None where there is no such norm).
    """

    neurons: Tensor
    residual: Tensor
    written: Tensor | None

    def at(self, places: Tensor) -> "Positions":
        """Some of the positions."""
        return Positions(
            self.neurons[places], self.residual[places], None if self.written is None else self.written[places]
        )


@dataclass(frozen=True)
class Tail:
    """The functions after the last MLP: its own norm (None for most), the last norm, and the head with its scales.

    added: what a block multiplies its MLP's part by.
    """

    after_mlp: Function | None
    norm: Function
    head: Function
    added: float

    def moved(self, positions: Positions, change: Tensor) -> Tensor:
        """The residual stream [n, d_model] when the MLP writes `change` [n, d_model] more."""
        if self.after_mlp is None or positions.written is None:
            return positions.residual + self.added * change
        return positions.residual + self.added * (
            self.after_mlp(positions.written + change) - self.after_mlp(positions.written)
        )

    def log_probabilities(self, residual: Tensor) -> Tensor:
        """Of every next token, [n, V]."""
        return self.head(self.norm(residual)).log_softmax(-1)


def tail_of(model: Any) -> Tail:
    """The tail of a dense model. Raises BadInput for a mixture of experts."""
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

    return Tail(
        _float32(after) if after is not None else None,
        _float32(last),
        predict,
        _number(config, architecture.residual_scale),
    )


def logit_factor(model: Any) -> float:
    """What a model multiplies by what its head gives."""
    config, architecture = model.config.get_text_config(), architecture_of(model.config.to_dict())
    return _number(config, architecture.logit_scale) / _number(config, architecture.logit_divisor)


def positions(model: Any, texts: Passages) -> Positions:
    """One pass over texts: what the tail starts from at every position. Raises BadInput for a mixture of experts."""
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
    """The module of the last layer's `out` matrix, and the prefix of the body that it stands in."""
    layer = model.config.get_text_config().num_hidden_layers - 1
    out, _ = layer_modules(model, layer)
    pattern = architecture_of(model.config.to_dict()).dense["out"].name.format(layer=layer)
    return out, live_parameter(model, "out", layer)[1].name.removesuffix(pattern)


def _norms(model: Any) -> tuple[torch.nn.Module, torch.nn.Module | None]:
    """The norm before the head, and the one between the last MLP and the residual stream where there is one."""
    architecture = architecture_of(model.config.to_dict())
    layer = model.config.get_text_config().num_hidden_layers - 1
    last = _module(model, architecture.final_norm)
    after = _module(model, architecture.post_mlp_norm and architecture.post_mlp_norm.format(layer=layer))
    if last is None:
        # A model that norms after each addition ends with its last block's norm.
        last, after = after, None
    return (last if last is not None else torch.nn.Identity()), after


def _module(model: Any, name: str | None) -> torch.nn.Module | None:
    """The module of a tensor's name in the body; None where the model has none."""
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
