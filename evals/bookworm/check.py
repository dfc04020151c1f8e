"""Checks `concepts.yaml` against a model's vocabulary and its books, and prints how often each concept occurs.

`python evals/bookworm/check.py --model ../shared/models/bookworm --texts ../shared/corpora/books`; ends with 1 when
something is wrong.
"""

import argparse
import csv
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from rotate_edit import find_tokens, load_tokenizer, token_texts

CONCEPTS = Path(__file__).with_name("concepts.yaml")
FEWEST_WORDS, MOST_WORDS = 10, 40
FEWEST_OCCURRENCES = 36
FEWEST_IN_A_SPLIT = 1000


def read_concepts(path: Path = CONCEPTS) -> dict[str, Any]:
    """The concepts file as plain data: `texts` (titles by split) and `concepts`."""
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content


def book_files(folder: Path) -> dict[str, Path]:
    """The file of every title of a folder with an INDEX.tsv."""
    with (folder / "INDEX.tsv").open(encoding="utf-8", newline="") as file:
        return {row["title"]: folder / row["file"] for row in csv.DictReader(file, delimiter="\t", quoting=3)}


def count_words(content: dict[str, Any], folder: Path) -> dict[str, Counter[str]]:
    """How often every word (in lower case) occurs in the books of each split."""
    files = book_files(folder)
    counts: dict[str, Counter[str]] = {}
    for split, titles in content["texts"].items():
        counts[split] = Counter()
        for title in titles:
            counts[split].update(re.findall(r"[^\W\d_]+", files[title].read_text(encoding="utf-8").lower()))
    return counts


def errors_in(content: dict[str, Any], counts: dict[str, Counter[str]], usable: set[str]) -> list[str]:
    """What is wrong with the file, one sentence each. usable: the words that stand for tokens of the vocabulary."""
    found = []
    names = [concept["name"] for concept in content["concepts"]]
    halves = Counter(concept["half"] for concept in content["concepts"])
    if len(set(names)) != len(names):
        found.append("two concepts have the same name.")
    if set(halves) != {"dev", "test"} or abs(halves["dev"] - halves["test"]) > 1:
        found.append(f"the halves are not equal: {dict(halves)}.")
    if set(content["texts"]["validation"]) & set(content["texts"]["test"]):
        found.append("a book stands in both splits.")
    for concept in content["concepts"]:
        name, words, near = concept["name"], concept["words"], concept["neighbours"]
        if not FEWEST_WORDS <= len(words) <= MOST_WORDS or len(set(words)) != len(words):
            found.append(f"{name} has {len(set(words))} different words of {len(words)}.")
        if set(words) & set(near):
            found.append(f"{name} has neighbours among its words: {sorted(set(words) & set(near))}.")
        for word in [*words, *near]:
            total = sum(count[word] for count in counts.values())
            if word not in usable:
                found.append(f"{name}: {word!r} cannot be written.")
            if total < FEWEST_OCCURRENCES:
                found.append(f"{name}: {word!r} occurs {total} times.")
        for split, count in counts.items():
            if sum(count[word] for word in words) < FEWEST_IN_A_SPLIT:
                found.append(f"{name} occurs too seldom in the split {split}.")
    return found


def usable_words(content: dict[str, Any], model: str) -> set[str]:
    """The words of the file that a model's tokenizer can write, as one token or as several."""
    tokenizer = load_tokenizer(model)
    words = [word for concept in content["concepts"] for word in [*concept["words"], *concept["neighbours"]]]
    return {*words} - {*find_tokens("all", words, tokenizer, token_texts(tokenizer)).left_out}


def table(content: dict[str, Any], counts: dict[str, Counter[str]]) -> str:
    """Every concept with its number of words and of occurrences in each split, as Markdown."""
    lines = ["| concept | half | words | " + " | ".join(counts) + " |", "|" + "---|" * (3 + len(counts))]
    for concept in content["concepts"]:
        found = [str(sum(count[word] for word in concept["words"])) for count in counts.values()]
        lines.append("| " + " | ".join([concept["name"], concept["half"], str(len(concept["words"])), *found]) + " |")
    return "\n".join(lines)


def main() -> int:
    """Print the table and whatever is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--texts", type=Path, required=True, help="a folder of books with an INDEX.tsv")
    arguments = parser.parse_args()
    content = read_concepts()
    counts = count_words(content, arguments.texts)
    print(table(content, counts))
    wrong = errors_in(content, counts, usable_words(content, arguments.model))
    print("\n".join(wrong) or "Nothing is wrong.", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
