"""What a model writes: side-by-side generations, repetition, and how often a concept's words leak into them."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rotate_edit import statistics
from rotate_edit.errors import BadInput
from rotate_edit.statistics import Measure


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    new_tokens: int = 40,
    samples: int = 1,
    seed: int | None = None,
    temperature: float = 1.0,
    rows_at_once: int = 64,
) -> list[list[str]]:
    """Continue each prompt: `samples` texts a prompt, without the prompt.

    Greedy when seed is None, else drawn from the whole vocabulary at `temperature`. The same seed draws the same
    random numbers for base and edited model; torch's own generator is left as it was.
    """
    device = next(model.parameters()).device
    encoded = [list(ids) for ids in tokenizer(list(prompts), add_special_tokens=True)["input_ids"]]
    encoded = [ids or [first_token(tokenizer)] for ids in encoded]
    rows = [index for index in range(len(encoded)) for _ in range(samples)]
    texts: list[list[str]] = [[] for _ in prompts]
    # Every setting is given, because a checkpoint's generation_config.json may hold other ones.
    choice: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    if seed is not None:
        choice = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        for start in range(0, len(rows), rows_at_once):
            chosen = rows[start : start + rows_at_once]
            width = max(len(encoded[index]) for index in chosen)
            ids = torch.zeros(len(chosen), width, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, index in enumerate(chosen):
                ids[row, width - len(encoded[index]) :] = torch.tensor(encoded[index])
                mask[row, width - len(encoded[index]) :] = 1
            if seed is not None:
                torch.manual_seed(seed + start)
            with torch.no_grad():
                written = model.generate(
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    max_new_tokens=new_tokens,
                    num_beams=1,
                    repetition_penalty=1.0,
                    pad_token_id=padding_token(tokenizer),
                    **choice,
                )
            for index, row_ids in zip(chosen, written[:, width:], strict=True):
                texts[index].append(tokenizer.decode(row_ids, skip_special_tokens=True))
    return texts


def padding_token(tokenizer: Any) -> int:
    """A token to fill rows up with."""
    for index in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id):
        if index is not None:
            return int(index)
    return 0


def first_token(tokenizer: Any) -> int:
    """The token that a text from nothing starts with."""
    return int(tokenizer.bos_token_id if tokenizer.bos_token_id is not None else padding_token(tokenizer))


def repetition(texts: Sequence[str], *, n: int = 4) -> Measure:
    """Share of a text's n-grams of words that occurred in it before, mean over texts (Welleck et al. 2020, seq-rep-n).

    Texts of fewer than n words are left out.
    """
    shares = []
    for text in texts:
        grams = _grams(text, n)
        if grams:
            shares.append(1 - len(set(grams)) / len(grams))
    return statistics.mean(shares)


def distinct(texts: Sequence[str], *, n: int = 2) -> Measure:
    """Different n-grams of words over all n-grams of all texts together (Li et al. 2016, distinct-n).

    The ratio falls as texts are added, so compare equal numbers of texts only. Its interval resamples texts and
    is centred on the value, because resampling repeats texts and so lowers the ratio itself.
    """
    lists = [_grams(text, n) for text in texts]
    value = _distinct_share(lists)
    generator = np.random.default_rng(0)
    count = len(lists)
    draws = np.array([_distinct_share([lists[i] for i in generator.integers(0, count, count)]) for _ in range(200)])
    found = draws[np.isfinite(draws)]
    centred = found - found.mean() + value if len(found) else found
    return statistics.measure(statistics.Estimate(value, centred, count))


def _distinct_share(lists: Sequence[Sequence[tuple[str, ...]]]) -> float:
    total = sum(len(grams) for grams in lists)
    return len({gram for grams in lists for gram in grams}) / total if total else float("nan")


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]


def word_pattern(words: Sequence[str]) -> re.Pattern[str]:
    """A pattern that finds any of the words, or its plain plural, as whole words in any case. Raises BadInput."""
    if not any(word.strip() for word in words):
        raise BadInput("a leak rate needs at least one word of the concept.")
    ordered = sorted({word.strip() for word in words if word.strip()}, key=len, reverse=True)
    return re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, ordered)) + r")(?:s|es)?(?!\w)", re.IGNORECASE)


def leak_rate(generations: Sequence[Sequence[str]], words: Sequence[str]) -> Measure:
    """Share of sampled generations in which a word of the concept appears.

    generations: the samples of each prompt; n is how many there are in all. The interval is the wider, on each side, of
    two: prompts resampled, because samples of one prompt resemble each other, and Wilson's over all samples, because
    resampling cannot widen a rate of 0 or 1.
    """
    pattern = word_pattern(words)
    hits = [sum(bool(pattern.search(text)) for text in texts) for texts in generations]
    rate = statistics.ratio_of_sums(hits, [len(texts) for texts in generations])
    count = sum(map(len, generations))
    whole = statistics.wilson(sum(hits), count)
    low, high = min(rate.low, whole.low), max(rate.high, whole.high)
    return Measure(rate.value, low, high, count, rate.standard_error)
