"""Texts as batches of token ids, and what a loaded model predicts on them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rotate_edit.errors import BadInput

# A batch's logits hold at most this many numbers (128 MiB of float32), or one text when that is longer.
CELLS_IN_A_BATCH = 2**25


TOKENS_IN_A_BATCH = 4096


@dataclass(frozen=True)
class Passages:
    """Tokenised texts in batches of similar length.

    batches: int64 [rows, length] each, padded on the right with 0 (a causal model never looks there); lengths:
    int64 [rows] of each batch; order: which text each row is, int64 [rows] of each batch; texts: how many texts.
    """

    batches: tuple[Tensor, ...]
    lengths: tuple[Tensor, ...]
    order: tuple[Tensor, ...]
    texts: int

    def tokens(self) -> int:
        """How many tokens there are, padding not counted."""
        return int(sum(int(lengths.sum()) for lengths in self.lengths))


def tokenise(
    tokenizer: Any,
    texts: Sequence[str],
    *,
    vocabulary_size: int,
    longest: int | None = None,
    token_limit: int | None = None,
) -> Passages:
    """Tokenise texts with the tokenizer's own special tokens and put them in batches of similar length.

    longest: a text's tokens after that many are cut off (the model's context length); token_limit: texts are
    taken in the order given until they hold that many tokens together. Texts without a token are left out.
    Raises BadInput when no token is left.
    """
    rows: list[list[int]] = []
    total = 0
    for ids in tokenizer(list(texts), add_special_tokens=True)["input_ids"] if texts else ():
        if token_limit is not None and total >= token_limit:
            break
        if ids:
            rows.append(list(ids[:longest]))
            total += len(rows[-1])
    if not rows:
        raise BadInput("there is no text to measure on; give texts that the tokenizer turns into at least one token.")
    return batched(rows, vocabulary_size)


def batched(rows: Sequence[Sequence[int]], vocabulary_size: int) -> Passages:
    """Rows of token ids, none of them empty, in batches of similar length."""
    limit = max(1, min(TOKENS_IN_A_BATCH, CELLS_IN_A_BATCH // vocabulary_size))
    by_length = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    batches, lengths, order = [], [], []
    start = 0
    while start < len(by_length):
        width = len(rows[by_length[start]])
        chosen = by_length[start : start + max(1, limit // width)]
        start += len(chosen)
        padded = torch.zeros(len(chosen), width, dtype=torch.int64)
        for row, index in enumerate(chosen):
            padded[row, : len(rows[index])] = torch.tensor(rows[index])
        batches.append(padded)
        lengths.append(torch.tensor([len(rows[index]) for index in chosen]))
        order.append(torch.tensor(chosen))
    return Passages(tuple(batches), tuple(lengths), tuple(order), len(rows))


def log_probabilities(model: Any, passages: Passages) -> Iterator[Tensor]:
    """Next-token log-probabilities of every batch: float32 [rows, length, vocabulary], padding included."""
    for logits in next_logits(model, passages):
        yield torch.log_softmax(logits.float(), dim=-1)


def pass_through(model: Any, passages: Passages) -> Iterator[Tensor]:
    """Run every batch for what hooks see of it, and yield it [rows, length]. Hardly any prediction is computed."""
    for batch, _ in zip(passages.batches, next_logits(model, passages, logits_to_keep=1), strict=True):
        yield batch


def next_logits(model: Any, passages: Passages, **options: Any) -> Iterator[Tensor]:
    device = next(model.parameters()).device
    for batch in passages.batches:
        with torch.no_grad():
            # No attention mask: with the padding on the right a causal model's other positions do not see it.
            yield model(input_ids=batch.to(device), use_cache=False, **options).logits


def real_positions(batch: Tensor, lengths: Tensor) -> Tensor:
    """Which positions of a batch [rows, length] are no padding: bool [rows, length]."""
    return torch.arange(batch.shape[1])[None, :] < lengths[:, None]
