"""How well a model follows text about a concept, at the tokens that are not the concept's words.

An edit that only silences words leaves the rest of such a text as easy to predict as it was. An edit that takes away
what the words mean makes the rest harder. The same rise on other texts says how much of it is plain damage.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rotate_edit.errors import BadInput
from rotate_edit.evaluation import statistics
from rotate_edit.evaluation.questions import word_pattern
from rotate_edit.evaluation.statistics import Estimate, Measure
from rotate_edit.models.batches import Passages, batched, next_logits

CELLS_IN_CACHE = 2**19
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class MarkedTexts:
    """Tokenised texts, with their tokens marked that belong to listed words.

    Attributes:
        passages: The texts in batches.
        listed: For each batch, bool [rows, length], true at tokens of listed words.
    """

    passages: Passages
    listed: tuple[Tensor, ...]


@dataclass(frozen=True)
class Losses:
    """One model's losses on marked texts, by text.

    Attributes:
        listed: Sums in nats at tokens of listed words, float64 [texts].
        listed_tokens: How many such tokens there are, float64 [texts].
        rest: Sums in nats at all other tokens, float64 [texts].
        rest_tokens: How many these are, float64 [texts].
    """

    listed: Floats
    listed_tokens: Floats
    rest: Floats
    rest_tokens: Floats


def mark_words(
    tokenizer: Any,
    texts: Sequence[str],
    words: Sequence[str],
    *,
    vocabulary_size: int,
    longest: int | None = None,
    token_limit: int | None = None,
) -> MarkedTexts:
    """Tokenise texts and mark the tokens of listed words.

    Args:
        tokenizer: A fast transformers tokenizer, which knows where in a text its tokens stand.
        texts: The texts.
        words: The listed words. They are found as whole words, in any case.
        vocabulary_size: Number of tokens in the model's vocabulary.
        longest: At most this many tokens of each text.
        token_limit: About this many tokens of all texts together.

    Returns:
        The marked texts. Texts of a single token are left out, because nothing is predicted in them.

    Raises:
        BadInput: No text is left.
    """
    pattern = word_pattern(words) if words else None
    rows: list[list[int]] = []
    marks: list[list[bool]] = []
    total = 0
    encoded = tokenizer(list(texts), add_special_tokens=True, return_offsets_mapping=True) if texts else {}
    for text, ids, offsets in zip(
        texts, encoded.get("input_ids", ()), encoded.get("offset_mapping", ()), strict=bool(texts)
    ):
        if token_limit is not None and total >= token_limit:
            break
        if len(ids) < 2:
            continue
        spans = [match.span() for match in pattern.finditer(text)] if pattern else []
        rows.append(list(ids[:longest]))
        marks.append([any(a < end and start < b for start, end in spans) for a, b in offsets[:longest]])
        total += len(rows[-1])
    if not rows:
        raise BadInput("there is no text to measure comprehension on; give texts of at least two tokens.")
    passages = batched(rows, vocabulary_size)
    listed = []
    for batch, order in zip(passages.batches, passages.order, strict=True):
        marked = torch.zeros(batch.shape, dtype=torch.bool)
        for row, text_index in enumerate(order.tolist()):
            marked[row, : len(marks[text_index])] = torch.tensor(marks[text_index])
        listed.append(marked)
    return MarkedTexts(passages, tuple(listed))


def read_losses(model: Any, texts: MarkedTexts) -> Losses:
    """Measure a model's losses on marked texts, at listed words and elsewhere.

    Args:
        model: A loaded transformers model.
        texts: The marked texts.

    Returns:
        The losses by text.
    """
    passages = texts.passages
    sums = torch.zeros(4, passages.texts, dtype=torch.float64)
    for index, logits in enumerate(next_logits(model, passages)):
        batch, lengths, order = passages.batches[index], passages.lengths[index], passages.order[index]
        losses = _losses(logits[:, :-1], batch[:, 1:].to(logits.device)).double().cpu()
        real = torch.arange(1, batch.shape[1])[None, :] < lengths[:, None]
        for place, chosen in enumerate((texts.listed[index][:, 1:] & real, ~texts.listed[index][:, 1:] & real)):
            sums[2 * place].index_add_(0, order, torch.where(chosen, losses, 0.0).sum(dim=1))
            sums[2 * place + 1].index_add_(0, order, chosen.sum(dim=1).double())
    return Losses(*(row.numpy() for row in sums))


def _losses(logits: Tensor, following: Tensor) -> Tensor:
    """The loss in nats of each token that follows, float32 [rows, length]; a few rows at a time."""
    flat, ids = logits.reshape(-1, logits.shape[-1]), following.reshape(-1)
    step = max(1, CELLS_IN_CACHE // flat.shape[1])
    pieces = [
        torch.nn.functional.cross_entropy(
            flat[first : first + step].float(), ids[first : first + step], reduction="none"
        )
        for first in range(0, len(flat), step)
    ]
    return torch.cat(pieces).reshape(following.shape)


def rise(base: Losses, edited: Losses, *, listed: bool = False, seed: int = 0) -> Estimate:
    """Estimate how far the loss a token rose, in nats, at the tokens outside the listed words.

    Args:
        base: The base's losses.
        edited: The edited model's, on the same texts.
        listed: Whether the listed words' own tokens are taken instead.
        seed: Seed of the resampled texts.

    Returns:
        The rise. Not-a-number where there are no such tokens.
    """
    name = "listed" if listed else "rest"
    change = getattr(edited, name) - getattr(base, name)
    columns = np.stack([change, getattr(base, f"{name}_tokens")], axis=1)
    return statistics.bootstrap(columns, lambda means: means[:, 0] / means[:, 1], seed=seed)


def selectivity(own: Estimate, elsewhere: Estimate) -> Measure:
    """How much more the loss rose on the concept's texts than on others, in nats a token.

    Args:
        own: The rise on texts about the concept.
        elsewhere: The rise on other texts, resampled with another seed.

    Returns:
        The difference, with the base's 0 beside it.
    """
    difference = Estimate(own.value - elsewhere.value, own.draws - elsewhere.draws, own.n + elsewhere.n)
    return statistics.measure(difference).against(0)
