"""Train the demo model: `python -m rotate_edit.models.demo.train --output DIR`.

One command with fixed seeds: it writes the corpus, learns the tokenizer, trains a small
Llama-style model in float32 (on a GPU when there is one) and saves it in bfloat16.
"""

from __future__ import annotations

import argparse
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rotate_edit.models.demo.corpus import documents
from rotate_edit.models.demo.tokens import encode_documents, train_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

TRAINING_SEED = "training"


@dataclass(frozen=True)
class Settings:
    """Everything that decides the trained model."""

    documents: int = 95_000
    tokenizer_documents: int = 20_000
    vocabulary_size: int = 4_096
    hidden_size: int = 192
    intermediate_size: int = 768
    layers: int = 5
    heads: int = 6
    context_length: int = 128
    batch_size: int = 16
    learning_rate: float = 2.5e-3
    weight_decay: float = 0.1
    warm_up_steps: int = 100
    seed: int = 20261121


def build_model(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """An untrained model of the given sizes, its weights drawn from `settings.seed`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=settings.context_length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def token_windows(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """The training corpus as rows of `context_length` ids (int64), in a fixed shuffled order."""
    import torch

    texts = [document.text for document in documents(TRAINING_SEED, settings.documents)]
    stream = [token for ids in encode_documents(tokenizer, texts) for token in ids]
    rows = len(stream) // settings.context_length
    windows = torch.tensor(stream[: rows * settings.context_length]).view(rows, -1)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(settings.seed))
    return windows[order]


def parameter_groups(model: LlamaForCausalLM, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices alone: norms and the embedding go without."""
    decayed: list[torch.nn.Parameter] = []
    free: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim == 2 and "embed_tokens" not in name
        (decayed if matrix else free).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]


def train(settings: Settings, output: Path, save_every: int = 0) -> None:
    """Train from nothing and save model and tokenizer to `output`.

    With `save_every` the model is also saved every so many steps, so that it can be tried early.
    """
    import torch

    texts = (document.text for document in documents("tokenizer", settings.tokenizer_documents))
    tokenizer = train_tokenizer(texts, settings.vocabulary_size, settings.context_length)
    windows = token_windows(settings, tokenizer)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = build_model(settings, tokenizer)
    model.to(device)
    steps = len(windows) // settings.batch_size
    log.info("%d parameters, %d tokens, %d steps", model.num_parameters(), windows.numel(), steps)
    groups = parameter_groups(model, settings.weight_decay)
    optimiser = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=True)
    started = time.monotonic()
    for step, batch in enumerate(windows[: steps * settings.batch_size].split(settings.batch_size)):
        share = min((step + 1) / settings.warm_up_steps, 1 - step / steps)
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * share
        batch = batch.to(device)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if step % 50 == 0:
            minutes = (time.monotonic() - started) / 60
            log.info("step %d of %d, loss %.4f, %.1f min", step, steps, loss.item(), minutes)
        if save_every and step and step % save_every == 0:
            save(model, tokenizer, output)
    save(model, tokenizer, output)


def save(model: Any, tokenizer: PreTrainedTokenizerBase, output: Path) -> None:
    """Write a bfloat16 copy of the model, and the tokenizer, to the folder `output`."""
    import copy

    import torch

    copy.deepcopy(model).to("cpu", torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)


def main() -> None:
    """Command line: an output folder, the number of threads, and how often to save."""
    import torch

    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--save-every", type=int, default=0, help="also save every N steps")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(arguments.threads)
    train(Settings(), arguments.output, arguments.save_every)


if __name__ == "__main__":
    main()
