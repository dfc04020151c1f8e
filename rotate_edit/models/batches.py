"""Batches of token ids made from texts, and what a loaded model predicts on them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rotate_edit.errors import BadInput
from rotate_edit.models.resume import Entered, entering, resumed

# A batch's logits would hold at most this many numbers (1 GiB of float32), or one text when that is longer. Hardly any
# measure makes them all.
CELLS_IN_A_BATCH = 2**28
TOKENS_IN_A_BATCH = 4096
# What enters layers is kept for so many bytes of one set of passages.
BYTES_KEPT = 2**29


@dataclass(frozen=True)
class Passages:
    """Tokenised texts in batches of similar length.

    Attributes:
        batches: One int64 [rows, length] tensor for each batch. Rows are padded on the right with 0, where a causal
            model never looks.
        lengths: One int64 [rows] tensor for each batch: the number of real tokens in each row.
        order: One int64 [rows] tensor for each batch: which text each row is.
        texts: Number of texts.
        start: The first layer that passes compute. What enters it is kept from the first pass on, so the model must not
            change below it. 0 computes all and keeps nothing.
        kept: What entered a layer in the pass over a batch, by layer and batch.
    """

    batches: tuple[Tensor, ...]
    lengths: tuple[Tensor, ...]
    order: tuple[Tensor, ...]
    texts: int
    start: int = 0
    kept: dict[tuple[int, int], Entered] = field(default_factory=dict, compare=False, repr=False)

    def starting_at(self, layer: int) -> "Passages":
        """The same texts, for a model that changes only from a layer on. What is kept is shared.

        Args:
            layer: The first layer that passes compute.
        """
        return self if layer == self.start else replace(self, start=layer)

    def tokens(self) -> int:
        """Count the tokens, without the padding."""
        return int(sum(int(lengths.sum()) for lengths in self.lengths))


def tokenise(
    tokenizer: Any,
    texts: Sequence[str],
    *,
    vocabulary_size: int,
    longest: int | None = None,
    token_limit: int | None = None,
    tokens_at_once: int = TOKENS_IN_A_BATCH,
) -> Passages:
    """Tokenise texts and put them in batches of similar length.

    The tokenizer adds its own special tokens. Texts without a token are left out.

    Args:
        tokenizer: A transformers tokenizer.
        texts: The texts.
        vocabulary_size: Number of tokens in the model's vocabulary. It bounds the size of a batch.
        longest: Longest text in tokens (the model's context length). Tokens after it are cut off. None for no limit.
        token_limit: Total number of tokens wanted. Texts are taken in the order given until they reach it. None for no
            limit.
        tokens_at_once: Most tokens of a batch, padding included; a longer text has a batch of its own.

    Returns:
        The texts in batches.

    Raises:
        BadInput: If no token is left.
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
    return batched(rows, vocabulary_size, tokens_at_once=tokens_at_once)


def batched(
    rows: Sequence[Sequence[int]], vocabulary_size: int, *, tokens_at_once: int = TOKENS_IN_A_BATCH
) -> Passages:
    """Put rows of token ids in batches of similar length.

    Args:
        rows: Token ids of each text. No row may be empty.
        vocabulary_size: Number of tokens in the model's vocabulary. It bounds the size of a batch.
        tokens_at_once: Most tokens of a batch, padding included; a longer text has a batch of its own.

    Returns:
        The rows in batches, longest rows first.
    """
    limit = max(1, min(tokens_at_once, CELLS_IN_A_BATCH // vocabulary_size))
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


def first_texts(passages: Passages, tokens: int, vocabulary_size: int) -> Passages:
    """The first of some texts, in the order in which they were given, until they hold so many tokens.

    Args:
        passages: The texts.
        tokens: How many tokens are wanted. The last text is taken whole.
        vocabulary_size: Number of tokens in the model's vocabulary. It bounds the size of a batch.

    Returns:
        The texts in batches; the passages themselves when they hold no more.
    """
    if passages.tokens() <= tokens:
        return passages
    rows: list[list[int]] = [[] for _ in range(passages.texts)]
    for batch, lengths, order in zip(passages.batches, passages.lengths, passages.order, strict=True):
        for row, length, index in zip(batch, lengths.tolist(), order.tolist(), strict=True):
            rows[index] = row[:length].tolist()
    taken, total = 0, 0
    while total < tokens:
        total += len(rows[taken])
        taken += 1
    return batched(rows[:taken], vocabulary_size)


def log_probabilities(model: Any, passages: Passages) -> Iterator[Tensor]:
    """Predict the next token at every position of every batch.

    Args:
        model: A loaded transformers model.
        passages: The texts.

    Yields:
        Log-probabilities in nats for each batch, float32 [rows, length, vocabulary], padding included.
    """
    for logits in next_logits(model, passages):
        yield torch.log_softmax(logits.float(), dim=-1)


def pass_through(model: Any, passages: Passages) -> Iterator[Tensor]:
    """Run every batch through the model for what hooks see of it.

    Hardly any prediction is computed.

    Args:
        model: A loaded transformers model.
        passages: The texts.

    Yields:
        Token ids of each batch after it has run, int64 [rows, length].
    """
    for batch, _ in zip(passages.batches, head_inputs(model, passages), strict=True):
        yield batch


def next_logits(model: Any, passages: Passages, **options: Any) -> Iterator[Tensor]:
    """Compute the next-token logits of every batch.

    Args:
        model: A loaded transformers model.
        passages: The texts.
        **options: Further arguments of the model's forward pass.

    Yields:
        Logits of each batch, [rows, length, vocabulary] in the model's dtype and on its device, padding included.
    """
    for number in range(len(passages.batches)):
        yield _pass(model, passages, number, **options).logits


def _pass(model: Any, passages: Passages, number: int, **options: Any) -> Any:
    """Run one batch through the model, from the passages' first layer on; returns the model's output."""
    device = next(model.parameters()).device
    # No attention mask is needed: the padding is on the right, where a causal model does not look.
    options |= {"input_ids": passages.batches[number].to(device), "use_cache": False}
    place = (passages.start, number)
    with torch.no_grad():
        if not passages.start:
            return model(**options)
        if place in passages.kept:
            with resumed(model, passages.start, passages.kept[place]):
                return model(**options)
        with entering(model, passages.start) as found:
            output = model(**options)
        _keep(passages.kept, place, found[-1])
        return output


def _keep(kept: dict[tuple[int, int], Entered], place: tuple[int, int], entered: Entered) -> None:
    """Keep what entered a layer. What was kept of other layers goes first when there is no room; or nothing is kept."""
    room = BYTES_KEPT - entered.hidden.nbytes
    for other in [other for other in kept if other[0] != place[0]]:
        if sum(found.hidden.nbytes for found in kept.values()) > room:
            del kept[other]
    if sum(found.hidden.nbytes for found in kept.values()) <= room:
        kept[place] = entered


def head_inputs(model: Any, passages: Passages) -> Iterator[Tensor]:
    """Compute what the head reads of every batch, and hardly any prediction.

    Args:
        model: A loaded transformers model.
        passages: The texts.

    Yields:
        The input of the head's matrix, [rows, length, width] in the model's dtype, padding included.
    """
    read: list[Tensor] = []

    def one_alone(_module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        read.append(inputs[0].detach())
        return (inputs[0][:1, :1], *inputs[1:])

    for number, batch in enumerate(passages.batches):
        with model.get_output_embeddings().register_forward_pre_hook(one_alone):
            _pass(model, passages, number)
        yield read.pop().reshape(*batch.shape, -1)


def real_positions(batch: Tensor, lengths: Tensor) -> Tensor:
    """Tell which positions of a batch are not padding.

    Args:
        batch: Token ids, int64 [rows, length].
        lengths: Number of real tokens in each row, int64 [rows].

    Returns:
        True at real positions, bool [rows, length].
    """
    return torch.arange(batch.shape[1])[None, :] < lengths[:, None]
