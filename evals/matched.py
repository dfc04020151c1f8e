"""Edits at matched removal: our default against every other method, for many concepts, resampled over documents.

`python evals/matched.py --model demo --output evals/results/matched-demo` for the demo's concepts;
`python evals/matched.py --model ../shared/models/bookworm --concepts evals/bookworm/concepts.yaml --half dev
--texts ../shared/corpora/books --output evals/results/matched-bookworm-dev` for a model of real prose.

Neurons, groups and directions are chosen on the `choose` texts; every figure comes from the `report` texts. A concept
that was measured with the same settings is not measured again, so a run that was stopped goes on where it was.
"""

import argparse
import csv
import hashlib
import json
import platform
import random
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from matched_table import write_table

from rotate_edit import matched
from rotate_edit.concept import find_tokens, token_texts
from rotate_edit.edit import LIVE_METHODS, METHODS, TOKEN_METHOD, Edit
from rotate_edit.errors import Failure
from rotate_edit.opened import Opened, open_recipe
from rotate_edit.pipeline import edits_of, locate
from rotate_edit.recipe import Recipe, parse_recipe
from rotate_edit.tasks import Items, open_items
from rotate_edit.text_items import sentences_together

LONGEST = 64
# Tokens of one evaluation, at most 20,000 together.
CONCEPT_TOKENS, OTHER_TOKENS, NEAR_TOKENS = 2500, 4000, 1500
PASSAGES_A_BOOK = 400
CHOICE_TEXTS = 200
# Leaves what a passage needs to be cut at a token.
LEAST_CHARACTERS = 120


@dataclass(frozen=True)
class Material:
    """One concept: its words, its neighbours' words, the items for choosing, and its (document, text) rows by use."""

    name: str
    words: list[str]
    plurals: bool
    near_words: list[str]
    items: Items
    concept: list[tuple[int, str]]
    others: list[tuple[int, str]]
    near: list[tuple[int, str]]
    documents: list[str]


# Where the texts come from.


def demo_materials(names: Sequence[str]) -> Iterator[Material]:
    """The demo's concepts, with the bundled items' texts; each text is a document."""
    from rotate_edit.demo.world import concepts

    world, items = concepts(), open_items("demo")
    rows = items.texts["report"]
    documents = [hashlib.sha256(row["text"].encode()).hexdigest()[:12] for row in rows]
    order = sorted(range(len(rows)), key=lambda place: documents[place])
    for name in names or sorted(world):
        own = [(place, rows[place]["text"]) for place in order if rows[place]["concept"] == name]
        free = [place for place in order if name not in (rows[place]["concept"], *rows[place]["contains"])]
        close = [(place, rows[place]["text"]) for place in free if rows[place]["concept"] in world[name].neighbours]
        words = [word for other in world[name].neighbours for word in world[other].words]
        yield Material(
            name, list(world[name].words), True, words, items, own,
            [(place, rows[place]["text"]) for place in free], close, documents,
        )  # fmt: skip


def book_materials(content: dict[str, Any], folder: Path, names: Sequence[str]) -> Iterator[Material]:
    """Concepts of a file on a folder of books with an INDEX.tsv; each book is a document."""
    with (folder / "INDEX.tsv").open(encoding="utf-8", newline="") as file:
        files = {row["title"]: folder / row["file"] for row in csv.DictReader(file, delimiter="\t", quoting=3)}
    titles = {split: list(content["texts"][split]) for split in ("choose", "report")}
    rows = {split: _in_turn([_passages(files[title]) for title in titles[split]]) for split in titles}
    for concept in content["concepts"]:
        if concept["name"] not in names:
            continue
        own, close = _pattern(concept["words"]), _pattern(concept["neighbours"])
        found: dict[str, list[list[tuple[int, str]]]] = {}
        for split in rows:
            about = [row for row in rows[split] if own.search(row[1])]
            free = [row for row in rows[split] if not own.search(row[1])]
            found[split] = [about, free, [row for row in free if close.search(row[1])]]
        chosen = [
            {"text": text, "concept": concept["name"], "contains": [concept["name"]]}
            for _, text in found["choose"][0][:CHOICE_TEXTS]
        ] + [{"text": text, "concept": None, "contains": []} for _, text in found["choose"][1][:CHOICE_TEXTS]]
        items = Items("books", (), {"choose": tuple(chosen)}, (), (), {})
        yield Material(
            concept["name"], concept["words"], False, concept["neighbours"], items, *found["report"], titles["report"]
        )


def _passages(file: Path) -> list[str]:
    found = [text for text in sentences_together(file.read_text(encoding="utf-8")) if len(text) > LEAST_CHARACTERS]
    random.Random(file.name).shuffle(found)
    return found[:PASSAGES_A_BOOK]


def _in_turn(lists: Sequence[list[str]]) -> list[tuple[int, str]]:
    """One passage of every book, then another of every book, and so on."""
    longest = max(len(found) for found in lists)
    return [(book, found[turn]) for turn in range(longest) for book, found in enumerate(lists) if turn < len(found)]


def _pattern(words: Sequence[str]) -> re.Pattern[str]:
    return re.compile(r"\b(?:" + "|".join(map(re.escape, words)) + r")\b", re.IGNORECASE)


# One concept.


def measure_concept(model: Any, material: Material, recipe: Recipe, methods: Sequence[str]) -> dict[str, Any]:
    """Locate, edit by every method, and trace each one's curve; plain JSON."""
    started = time.monotonic()
    opened = replace(open_recipe(recipe), items=material.items)
    found = locate(opened, model)
    edits = _edits(opened, found, methods)
    located = time.monotonic()
    proof = _proof(model, opened, material)
    traces = {}
    for method, edit in edits.items():
        before = time.monotonic()
        traces[method] = matched.trace(model, proof, edit)
        traces[method] |= matched.describe(edit) | {"seconds": round(time.monotonic() - before, 1)}
    return {
        "concept": material.name,
        "words": list(opened.tokens[0].words),
        "groups": len(found),
        "documents": material.documents,
        "tokens": {
            name: texts.passages.tokens() if texts else 0
            for name, texts in (("concept", proof.concept), ("others", proof.others), ("near", proof.near))
        },
        "base": proof.base,
        "methods": traces,
        "seconds": {"locate": round(located - started, 1), "all": round(time.monotonic() - started, 1)},
    }


def _edits(opened: Opened, found: Any, methods: Sequence[str]) -> dict[str, Edit]:
    try:
        return edits_of(opened, found, methods)
    except Failure:
        # Nothing was located: the other methods are measured all the same, and ours is listed as never reached.
        other = opened.recipe.edit.model_copy(update={"method": "direction-everywhere"})
        without = replace(opened, recipe=opened.recipe.model_copy(update={"edit": other}))
        return edits_of(without, found, methods)


def _proof(model: Any, opened: Opened, material: Material) -> matched.Proof:
    tokenizer, ids = opened.tokenizer, opened.tokens[0].ids
    vocabulary = model.config.get_text_config().vocab_size
    texts = token_texts(tokenizer)
    near_ids = find_tokens(
        "neighbours", material.near_words, tokenizer, texts, plurals=material.plurals, required=False
    ).ids
    near_ids = near_ids[~torch.isin(near_ids, ids)]

    def taken(rows: Sequence[tuple[int, str]], limit: int, wanted: Any) -> matched.Texts:
        kept = []
        total = 0
        for document, text in rows:
            if total >= limit:
                break
            tokens = tokenizer(text)["input_ids"][:LONGEST]
            if wanted(torch.tensor(tokens[1:])):
                kept.append((document, text))
                total += len(tokens)
        return matched.texts_of(tokenizer, kept, vocabulary, longest=LONGEST, limit=limit)

    def has(tokens: Any, wanted: Any) -> bool:
        return bool(torch.isin(tokens, wanted).any())

    concept = taken(material.concept, CONCEPT_TOKENS, lambda tokens: has(tokens, ids))
    others = taken(material.others, OTHER_TOKENS, lambda tokens: not has(tokens, ids))
    near = None
    if len(near_ids) and material.near:
        close = taken(material.near, NEAR_TOKENS, lambda tokens: has(tokens, near_ids) and not has(tokens, ids))
        near = (near_ids, close)
    return matched.prepare(model, ids, concept, others, near, len(material.documents))


# The whole run.


def main() -> None:
    """Measure every concept that is not measured yet, then write the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--concepts", type=Path, help="a concepts file; the demo's world without one")
    parser.add_argument("--texts", type=Path, help="the folder of books")
    parser.add_argument("--half", choices=("dev", "test"), help="of the concepts file")
    parser.add_argument("--only", default="", help="names of concepts, separated by commas")
    parser.add_argument(
        "--methods", default=",".join((*METHODS, TOKEN_METHOD, *LIVE_METHODS)), help="separated by commas"
    )
    parser.add_argument("--settings", default="{}", help="recipe sections as YAML, such as {edit: {ridge: 1}}")
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    arguments = parser.parse_args()
    settings = yaml.safe_load(arguments.settings)
    only = [name for name in arguments.only.split(",") if name]
    if arguments.concepts:
        content = yaml.safe_load(arguments.concepts.read_text(encoding="utf-8"))
        names = [
            concept["name"]
            for concept in content["concepts"]
            if arguments.half in (None, concept["half"]) and (not only or concept["name"] in only)
        ]
        materials = book_materials(content, arguments.texts, names)
    else:
        materials = demo_materials(only)
    chosen = settings.get("edit", {}).get("method", "keyed")
    methods = list(dict.fromkeys([chosen, *arguments.methods.split(",")]))
    about = {
        "model": Path(arguments.model).name,
        "settings": settings,
        "method": chosen,
        "methods": methods,
        "tokens": [CONCEPT_TOKENS, OTHER_TOKENS, NEAR_TOKENS, LONGEST],
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    results = []
    model = None
    for material in materials:
        file = arguments.output / f"{material.name}.json"
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if known.get("about") != about:
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
                }
            )
            if model is None:
                model = _loaded(arguments.model)
            known = {"about": about, **_rounded(measure_concept(model, material, recipe, methods))}
            file.write_text(json.dumps(known), encoding="utf-8")
            print(_line(known), flush=True)
        results.append(known)
    command = f"python evals/matched.py --model {arguments.model} --output {arguments.output.as_posix()}"
    for name in ("concepts", "half", "texts", "only", "methods", "settings"):
        value = getattr(arguments, name)
        if value not in (None, "", "{}", ",".join(METHODS)):
            command += f" --{name} " + (f"'{value}'" if " " in str(value) else str(value))
    provenance = {
        "command": command,
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "seed": 0,
    }
    write_table(results, chosen, arguments.output, provenance)


def _loaded(name: str) -> Any:
    from rotate_edit.checkpoint import load_model, open_checkpoint

    return load_model(open_checkpoint(name))


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
