"""The text that a model writes itself, kept between runs: writing it takes longer than most of what then reads it."""

import hashlib
import importlib.metadata
import json
import logging
from pathlib import Path
from typing import Any

import torch

from rotate_edit.files import cache_folder, write_atomically
from rotate_edit.models.batches import Passages, batched
from rotate_edit.models.fingerprint import model_hash
from rotate_edit.models.generation import first_token, padding_token

VERSION = 1


def own_text(model: Any, tokenizer: Any, *, tokens: int, seed: int) -> Passages:
    """`keys.own_samples`, read from the cache folder when the same weights have written it before under the same
    settings, device, threads and versions."""
    vocabulary_size = model.config.get_text_config().vocab_size
    key = _key(model, tokenizer, tokens, seed)
    file = cache_folder() / f"text-{key}.json"
    rows = _read(file, vocabulary_size)
    if rows is not None:
        return batched(rows, vocabulary_size)
    written = own_samples(model, tokenizer, tokens=tokens, seed=seed)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(torch.cat(written.batches)[torch.cat(written.order).argsort()].tolist()))
    except OSError:
        logging.getLogger(__name__).warning("the text that the model wrote cannot be kept in the cache")
    return written


def _key(model: Any, tokenizer: Any, tokens: int, seed: int) -> str:
    parameter = next(model.parameters())
    parts = {
        "version": VERSION,
        "weights": model_hash(model),
        "first token": first_token(tokenizer),
        "tokens": tokens,
        "seed": seed,
        "device": parameter.device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _read(file: Path, vocabulary_size: int) -> list[list[int]] | None:
    """Rows of token ids; None when there are none or the file is damaged, since a cache may always be."""
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    sound = isinstance(rows, list) and rows and all(isinstance(row, list) and row for row in rows)
    if not sound or not all(type(token) is int and 0 <= token < vocabulary_size for row in rows for token in row):
        return None
    return rows


SAMPLE_LENGTH = 100


SAMPLES_AT_ONCE = 128


def own_samples(model: Any, tokenizer: Any, *, tokens: int, seed: int) -> Passages:
    """About `tokens` tokens that the model writes from nothing, at temperature 1, in samples of 100.

    Samples go on after an end of text, as training texts do. torch's own generator is left as it was; the same seed,
    device and number of threads give the same samples.
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
