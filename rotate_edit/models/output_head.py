"""The output head of a loaded model: everything from what its last MLP writes to its prediction.

A change in the last MLP needs only this part to be computed again. The functions call the model's own modules in
float32. So every norm, scale and cap is as the model has it.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rotate_edit.models.architectures import architecture_of
from rotate_edit.models.batches import Passages, head_inputs, pass_through, real_positions
from rotate_edit.models.hooks import layer_modules
from rotate_edit.models.parameters import live_parameter

Function = Callable[[Tensor], Tensor]
# Logits that are computed together hold at most so many numbers (64 MiB of float32): large enough for a fast product.
CELLS_AT_ONCE = 2**24
# Of these, so many fit a processor's cache: what is done with them reads them once.
CELLS_IN_CACHE = 2**19
# Positions at which few tokens are predicted together.
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
        some: Makes a head of few logits, from tokens, int64 [k], and weights over all tokens, float32 [V]: their k
            logits and the one of the weighted mean of all rows. None where the head's matrix is not known.
    """

    after_mlp: Function | None
    norm: Function
    head: Function
    added: float
    some: Callable[[Tensor, Tensor], Function] | None = None

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

    def few(self, tokens: Tensor, weights: Tensor) -> Function:
        """Make a head of few logits.

        Args:
            tokens: Tokens, int64 [k].
            weights: Weights over all tokens, float32 [V].

        Returns:
            The function, from what the last norm gives, [n, d_model], to the tokens' logits and the logit of the
            weighted mean of all rows, [n, k + 1].
        """
        if self.some is not None:
            return self.some(tokens, weights)

        def predict(normed: Tensor) -> Tensor:
            logits = self.head(normed)
            return torch.cat((logits[:, tokens.to(logits.device)], logits @ weights.to(logits.device)[:, None]), dim=1)

        return predict

    def log_probabilities(self, residual: Tensor) -> Tensor:
        """Compute the log-probabilities of every next token.

        Args:
            residual: The residual stream before the last norm, float32 [n, d_model].

        Returns:
            Log-probabilities in nats, float32 [n, V].
        """
        return self.head(self.norm(residual)).log_softmax(-1)


def rows_at_once(vocabulary_size: int) -> int:
    """Count the positions whose predictions are computed together.

    Args:
        vocabulary_size: Number of tokens that are predicted.

    Returns:
        The number, 64 at least.
    """
    return max(64, CELLS_AT_ONCE // vocabulary_size)


def predictions(model: Any, passages: Passages, wanted: Sequence[Tensor]) -> Iterator[Iterator[tuple[slice, Tensor]]]:
    """Predict the next token at some positions of every batch. The head sees these alone.

    Args:
        model: A loaded transformers model.
        passages: The texts.
        wanted: For each batch, which positions: bool [rows, length].

    Yields:
        For each batch, its n wanted positions in pieces that fit a processor's cache: which of them, and their
        log-probabilities in nats, float32 [m, V].
    """
    logits = live_logits(model)

    def pieces(read: Tensor) -> Iterator[tuple[slice, Tensor]]:
        first = 0
        for some in read.split(rows_at_once(model.get_output_embeddings().weight.shape[0])):
            with torch.no_grad():
                found = logits(some)
                for few in found.split(max(1, CELLS_IN_CACHE // found.shape[1])):
                    yield slice(first, first + len(few)), few.float().log_softmax(-1)
                    first += len(few)

    for read, chosen in zip(head_inputs(model, passages), wanted, strict=True):
        yield pieces(read[chosen.to(read.device)])


def live_logits(model: Any) -> Function:
    """Find what turns the input of the head's matrix into logits, with the model's scale and cap.

    Args:
        model: A loaded transformers model.

    Returns:
        The function, from [n, width] to [n, V], on the model's weights as they are when it is called.
    """
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return _capped(model.get_output_embeddings(), logit_factor(model), cap)


def _capped(head: Function, factor: float, cap: float | None) -> Function:
    def predict(read: Tensor) -> Tensor:
        logits = head(read) if factor == 1 else factor * head(read)
        return cap * torch.tanh(logits / cap) if cap else logits

    return predict


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
    logits = _capped(head, logit_factor(model), getattr(config, "final_logit_softcapping", None))
    project = _float32(project) if project is not None else torch.nn.Identity()
    matrix: Any = head.weight
    bias: Any = getattr(head, "bias", None)

    def predict(normed: Tensor) -> Tensor:
        return logits(project(normed))

    def some(tokens: Tensor, weights: Tensor) -> Function:
        tokens, weights = tokens.to(matrix.device), weights.to(matrix.device)
        rows = torch.cat((matrix[tokens], (weights @ matrix)[None]))
        added = None if bias is None else torch.cat((bias[tokens], (weights @ bias)[None]))

        def read(values: Tensor) -> Tensor:
            return torch.nn.functional.linear(values, rows, added)

        few = _capped(read, logit_factor(model), getattr(config, "final_logit_softcapping", None))
        return lambda normed: few(project(normed))

    return OutputHead(
        _float32(after) if after is not None else None,
        _float32(last),
        predict,
        _number(config, architecture.residual_scale),
        some,
    )


@dataclass(frozen=True)
class Predicted:
    """What a model predicts at positions of texts, without the predictions themselves.

    Attributes:
        normaliser: The logarithm of the sum of all exponentiated logits, float32 [n].
        often: How often each token is expected over all positions, float64 [V] on the CPU.
    """

    normaliser: Tensor
    often: Tensor


def predicted(seen: Positions, tail: OutputHead) -> Predicted:
    """Predict every token at every position once, and keep what later needs all tokens.

    Args:
        seen: What the last layer holds at n positions.
        tail: The output head.

    Returns:
        The normalisers, and how often each token is expected.
    """
    found: list[Tensor] = []
    with torch.no_grad():
        often = torch.zeros(tail.head(tail.norm(seen.residual[:1])).shape[1], dtype=torch.float64)
        for residual in seen.residual.split(rows_at_once(len(often))):
            logits = tail.head(tail.norm(residual))
            counts = torch.zeros_like(logits[0])
            for few in logits.split(max(1, CELLS_IN_CACHE // len(often))):
                found.append(few.logsumexp(1))
                counts += (few - found[-1][:, None]).exp_().sum(0)
            often += counts.cpu().double()
    return Predicted(torch.cat(found), often)


def chances(seen: Positions, tail: OutputHead, known: Predicted, ids: Tensor) -> Tensor:
    """Compute the probabilities of some tokens at every position, by products with their rows alone.

    Args:
        seen: What the last layer holds at n positions.
        tail: The output head.
        known: From `predicted` on the same positions.
        ids: The tokens, int64 [k].

    Returns:
        float32 [n, k].
    """
    few = tail.few(ids, torch.zeros(len(known.often)))
    with torch.no_grad():
        parts = zip(seen.residual.split(AT_ONCE), known.normaliser.split(AT_ONCE))
        return torch.cat([(few(tail.norm(residual))[:, :-1] - size[:, None]).exp() for residual, size in parts])


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
