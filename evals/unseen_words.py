"""Does an edit take a concept away or only the words it was given? Each concept's words are given in halves.

`python evals/unseen_words.py --model demo --output evals/results/unseen-words-demo`; for a model of real prose
`--model ../shared/models/bookworm --concepts evals/bookworm/concepts.yaml --half dev --texts ../shared/corpora/books`.
Every edit is made from every second word, at the strength that leaves a tenth of the given words' probability mass;
what it leaves of the held-out words' is measured. Then the halves are exchanged.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matched import proof_of
from material import Material, add_arguments, materials, open_recipe, provenance, write_result
from scipy.stats import gmean

from rotate_edit import (
    Recipe,
    applied,
    find_tokens,
    load_model,
    make_method,
    mass_by_text,
    parse_recipe,
    prepare_proof,
    trace_removal,
)

METHODS = ("silence-words", "rank-one", "token-embeddings", "lm-head-located", "direction-everywhere")


def recipe_of(model_name: str, material: Material, words: Sequence[str]) -> Recipe:
    """The recipe of a concept of which only these words are given."""
    concept = {"name": material.name, "words": list(words), "plurals": material.plurals, "strength": 1.0}
    return parse_recipe({"model": model_name, "concepts": [concept | {"neighbour_words": material.near_words}]})


def measure_half(model: Any, model_name: str, material: Material, half: int) -> list[dict[str, Any]]:
    """Every method given one half of the words: what it leaves of the other half's mass, and its damage; plain JSON."""
    session = open_recipe(recipe_of(model_name, material, material.words[half::2]), model, material.items)
    whole = open_recipe(recipe_of(model_name, material, material.words), model, material.items)
    ids = session.tokens[0].ids
    held_out = find_tokens(
        "the held-out words", material.words[1 - half :: 2], session.tokenizer, list(session.vocabulary.texts),
        plurals=material.plurals, required=False,
    ).ids  # fmt: skip
    held_out = held_out[~torch.isin(held_out, ids)]
    texts = proof_of(model, whole, material)
    proof = prepare_proof(model, ids, texts.concept, texts.others, None, texts.size)
    base = mass_by_text(model, texts.concept.passages, held_out)[0].sum()
    rows = []
    methods = [make_method(method) for method in METHODS]
    for method, edit in session.build(methods, session.locate(methods)).items():
        traced = trace_removal(model, proof, edit)
        row: dict[str, Any] = {"concept": material.name, "half": half, "method": method, "left": None, "kl": None}
        if traced["reached"]:
            with applied(model, edit.at(traced["strength"])):
                row["left"] = float(mass_by_text(model, texts.concept.passages, held_out)[0].sum() / base)
            at = next(point for point in traced["points"] if point["strength"] == traced["strength"])
            row["kl"] = float(at["damage"].sum() / proof.base["counts"].sum())
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """By method: the geometric means of what is left of the held-out words and of the damage."""
    lines = [
        "| method | halves of concepts | mass left on given words | on held-out words | collateral KL |",
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
    model, rows = load_model(arguments.model), []
    for material in materials(arguments):
        rows += [row for half in (0, 1) for row in measure_half(model, arguments.model, material, half)]
        print(material.name, {row["method"]: row["left"] for row in rows[-len(METHODS) :]}, flush=True)
    words = (
        f"{len(rows) // len(METHODS)} halves of concepts: an edit is given every second word of a concept and left at "
        "the strength that leaves a tenth of their probability mass in held-out text. Geometric means; an edit "
        "that only silences the words it was given leaves 1.00 of the others."
    )
    write_result(arguments.output, about, {"rows": rows}, "Words that an edit was not given", words, table(rows))


if __name__ == "__main__":
    main()
