"""What text tells about a concept inside a live model, for the baselines that need text."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rotate_edit.edit import Evidence
from rotate_edit.errors import BadInput
from rotate_edit.evaluate import texts_about
from rotate_edit.live import live_parameter
from rotate_edit.measures import Passages, log_probabilities, real_positions, tokenise
from rotate_edit.semi_nmf import concept_score, semi_nmf
from rotate_edit.tasks import Items

# Semi-NMF is fitted on at most this many positions of each kind of text.
POSITIONS = 1500
SNMF_FEATURES = 50


@dataclass(frozen=True)
class Seen:
    """One layer at the wanted positions of a text: neurons' activations float32 [positions, neurons] (the input of
    the MLP's last matrix) and the residual stream after the layer float32 [positions, d_model]."""

    neurons: Tensor
    residual: Tensor


@contextmanager
def recorded(model: Any, layers: Sequence[int]) -> Iterator[dict[int, dict[str, Tensor]]]:
    """Keeps what layers compute in the last forward pass: by layer `neurons` and `residual`, [rows, length, ...]."""
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
    """The module that holds a layer's `out` matrix, and the whole block. Raises BadInput for a mixture of experts."""
    try:
        _, place = live_parameter(model, "out", layer)
    except BadInput as error:
        raise BadInput(
            "activations are read from dense layers only, and this model's layers are mixtures of experts; choose a "
            "method that needs no text."
        ) from error
    name = place.name.rsplit(".", 1)[0]
    return model.get_submodule(name), model.get_submodule(name.split(f".{layer}.")[0] + f".{layer}")


def record(model: Any, passages: Passages, layers: Sequence[int], next_ids: Tensor | None) -> dict[int, Seen]:
    """What every layer computes on texts, at the positions before one of `next_ids` (at all positions without)."""
    found: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}
    with recorded(model, layers) as kept:
        for index, _ in enumerate(log_probabilities(model, passages)):
            batch = passages.batches[index]
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
        layer: Seen(torch.cat([one for one, _ in pieces]), torch.cat([other for _, other in pieces]))
        for layer, pieces in found.items()
    }


def gather_evidence(
    model: Any,
    concept: Passages,
    others: Passages,
    concept_ids: Tensor,
    layers: Sequence[int],
    *,
    features: int = 0,
    seed: int = 0,
) -> dict[int, Evidence]:
    """By layer: the difference of means, the neurons' mean |activation|, and the concept's semi-NMF feature.

    The concept's positions are those before one of its tokens. features: how many semi-NMF features a layer gets (0
    fits none); the one with the highest concept score is taken. Raises BadInput when no position is the concept's.
    """
    about, free = record(model, concept, layers, concept_ids), record(model, others, layers, None)
    if not len(about[layers[0]].neurons):
        raise BadInput("the texts hold none of the concept's tokens, so its activations cannot be read; give others.")
    found = {}
    for layer in layers:
        own, rest = about[layer], free[layer]
        feature = None
        if features:
            table = torch.cat([own.neurons[:POSITIONS], rest.neurons[:POSITIONS]])
            is_concept = torch.arange(len(table)) < min(len(own.neurons), POSITIONS)
            parts, weights = semi_nmf(table.T, min(features, len(table)), seed=seed)
            feature = parts[:, int(concept_score(weights, is_concept).argmax())]
        found[layer] = Evidence(
            difference=own.residual.mean(0) - rest.residual.mean(0),
            activation=own.neurons.abs().mean(0),
            feature=feature,
        )
    return found


def evidence_about(
    name: str,
    concept_ids: Tensor,
    model: Any,
    tokenizer: Any,
    items: Items,
    layers: Sequence[int],
    *,
    token_limit: int,
    features: int = 0,
    seed: int = 0,
) -> dict[int, Evidence]:
    """`gather_evidence` on the texts of items that are for choosing, at most `token_limit` tokens of each kind.

    Raises BadInput when there are none about the concept or none without it.
    """
    about, free = texts_about(items, [name], "choose")
    if not about or not free:
        raise BadInput(f"the items hold no texts to choose on with and without {name}; give others, or more text.")
    config = model.config.get_text_config()
    sizes: dict[str, Any] = {
        "vocabulary_size": config.vocab_size,
        "longest": getattr(config, "max_position_embeddings", None),
        "token_limit": token_limit,
    }
    concept, others = tokenise(tokenizer, about, **sizes), tokenise(tokenizer, free, **sizes)
    return gather_evidence(model, concept, others, concept_ids, layers, features=features, seed=seed)
