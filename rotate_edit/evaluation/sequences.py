"""Words of several tokens in the concept's probability mass.

A word's probability at a place of a text does not depend on how the tokenizer splits it. For a word of one token it is
the probability of that token. For a word of several it is the product of theirs, each after those before it. The text
holds the whole word there, so one forward pass gives all factors. The first token alone would say little: after *the*
` put` is likely, mostly where no *putter* follows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rotate_edit.models.batches import real_positions
from rotate_edit.vocabulary.concept import NO_TOKEN, sequence_starts


def concept_steps(
    batch: Tensor, lengths: Tensor, concept_ids: Tensor, sequences: Sequence[Sequence[int]] = ()
) -> Tensor:
    """Find where a text goes on with a word of the concept, and of how many tokens.

    Args:
        batch: Token ids, int64 [rows, length].
        lengths: Number of real tokens in each row, int64 [rows].
        concept_ids: Tokens that are words of the concept by themselves, int64 [k].
        sequences: Token ids of its words of several tokens (`TokenSet.every_sequence`).

    Returns:
        At each position how many tokens the word has that follows it, int64 [rows, length]. It is 0 where no word of
        the concept follows. Where several do, the shortest counts, since its probability includes the others'.
    """
    real = batch.where(real_positions(batch, lengths).to(batch.device), NO_TOKEN)
    steps = torch.zeros_like(batch)
    for sequence in sorted(sequences, key=len, reverse=True):
        steps[:, :-1][sequence_starts(real, sequence)[:, 1:]] = len(sequence)
    steps[:, :-1][torch.isin(real[:, 1:], concept_ids.to(batch.device))] = 1
    return steps


def positions_read(steps: Tensor) -> Tensor:
    """Find the positions whose predictions `concept_mass_at` needs.

    Args:
        steps: From `concept_steps`.

    Returns:
        True from the position before each word to the one before its last token, bool [rows, length].
    """
    wanted = steps > 0
    for further in range(1, int(steps.max()) if steps.numel() else 0):
        wanted[:, further:] |= steps[:, :-further] > further
    return wanted


def concept_mass_at(predicted: Tensor, batch: Tensor, steps: Tensor, concept_ids: Tensor) -> Tensor:
    """Compute the concept's probability at each place where a text goes on with one of its words.

    It is the probability of the concept's tokens together. Where the text goes on with a word of several tokens that
    begins with none of these, the probability of that word is added.

    Args:
        predicted: Log-probabilities in nats at `positions_read`, row after row, float [n, V].
        batch: Token ids, int64 [rows, length].
        steps: From `concept_steps`.
        concept_ids: Tokens that are words of the concept by themselves, int64 [k].

    Returns:
        The probabilities at the positions where `steps` is above 0, row after row, in the dtype of `predicted`.
    """
    device = predicted.device
    batch, steps, concept_ids = batch.to(device), steps.to(device), concept_ids.to(device)
    read, places = positions_read(steps), steps > 0
    following = torch.nn.functional.pad(batch[:, 1:], (0, 1))
    # Log-probabilities of the text's own tokens, and their sums over each word.
    said = torch.zeros(batch.shape, dtype=predicted.dtype, device=device)
    said[read] = predicted.gather(1, following[read, None])[:, 0]
    word = said.clone()
    for further in range(1, int(steps.max()) if steps.numel() else 0):
        word[:, :-further] += said[:, further:].where(steps[:, :-further] > further, 0)
    word = word[places].exp()
    alone = predicted[places[read]][:, concept_ids].exp().sum(dim=-1)
    return alone + word.where(~torch.isin(following[places], concept_ids), 0)
