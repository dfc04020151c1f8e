"""Concepts and the texts they are measured on: the demo's own, or a file of concepts with a folder of books."""

import argparse
import csv
import hashlib
import json
import platform
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
import yaml

import rotate_edit
from rotate_edit import Items, Recipe, Session, demo_concepts, open_items, sentences_together

PASSAGES_A_BOOK = 400
VALIDATION_TEXTS = 200
# Leaves what a passage needs to be cut at a token.
LEAST_CHARACTERS = 120


@dataclass(frozen=True)
class Material:
    """One concept: its words, its neighbours' words, the items with its validation texts, and its (document, text) rows
    by use, from the test texts."""

    name: str
    words: list[str]
    plurals: bool
    near_words: list[str]
    items: Items
    concept: list[tuple[int, str]]
    others: list[tuple[int, str]]
    near: list[tuple[int, str]]
    documents: list[str]


def demo_materials(names: Sequence[str]) -> Iterator[Material]:
    """The demo's concepts, with the bundled items' texts; each text is a document."""
    world, items = demo_concepts(), open_items("demo")
    rows = items.texts["test"]
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
    titles = {split: list(content["texts"][split]) for split in ("validation", "test")}
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
            for _, text in found["validation"][0][:VALIDATION_TEXTS]
        ] + [{"text": text, "concept": None, "contains": []} for _, text in found["validation"][1][:VALIDATION_TEXTS]]
        items = Items("books", (), {"validation": tuple(chosen)}, (), (), {})
        yield Material(
            concept["name"], concept["words"], False, concept["neighbours"], items, *found["test"], titles["test"]
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


def open_recipe(recipe: Recipe, model: Any, items: Items | None = None) -> Session:
    """A recipe's session that goes on with a model which is in memory, on other items if any are given."""
    session = rotate_edit.open(recipe)
    return replace(session, given_items=items or session.items, kept={"model": model})


# The command line that the scripts share.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--model, --concepts, --half, --texts and --only."""
    parser.add_argument("--model", required=True)
    parser.add_argument("--concepts", type=Path, help="a concepts file; the demo's world without one")
    parser.add_argument("--half", choices=("dev", "test"), help="of the concepts file")
    parser.add_argument("--texts", type=Path, help="the folder of books")
    parser.add_argument("--only", default="", help="names of concepts, separated by commas")


def materials(arguments: argparse.Namespace) -> Iterator[Material]:
    """The concepts that the command line asks for."""
    only = [name for name in arguments.only.split(",") if name]
    if not arguments.concepts:
        yield from demo_materials(only)
        return
    content = yaml.safe_load(arguments.concepts.read_text(encoding="utf-8"))
    names = [
        concept["name"]
        for concept in content["concepts"]
        if arguments.half in (None, concept["half"]) and (not only or concept["name"] in only)
    ]
    yield from book_materials(content, arguments.texts, names)


def provenance(script: str, parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> dict[str, Any]:
    """The command that was given, without what is as usual, and what it ran with."""
    command = f"python evals/{script}"
    for name, value in vars(arguments).items():
        if value != parser.get_default(name):
            written = value.as_posix() if isinstance(value, Path) else str(value)
            command += f" --{name.replace('_', '-')} " + (f"'{written}'" if " " in written else written)
    return {
        "command": command,
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "seed": 0,
    }


def write_result(output: Path, about: dict[str, Any], rows: dict[str, Any], title: str, words: str, table: str) -> None:
    """`output`.json with what was run and its rows, `output`.md with the same in words and as a table."""
    output.with_suffix(".json").write_text(json.dumps({**about, **rows}, indent=1) + "\n", encoding="utf-8")
    ran = f"`{about['command']}`, {about['date']}, Python {about['python']}, torch {about['torch']}, "
    ran += f"seed {about['seed']}."
    output.with_suffix(".md").write_text(f"# {title}\n\n{ran} {words}\n\n{table}\n", encoding="utf-8")
