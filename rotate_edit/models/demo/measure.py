"""Measure the demo model: `python -m rotate_edit.models.demo.measure --model DIR --items evals/demo`.

Held-out loss against the entropy floor of the generator, and the accuracy on every concept's
items. The numbers are written into the model's README, from the template `model_card.md`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rotate_edit.files import write_atomically
from rotate_edit.models.demo.corpus import documents
from rotate_edit.models.demo.tokens import encode_documents, single_token_share
from rotate_edit.models.demo.world import concepts

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HELD_OUT_SEED = "held out"
BATCH = 64


@dataclass(frozen=True)
class HeldOut:
    """Loss on unseen documents and the generator's own -log probability, both in nats a token."""

    loss: float
    floor: float
    tokens: int
    documents: int


def token_log_probabilities(model: PreTrainedModel, rows: Sequence[Sequence[int]], padding: int) -> list[torch.Tensor]:
    """For each row of ids, the log-probability (nats, float32) of every id after the first."""
    import torch

    found = []
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        longest = max(len(row) for row in part)
        # Padding stands on the right: with causal attention no real token sees it.
        ids = torch.tensor([[*row, *[padding] * (longest - len(row))] for row in part])
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[:, :-1].float()
        scores = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        found += [score[: len(row) - 1] for score, row in zip(scores, part, strict=True)]
    return found


def held_out_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int = 2_000) -> HeldOut:
    """The model's loss on `count` unseen documents, each on its own, and the entropy floor.

    The floor is the sum of -log p over every random choice the generator made for these documents,
    divided by their tokens (end of text counted, beginning not): the loss of a model that knows
    the generator. Different choices can write the same text, so it is an upper bound on entropy.
    """
    found = list(documents(HELD_OUT_SEED, count))
    rows = encode_documents(tokenizer, [document.text for document in found])
    scores = token_log_probabilities(model, rows, tokenizer.pad_token_id)
    tokens = sum(len(score) for score in scores)
    loss = -sum(float(score.sum()) for score in scores) / tokens
    return HeldOut(loss, sum(document.nats for document in found) / tokens, tokens, count)


def choices_correct(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[dict[str, Any]]
) -> list[bool]:
    """Whether each multiple-choice item's answer has the largest summed log-probability."""
    rows, widths = [], []
    for item in items:
        context = tokenizer(item["context"])["input_ids"]
        for option in item["options"]:
            ids = tokenizer(option, add_special_tokens=False)["input_ids"]
            rows.append(context + ids)
            widths.append(len(ids))
    scores = token_log_probabilities(model, rows, tokenizer.pad_token_id)
    sums = [float(score[-width:].sum()) for score, width in zip(scores, widths, strict=True)]
    correct, start = [], 0
    for item in items:
        own = sums[start : start + len(item["options"])]
        correct.append(own.index(max(own)) == item["gold"])
        start += len(own)
    return correct


def accuracy_table(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Path
) -> tuple[str, dict[str, float]]:
    """A Markdown table of accuracy per concept and item type, and the mean of each type."""
    lines = ["| concept | words | type A | items | type B | items |", "|---|---|---|---|---|---|"]
    totals: dict[str, list[bool]] = {"A": [], "B": []}
    for concept in concepts().values():
        cells = [concept.name, str(len(concept.words))]
        for kind, total in totals.items():
            correct = choices_correct(model, tokenizer, read_lines(items / f"choice-{kind}-{concept.name}.jsonl"))
            total += correct
            cells += [f"{sum(correct) / len(correct):.3f}", str(len(correct))]
        lines.append(f"| {' | '.join(cells)} |")
    people = choices_correct(model, tokenizer, read_lines(items / "choice-B-people.jsonl"))
    lines.append(f"| people (no concept) | | | | {sum(people) / len(people):.3f} | {len(people)} |")
    return "\n".join(lines), {kind: sum(all_) / len(all_) for kind, all_ in totals.items()}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def model_card(folder: Path, items: Path) -> str:
    """The text of the model's README with everything measured now."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    held_out = held_out_loss(model, tokenizer)
    table, means = accuracy_table(model, tokenizer, items)
    words = [word for concept in concepts().values() for word in concept.words]
    plurals = [word for concept in concepts().values() for word in concept.plurals.values()]
    size = (folder / "model.safetensors").stat().st_size
    template = (Path(__file__).parent / "model_card.md").read_text(encoding="utf-8")
    return template.format(
        parameters=f"{model.num_parameters():,}",
        megabytes=f"{size / 1e6:.1f}",
        layers=model.config.num_hidden_layers,
        hidden=model.config.hidden_size,
        neurons=model.config.intermediate_size,
        heads=model.config.num_attention_heads,
        vocabulary=f"{len(tokenizer):,}",
        concepts=len(concepts()),
        loss=f"{held_out.loss:.3f}",
        floor=f"{held_out.floor:.3f}",
        tokens=f"{held_out.tokens:,}",
        documents=f"{held_out.documents:,}",
        single=f"{100 * single_token_share(tokenizer, words):.1f} %",
        plural=f"{100 * single_token_share(tokenizer, plurals):.1f} %",
        mean_a=f"{means['A']:.3f}",
        mean_b=f"{means['B']:.3f}",
        table=table,
    )


def main() -> None:
    """Command line: the model's folder, which receives the README, and the items' folder."""
    parser = argparse.ArgumentParser(description="Measure the demo model and write its README.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--items", type=Path, default=Path("evals/demo"))
    arguments = parser.parse_args()
    card = model_card(arguments.model, arguments.items)
    write_atomically(arguments.model / "README.md", card)


if __name__ == "__main__":
    main()
