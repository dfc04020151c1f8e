"""Self-generated text: text that a model writes without a prompt, kept between runs.

Writing it takes longer than most of the work that then reads it.
"""

from typing import Any

import torch

from rotate_edit.models.batches import Passages, batched
from rotate_edit.models.generation import first_token, padding_token
from rotate_edit.models.text_cache import kept_text

VERSION = 1


def self_text(model: Any, tokenizer: Any, *, tokens: int, seed: int) -> Passages:
    """Return self-generated text of a model, from the cache folder if it is there.

    The cache is used when the same weights wrote the text under the same settings. Device, number of threads and
    versions must be the same as well.

    Args:
        model: A loaded transformers model.
        tokenizer: Its tokenizer.
        tokens: Number of tokens, as in `write_samples`.
        seed: Seed of the draw.

    Returns:
        The samples in batches, as `write_samples` returns them.
    """
    vocabulary_size = model.config.get_text_config().vocab_size
    parts = {"version": VERSION, "first token": first_token(tokenizer), "tokens": tokens, "seed": seed}

    def write() -> list[list[int]]:
        written = write_samples(model, tokenizer, tokens=tokens, seed=seed)
        rows: list[list[int]] = torch.cat(written.batches)[torch.cat(written.order).argsort()].tolist()
        return rows

    def is_sound(rows: Any) -> bool:
        lists = isinstance(rows, list) and bool(rows) and all(isinstance(row, list) and row for row in rows)
        return lists and all(type(token) is int and 0 <= token < vocabulary_size for row in rows for token in row)

    return batched(kept_text("text", model, parts, write, is_sound), vocabulary_size)


SAMPLE_LENGTH = 100


SAMPLES_AT_ONCE = 128


def write_samples(model: Any, tokenizer: Any, *, tokens: int, seed: int) -> Passages:
    """Generate text with a model, without a prompt and at temperature 1, in samples of 100 tokens.

    A sample goes on after an end of text, as training texts do. Torch's own generator is left as it was. The same seed,
    device and number of threads give the same samples.

    Args:
        model: A loaded transformers model.
        tokenizer: Its tokenizer.
        tokens: About how many tokens are generated in all.
        seed: Seed of the draw.

    Returns:
        The samples in batches.
    """
    device = next(model.parameters()).device
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or SAMPLE_LENGTH
    length = min(SAMPLE_LENGTH, longest)
    wanted = max(1, tokens // length)
    samples: list[list[int]] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(seed)
        while len(samples) < wanted:
            start = torch.full((min(SAMPLES_AT_ONCE, wanted - len(samples)), 1), first_token(tokenizer), device=device)
            written = model.generate(
                input_ids=start,
                attention_mask=torch.ones_like(start),
                max_new_tokens=length - 1,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_beams=1,
                repetition_penalty=1.0,
                eos_token_id=None,
                pad_token_id=padding_token(tokenizer),
            )
            samples += written.tolist()
    return batched(samples, model.config.get_text_config().vocab_size)
