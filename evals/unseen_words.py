"""Does an edit take a concept away or only the words it was told? Each concept's words are told in halves.

`python evals/unseen_words.py --model demo --output evals/results/unseen-words-demo`; for a model of real prose
`--model ../shared/models/bookworm --concepts evals/bookworm/concepts.yaml --half dev --texts ../shared/corpora/books`.
Every edit is made from every second word, at the strength that leaves a tenth of the told words' probability mass; what
it leaves of the other words' is measured. Then the halves are exchanged.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matched import load, proof_of
from material import Material, add_arguments, materials, provenance, write_result
from scipy.stats import gmean

from rotate_edit.edits.apply import applied
from rotate_edit.edits.build import edits_of, fit
from rotate_edit.edits.edit import TOKEN_METHOD
from rotate_edit.evaluation import matched, measures
from rotate_edit.models import batches
from rotate_edit.models.checkpoint import load_tokenizer, open_checkpoint
from rotate_edit.models.self_text import write_samples
from rotate_edit.pipeline import locate
from rotate_edit.recipe import Recipe, parse_recipe
from rotate_edit.session import open_recipe
from rotate_edit.vocabulary.concept import find_tokens, token_texts

KEY_TOKENS = 48000
METHODS = ("fitted", "keyed", TOKEN_METHOD, "lm-head-located", "direction-everywhere")


def told(model_name: str, material: Material, words: Sequence[str]) -> Recipe:
    """The recipe of a concept of which only these words are told."""
    concept = {"name": material.name, "words": list(words), "plurals": material.plurals, "strength": 1.0}
    return parse_recipe({"model": model_name, "concepts": [concept | {"neighbour_words": material.near_words}]})


def measure_half(
    model: Any, model_name: str, material: Material, half: int, samples: batches.Passages
) -> list[dict[str, Any]]:
    """Every method told one half of the words: what it leaves of the other half's mass, and its damage; plain JSON.

    samples: text that the model wrote, for the methods that read it."""
    opened = replace(open_recipe(told(model_name, material, material.words[half::2])), items=material.items)
    whole = replace(open_recipe(told(model_name, material, material.words)), items=material.items)
    ids = opened.tokens[0].ids
    others = find_tokens(
        "the other words", material.words[1 - half :: 2], opened.tokenizer, token_texts(opened.tokenizer),
        plurals=material.plurals, required=False,
    ).ids  # fmt: skip
    others = others[~torch.isin(others, ids)]
    texts = proof_of(model, whole, material)
    proof = matched.prepare(model, ids, texts.concept, texts.others, None, texts.size)
    base = measures.mass_by_text(model, texts.concept.passages, others)[0].sum()
    rows = []
    found = locate(opened, model)
    fitted = fit(opened, found, METHODS, model, samples)
    for method, edit in edits_of(opened, found, METHODS, model, fitted).items():
        traced = matched.trace(model, proof, edit)
        row: dict[str, Any] = {"concept": material.name, "half": half, "method": method, "left": None, "kl": None}
        if traced["reached"]:
            with applied(model, edit, traced["strength"]):
                row["left"] = float(measures.mass_by_text(model, texts.concept.passages, others)[0].sum() / base)
            at = next(point for point in traced["points"] if point["strength"] == traced["strength"])
            row["kl"] = float(at["damage"].sum() / proof.base["counts"].sum())
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """By method: the geometric means of what is left of the words it was not told and of the damage."""
    lines = [
        "| method | halves of concepts | mass left on words told | on the others | collateral KL |",
        "|---|---|---|---|---|",
    ]
    for method in METHODS:
        found = [row for row in rows if row["method"] == method and row["left"] is not None]
        of = sum(row["method"] == method for row in rows)
        if found:
            left, kl = (gmean([row[name] for row in found]) for name in ("left", "kl"))
            lines.append(f"| {method} | {len(found)} of {of} | 0.10 | {left:.2f} | {kl:.5f} |")
        else:
            lines.append(f"| {method} | 0 of {of} | never | | |")
    return "\n".join(lines)


def main() -> None:
    """Measure the concepts and write the JSON and the Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--output", type=Path, required=True, help="path without its ending")
    arguments = parser.parse_args()
    about = provenance("unseen_words.py", parser, arguments)
    model, rows = load(arguments.model), []
    tokenizer = load_tokenizer(open_checkpoint(arguments.model))
    samples = write_samples(model, tokenizer, tokens=KEY_TOKENS, seed=0)
    for material in materials(arguments):
        rows += [row for half in (0, 1) for row in measure_half(model, arguments.model, material, half, samples)]
        print(material.name, {row["method"]: row["left"] for row in rows[-len(METHODS) :]}, flush=True)
    words = (
        f"{len(rows) // len(METHODS)} halves of concepts: an edit is told every second word of a concept and left at "
        "the strength that leaves a tenth of their probability mass in held-out text. Geometric means; an edit "
        "that only silences the words it was told leaves 1.00 of the others."
    )
    write_result(arguments.output, about, {"rows": rows}, "Words that an edit was not told", words, table(rows))


if __name__ == "__main__":
    main()
