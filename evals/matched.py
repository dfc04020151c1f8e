"""Edits at matched removal: the default against every other method, for many concepts, resampled over documents.

`python evals/matched.py --model demo --output evals/results/matched-demo` for the demo's concepts;
`python evals/matched.py --model ../shared/models/bookworm --concepts evals/bookworm/concepts.yaml --half dev
--texts ../shared/corpora/books --output evals/results/matched-bookworm-dev` for a model of real prose.

Neurons, groups and directions are chosen on the validation texts; every figure comes from the test texts. A method
that was measured on a concept with the same settings is not measured again, so a run that was stopped goes on where it
was, and another method can be put beside those that are there.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from matched_table import write_table
from material import Material, add_arguments, materials, open_recipe, provenance

from rotate_edit import (
    Edit,
    EditMethod,
    Failure,
    Proof,
    Recipe,
    Session,
    count_vectors,
    find_tokens,
    load_model,
    method_names,
    parse_recipe,
    prepare_proof,
    proof_texts,
    trace_removal,
)

DEFAULT = "silence-words"
LONGEST = 64
# Tokens of one evaluation, at most 20,000 together.
CONCEPT_TOKENS, OTHER_TOKENS, NEAR_TOKENS = 2500, 4000, 1500


# One concept.


def measure_concept(model: Any, material: Material, recipe: Recipe, methods: Sequence[str]) -> dict[str, Any]:
    """Locate, edit by every method, and trace each one's curve; plain JSON.

    methods: names of the recipe's own method or of its controls."""
    started = time.monotonic()
    session = open_recipe(recipe, model, material.items)
    known = {method.about.name: method for method in (session.method, *session.controls)}
    wanted = [known[name] for name in methods]
    groups = session.locate(wanted)
    edits = _edits(session, wanted, groups)
    located = time.monotonic()
    proof = proof_of(model, session, material)
    traces = {}
    for method, edit in edits.items():
        before = time.monotonic()
        traces[method] = trace_removal(model, proof, edit)
        traces[method] |= count_vectors(edit) | {"seconds": round(time.monotonic() - before, 1)}
    return {
        "concept": material.name,
        "words": list(session.tokens[0].words),
        "groups": len(groups),
        "documents": material.documents,
        "tokens": {
            name: texts.passages.tokens() if texts else 0
            for name, texts in (("concept", proof.concept), ("others", proof.others), ("near", proof.near))
        },
        "base": proof.base,
        "methods": traces,
        "seconds": {"locate": round(located - started, 1), "all": round(time.monotonic() - started, 1)},
    }


def _edits(session: Session, methods: Sequence[EditMethod], groups: Any) -> dict[str, Edit]:
    try:
        return session.build(methods, groups)
    except Failure:
        # Nothing was located: the other methods are measured all the same, and the recipe's is listed as never reached.
        return session.with_settings({"edit.method": "direction-everywhere"}).build(methods, groups)


def proof_of(model: Any, session: Session, material: Material) -> Proof:
    """The base model's answers on a concept's texts, on texts without it and on its neighbours'."""
    tokenizer, ids = session.tokenizer, session.tokens[0].ids
    vocabulary = model.config.get_text_config().vocab_size
    near_ids = find_tokens(
        "neighbours", material.near_words, tokenizer, list(session.vocabulary.texts), plurals=material.plurals,
        required=False,
    ).ids  # fmt: skip
    near_ids = near_ids[~torch.isin(near_ids, ids)]

    def taken(rows: Sequence[tuple[int, str]], limit: int, wanted: Any) -> Any:
        kept = []
        total = 0
        for document, text in rows:
            if total >= limit:
                break
            tokens = tokenizer(text)["input_ids"][:LONGEST]
            if wanted(torch.tensor(tokens[1:])):
                kept.append((document, text))
                total += len(tokens)
        return proof_texts(tokenizer, kept, vocabulary, longest=LONGEST, limit=limit)

    def has(tokens: Any, wanted: Any) -> bool:
        return bool(torch.isin(tokens, wanted).any())

    concept = taken(material.concept, CONCEPT_TOKENS, lambda tokens: has(tokens, ids))
    others = taken(material.others, OTHER_TOKENS, lambda tokens: not has(tokens, ids))
    near = None
    if len(near_ids) and material.near:
        close = taken(material.near, NEAR_TOKENS, lambda tokens: has(tokens, near_ids) and not has(tokens, ids))
        near = (near_ids, close)
    return prepare_proof(model, ids, concept, others, near, len(material.documents))


# The whole run.


def main() -> None:
    """Measure every concept that is not measured yet, then write the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--methods", default=",".join(method_names()), help="separated by commas")
    parser.add_argument("--settings", default="{}", help="recipe sections as YAML, such as {edit: {ridge: 1}}")
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    arguments = parser.parse_args()
    settings = yaml.safe_load(arguments.settings)
    chosen = settings.get("edit", {}).get("method", DEFAULT)
    methods = list(dict.fromkeys([chosen, *arguments.methods.split(",")]))
    about = {
        "model": Path(arguments.model).name,
        "settings": settings,
        "tokens": [CONCEPT_TOKENS, OTHER_TOKENS, NEAR_TOKENS, LONGEST],
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    results = []
    model = None
    for material in materials(arguments):
        file = arguments.output / f"{material.name}.json"
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        known = known if known.get("about") == about else {}
        measured = known.get("methods", {})
        missing = [method for method in methods if method not in measured]
        if missing:
            recipe = parse_recipe(
                {
                    "model": arguments.model,
                    "concepts": [
                        {
                            "name": material.name,
                            "words": material.words,
                            "plurals": material.plurals,
                            "strength": 1.0,
                            "neighbour_words": material.near_words,
                        }
                    ],
                    **settings,
                    "evaluate": settings.get("evaluate", {}) | {"controls": methods},
                }
            )
            if model is None:
                model = load_model(arguments.model)
            known = {"about": about, **_rounded(measure_concept(model, material, recipe, missing))}
            known["methods"] |= measured
            file.write_text(json.dumps(known), encoding="utf-8")
            print(_line(known), flush=True)
        results.append(known | {"methods": {method: known["methods"][method] for method in methods}})
    write_table(results, chosen, arguments.output, provenance("matched.py", parser, arguments))


def _rounded(value: Any) -> Any:
    """Plain JSON, numbers to six digits."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _line(known: dict[str, Any]) -> str:
    strengths = {name: trace["strength"] for name, trace in known["methods"].items()}
    return f"{known['concept']}: {strengths}, {known['seconds']['all']} s"


if __name__ == "__main__":
    main()
