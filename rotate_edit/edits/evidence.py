"""What text tells about a concept inside a live model, for the baselines that need text."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rotate_edit.edits.edit import Evidence
from rotate_edit.edits.semi_nmf import concept_score, semi_nmf
from rotate_edit.errors import BadInput
from rotate_edit.evaluation.evaluate import texts_about
from rotate_edit.evaluation.tasks import Items
from rotate_edit.models.batches import Passages, tokenise
from rotate_edit.models.hooks import record

# Semi-NMF is fitted on at most this many positions of each kind of text.
POSITIONS = 1500
SNMF_FEATURES = 50


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
    about, free = texts_about(items, [name], "validation")
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
