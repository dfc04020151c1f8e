"""Are channels faithful? A random sample of neurons decomposed and tested, one table with all controls.

`python evals/faithfulness.py --model demo --text demo --output evals/results/faithfulness-demo` writes .json, .md and
.svg; `--text` takes a file or folder of texts, or `demo` for the demo's held-out ones.
"""

import argparse
import json
import platform
from datetime import date
from pathlib import Path
from typing import Any

import torch

from rotate_edit import (
    Checkpoint,
    Neuron,
    SolverSettings,
    VocabularyRules,
    claim_threshold,
    decompose_neurons,
    faithfulness,
    faithfulness_figure,
    faithfulness_table,
    load_model,
    load_tokenizer,
    open_checkpoint,
    open_items,
    read_documents,
    read_projections,
    read_vocabulary,
    split_passages,
)


def sample(checkpoint: Checkpoint, count: int, seed: int) -> list[tuple[Neuron, str]]:
    """`count` neurons of every layer and matrix."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (Neuron(layer, neuron), matrix)
        for matrix in checkpoint.matrices
        for layer in range(checkpoint.layers)
        for neuron in sorted(torch.randperm(checkpoint.neurons_in(layer), generator=generator)[:count].tolist())
    ]


def texts_of(source: str) -> list[str]:
    """Texts in an order that mixes documents."""
    if source == "demo":
        rows = open_items("demo").texts["test"]
        return [row["text"] for place in range(29) for row in rows[place::29]]
    return split_passages(read_documents(source))["test"]


def markdown(title: str, rows: list[dict[str, Any]]) -> str:
    """The table for people."""

    def cell(measure: dict[str, Any]) -> str:
        return f"{measure['value']:.2f} [{measure['low']:.2f}, {measure['high']:.2f}]"

    lines = [
        title,
        "",
        "| matrix | taken out | channels | lost on own tokens | on the others' | selectivity | wins | p (Holm) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        wins = f"{row['wins']['value']:.0%}" if "wins" in row else ""
        p = f"{row['p_holm']:.4f}" if "p_holm" in row else ""
        lines.append(
            f"| {row['matrix']} | {row['condition']} | {row['channels']} | {cell(row['own'])} | "
            f"{cell(row['others'])} | {cell(row['selectivity'])} | {wins} | {p} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Test whether channels are faithful.")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", default="demo")
    parser.add_argument("--neurons", type=int, default=8, help="of every layer and matrix")
    parser.add_argument("--tokens", type=int, default=8192, help="of text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="file name without its ending")
    options = parser.parse_args()
    checkpoint = open_checkpoint(options.model)
    tokenizer = load_tokenizer(checkpoint)
    vocabulary = read_vocabulary(checkpoint, VocabularyRules(), tokenizer)
    settings = SolverSettings(channels=4, claim_threshold=claim_threshold(checkpoint), seed=options.seed)
    neurons = sample(checkpoint, options.neurons, options.seed)
    channels = decompose_neurons(neurons, read_projections(checkpoint, vocabulary), vocabulary.texts, settings)
    model = load_model(checkpoint)
    texts = texts_of(options.text)
    trials = faithfulness(model, tokenizer, channels, texts, tokens=options.tokens, seed=options.seed)
    rows = faithfulness_table(trials)
    command = (
        f"python evals/faithfulness.py --model {Path(options.model).name} --text {Path(options.text).name} "
        f"--neurons {options.neurons} --tokens {options.tokens} --seed {options.seed}"
    )
    title = (
        f"# Channel faithfulness of {checkpoint.source}\n\n{len(trials)} channels of {len(neurons)} neurons, "
        f"{date.today()}, Python {platform.python_version()}, torch {torch.__version__}; `{command}`.\n\n"
        "For `gate` and `in` the response to the tokens that is lost, in standard deviations over the text; for `out` "
        "their promotion that is lost, in standard deviations over the vocabulary. Selectivity: own minus others'. "
        "Wins: the share of channels that are more selective than the control."
    )
    print(markdown(title, rows))
    content = {"command": command, "neurons": len(neurons), "channels": len(trials), "table": rows}
    options.output.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    options.output.with_suffix(".md").write_text(markdown(title, rows), encoding="utf-8")
    faithfulness_figure(rows).savefig(options.output.with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
