"""What an edit does to words of the concept that it was not told."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rotate_edit.evaluation import measures, statistics
from rotate_edit.evaluation.statistics import Measure
from rotate_edit.models.batches import Passages


def halves(words: Sequence[str]) -> tuple[tuple[list[str], list[str]], tuple[list[str], list[str]]]:
    """Every second word given and the others held out, both ways."""
    even, odd = list(words[0::2]), list(words[1::2])
    return (even, odd), (odd, even)


def mass_left(model: Any, passages: Passages, held_out: Tensor, before: tuple[Tensor, Tensor]) -> Measure:
    """Measure the share of the base's probability mass that is left on words held out from an edit.

    Args:
        model: A loaded model, the edit switched on that was made from the other words.
        passages: Texts that hold the words.
        held_out: Tokens of the words held out, without those of the words given, int64 [k].
        before: From `measures.mass_by_text` of the base on the same texts and tokens.

    Returns:
        The share. An edit that only silences the words it was given leaves 1.
    """
    after = measures.mass_by_text(model, passages, held_out)
    return statistics.ratio_of_sums(after[0].numpy(), before[0].numpy()).against(1)
