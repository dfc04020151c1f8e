"""Evaluation items made from any text.

They are a concept's cloze items, its neighbours' cloze items, neutral texts and prompts. The documents are divided into
two splits. `validation` is for picking a strength, `test` for everything that is reported. Passages of one document
never stand in both.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from rotate_edit.errors import BadInput
from rotate_edit.evaluation.statements import cloze_questions
from rotate_edit.evaluation.tasks import Items, Row, Task, read_rows
from rotate_edit.files import whole_folder
from rotate_edit.vocabulary.concept import plural

PASSAGE_CHARACTERS = 360
MOST_CHARACTERS = 8_000_000
WORDS_BEFORE = 5
TEXTS_A_CONCEPT = 200
CLOZE_ITEMS = 200
NEUTRAL_TEXTS = 200
PROMPTS = 200
GENERATIONS = 5
MOST_QUESTIONS = 48
# The name of items that were made from text.
TEXT_ITEMS = "text"
SPLITS = ("validation", "test")
SUFFIXES = (".txt", ".json", ".jsonl")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[.!?][\"'”’)])\s+")

CLOZE = {
    "output_type": "loglikelihood",
    "doc_to_text": "context",
    "doc_to_target": "word",
    "metric_list": [
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
    ],
}
PERPLEXITY = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "text",
    "metric_list": [{"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}],
}
QUESTIONS = {
    "output_type": "multiple_choice",
    "doc_to_text": "query",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    # Every choice holds the space before it, and the rest of its sentence.
    "target_delimiter": "",
    "metric_list": [{"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}],
}
DEFINITIONS = {
    "text_cloze": (CLOZE, "cloze.jsonl"),
    "text_questions": (QUESTIONS, "questions.jsonl"),
    "text_neutral": (PERPLEXITY, "neutral.jsonl"),
}


@dataclass(frozen=True)
class Finder:
    """Finds the words of one concept, and of its neighbours, in a text.

    Attributes:
        concept: Name of the concept.
        own: Pattern of the concept's words.
        near: Pattern of the neighbours' words, or None where there are none to find.
        listed: The concept's words.
    """

    concept: str
    own: re.Pattern[str]
    near: re.Pattern[str] | None
    listed: tuple[str, ...]


def items_from_text(
    source: str | Path,
    words: Mapping[str, Sequence[str]],
    neighbour_words: Mapping[str, Sequence[str]],
    tokenizer: Any,
    *,
    plurals: bool = False,
) -> Items:
    """Make items from a text file, a folder of them, JSON (lines), or a `datasets` name.

    The result is deterministic.

    Args:
        source: The text (see `read_documents`).
        words: Each concept's words, by concept.
        neighbour_words: The words of each concept's neighbours, by concept.
        tokenizer: Tokenizer of the model that will be asked. A cloze item is usable only when its context ends where a
            token ends.
        plurals: Look for the plurals of the words too.

    Returns:
        The items, under the name "text".

    Raises:
        BadInput: When the text cannot be read, holds a concept too rarely to measure anything, or has no neutral
            passage.
    """
    finders = _finders(words, neighbour_words, plurals)
    divided = passages(read_documents(source))
    about = {finder.concept: divided for finder in finders}
    return _items(f"the text {Path(str(source)).name}", about, divided, finders, tokenizer)


def items_from_documents(
    about: Mapping[str, Sequence[str]],
    others: Sequence[str],
    words: Mapping[str, Sequence[str]],
    neighbour_words: Mapping[str, Sequence[str]],
    tokenizer: Any,
    *,
    source: str,
    plurals: bool = False,
) -> Items:
    """Make items from documents that are known to be about a concept or about other things.

    A passage about a concept that holds none of its words counts as neither.

    Args:
        about: The documents about each concept, by concept.
        others: Documents about other things.
        words: Each concept's words, by concept.
        neighbour_words: The words of each concept's neighbours, by concept.
        tokenizer: As in `items_from_text`.
        source: What the documents are, for messages.
        plurals: Look for the plurals of the words too.

    Returns:
        The items, under the name "text".

    Raises:
        BadInput: When a concept's documents hold its words too rarely to measure anything, or no other document is free
            of them.
    """
    finders = _finders(words, neighbour_words, plurals)
    divided = {name: passages(found) for name, found in about.items()}
    return _items(source, divided, passages(others), finders, tokenizer)


def _finders(
    words: Mapping[str, Sequence[str]], neighbour_words: Mapping[str, Sequence[str]], plurals: bool
) -> list[Finder]:
    return [
        Finder(
            name,
            _pattern(own, plurals),
            _pattern(near, plurals) if (near := neighbour_words.get(name)) else None,
            tuple(own),
        )
        for name, own in words.items()
    ]


def _items(
    source: str,
    about: Mapping[str, Mapping[str, Sequence[str]]],
    others: Mapping[str, Sequence[str]],
    finders: Sequence[Finder],
    tokenizer: Any,
) -> Items:
    """Items from the passages of each split: those in which a concept is looked for, and those without one."""
    texts: dict[str, list[Row]] = {split: [] for split in SPLITS}
    cloze: list[Row] = []
    questions: list[Row] = []
    for finder in finders:
        own = about[finder.concept]
        for split in SPLITS:
            found = [text for text in own[split] if finder.own.search(text)][:TEXTS_A_CONCEPT]
            if not found:
                raise BadInput(
                    f"{source} holds no passage about {finder.concept} in one of its two halves; give more text."
                )
            texts[split] += [_text_row(text, finder.concept, finders) for text in found]
        cloze += _cloze_items(own["test"], finder.concept, finder.own, "concept", tokenizer)
        questions += _questions(own["test"], finder.listed, finder.concept)
        if finder.near is not None:
            near = dict.fromkeys((*own["test"], *others["test"]))
            cloze += _cloze_items(list(near), finder.concept, finder.near, "neighbour", tokenizer)
    neutral = {
        split: [text for text in others[split] if not any(_touches(finder, text) for finder in finders)]
        for split in SPLITS
    }
    for split in SPLITS:
        if not neutral[split]:
            raise BadInput(f"every passage of {source} is about a concept; give neutral text as well.")
        texts[split] += [{"text": text, "concept": None, "contains": []} for text in neutral[split][:TEXTS_A_CONCEPT]]
    # The neutral texts of the perplexity task are others than those of the collateral KL, where there are enough.
    rest = neutral["test"][TEXTS_A_CONCEPT:] or neutral["test"]
    questions += _questions(neutral["test"], (), "")
    rows = {
        "text_cloze": cloze,
        "text_questions": questions,
        "text_neutral": [{"text": text} for text in rest[:NEUTRAL_TEXTS]],
    }
    return _as_items(texts, rows, neutral["test"])


def _questions(passages: Sequence[str], listed: Sequence[str], concept: str) -> list[Row]:
    """Statements with a blank and four words that may fill it; general ones have an empty concept."""
    return [
        {"query": one.prompt, "choices": list(one.choices), "gold": one.gold, "concept": concept, "type": "B"}
        # A blank is compared with every other, so that a whole book's would take minutes.
        for one in cloze_questions(passages[:MOST_QUESTIONS], listed, concept=concept)[:MOST_QUESTIONS]
    ]


def _as_items(texts: dict[str, list[Row]], rows: Mapping[str, list[Row]], prompts_from: list[str]) -> Items:
    tasks = tuple(
        Task(name, {"task": name, **settings, "test_split": "test", "metadata": {"version": 1}},
             {"test": tuple(rows[name])}, version="1")
        for name, (settings, _) in DEFINITIONS.items()
        if rows[name]
    )  # fmt: skip
    openings = list(dict.fromkeys(" ".join(text.split()[:6]) for text in prompts_from))
    unused = openings[PROMPTS:] or openings
    neutral_prompts = [{"prompt": prompt, "concept": None} for prompt in unused[:GENERATIONS]]
    by_concept: dict[str, list[Row]] = {}
    for row in rows["text_cloze"]:
        if row["role"] == "concept":
            prompt = {"prompt": row["context"], "concept": row["concept"]}
            by_concept.setdefault(row["concept"], []).append(prompt)
    about = [row for rows in by_concept.values() for row in rows[:GENERATIONS]]
    return Items(
        name=TEXT_ITEMS,
        tasks=tasks,
        texts={split: tuple(found) for split, found in texts.items()},
        prompts=tuple(openings[:PROMPTS]),
        generation=(*about, *neutral_prompts),
        relearning={},
    )


def save_items(items: Items, folder: Path) -> None:
    """Write items made from text as a folder that `tasks.open_items` reads.

    The folder holds JSON lines and lm-eval definitions.

    Args:
        items: The items, as `items_from_text` makes them.
        folder: The folder to write. It appears whole or not at all.

    Raises:
        BadInput: When the folder exists or cannot be written.
        Failure: When the disk is full or fails.
    """
    with whole_folder(folder) as written:
        for task in items.tasks:
            settings, file = DEFINITIONS[task.name]
            definition = {
                "task": task.name,
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": file}},
                "test_split": "test",
                **settings,
                "metadata": {"version": 1},
            }
            _write_lines(written / file, task.rows)
            text = yaml.safe_dump(definition, sort_keys=False)
            (written / f"{task.name}.yaml").write_text(text, encoding="utf-8")
        for split, rows in items.texts.items():
            _write_lines(written / f"texts-{split}.jsonl", rows)
        _write_lines(written / "prompts.jsonl", [{"prompt": prompt} for prompt in items.prompts])
        _write_lines(written / "generation.jsonl", items.generation)


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


# Reading text.


def read_documents(source: str | Path) -> list[str]:
    """Read the documents of a text source, at most eight million characters of them.

    The source is one of the following.

    A folder: each `.txt` file is one document. Its `.json` and `.jsonl` files hold theirs.

    A `.txt` file: each paragraph is a document. Paragraphs are separated by empty lines. Without empty lines each line
    is a document.

    A `.json` file: a list of strings. A `.jsonl` file: the `text` of each line.

    Anything else is a dataset of the Hub: `name`, `name:configuration` or `name:configuration:split`. The split is
    `train` when none is named. Its `text` column is read.

    Args:
        source: A folder, a file, or the name of a dataset.

    Returns:
        The documents, in the source's order.

    Raises:
        BadInput: When the source does not exist or cannot be read as text.
    """
    path = Path(source)
    if path.is_dir():
        files = sorted(
            file for file in path.rglob("*") if file.suffix in (".txt", ".json", ".jsonl") and file.is_file()
        )
        if not files:
            raise BadInput(f"the folder {path.name} holds no .txt, .json or .jsonl file.")
        share = MOST_CHARACTERS // len(files) + 1
        found = []
        for file in files:
            found += [_read_text(file)[:share]] if file.suffix == ".txt" else list(_limited(_from_file(file), share))
        return found
    if path.is_file():
        return list(_limited(_from_file(path), MOST_CHARACTERS))
    if path.suffix in SUFFIXES or path.is_absolute() or str(source).startswith("."):
        raise BadInput(f"there is no text file or folder {source}.")
    return list(_limited(_from_hub(str(source)), MOST_CHARACTERS))


def _limited(documents: Iterable[str], characters: int) -> Iterable[str]:
    for text in documents:
        if characters <= 0:
            return
        characters -= len(text)
        yield text


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"the text {path.name} cannot be read as UTF-8: {error}.") from error


def _from_file(path: Path) -> list[str]:
    if path.suffix == ".jsonl":
        return [row["text"] for row in read_rows(path, ("text",))]
    text = _read_text(path)
    if path.suffix == ".json":
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{path.name} is not valid JSON: {error}.") from error
        if not isinstance(content, list) or not all(isinstance(entry, str) for entry in content):
            raise BadInput(f"{path.name} must hold a list of texts.")
        return content
    paragraphs = re.split(r"\n\s*\n", text)
    return paragraphs if len(paragraphs) > 1 else text.splitlines()


def _from_hub(name: str) -> Iterable[str]:
    import datasets

    place, _, rest = name.partition(":")
    configuration, _, split = rest.partition(":")
    try:
        dataset = datasets.load_dataset(place, configuration or None, split=split or "train", streaming=True)
        columns = dataset.column_names or list(next(iter(dataset)))
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BadInput(f"there is no text file or folder {name}, and no such dataset can be read: {reason}.") from error
    if "text" not in columns:
        raise BadInput(f"the dataset {name} has no column `text`, only {', '.join(columns)}.")
    return (str(row["text"]) for row in islice(dataset, 100_000))


def passages(documents: Sequence[str]) -> dict[str, list[str]]:
    """Divide documents into passages of whole sentences, by split.

    The order of the passages depends on their text alone.

    Args:
        documents: The documents.

    Returns:
        The passages of each split (see `SPLITS`). Those of one document are all in one split.

    Raises:
        BadInput: When there are too few documents for two splits.
    """
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for document in sorted(set(documents), key=_digest):
        split = SPLITS[_digest(document)[0] % 2]
        splits[split] += sentences_together(document)
    if documents and not all(splits.values()):
        raise BadInput("the text has too few documents to be divided into two halves; give more text.")
    # By digest again: otherwise the first document alone would fill every list.
    return {split: sorted(set(found), key=_digest) for split, found in splits.items()}


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def sentences_together(document: str) -> list[str]:
    """Join the sentences of a document into passages of about 360 characters.

    Args:
        document: The text. Each of its lines is one paragraph, and no passage crosses a line.

    Returns:
        The passages in the text's order. Passages of five words or fewer are left out.
    """
    found: list[str] = []
    for paragraph in document.splitlines():
        passage = ""
        for sentence in SENTENCE_END.split(paragraph.strip()):
            if passage and len(passage) + len(sentence) > PASSAGE_CHARACTERS:
                found.append(passage)
                passage = ""
            passage = f"{passage} {sentence}".strip()
        found.append(passage)
    return [passage for passage in found if len(passage.split()) > WORDS_BEFORE]


# Finding words.


def _pattern(words: Sequence[str], plurals: bool) -> re.Pattern[str]:
    forms = {word.strip() for word in words} | ({plural(word.strip()) for word in words} if plurals else set())
    ordered = sorted(forms, key=lambda form: (-len(form), form))
    return re.compile(r"(?<![\w'-])(?:" + "|".join(map(re.escape, ordered)) + r")(?![\w'-])", re.IGNORECASE)


def _touches(finder: Finder, text: str) -> bool:
    return bool(finder.own.search(text) or (finder.near and finder.near.search(text)))


def _text_row(text: str, concept: str, finders: Sequence[Finder]) -> Row:
    contains = [finder.concept for finder in finders if finder.own.search(text)]
    return {"text": text, "concept": concept, "contains": contains}


def _cloze_items(
    passages: Sequence[str], concept: str, pattern: re.Pattern[str], role: str, tokenizer: Any
) -> list[Row]:
    rows: list[Row] = []
    for text in passages:
        if len(rows) == CLOZE_ITEMS:
            break
        match = pattern.search(text)
        if match is None or text[: match.start()][-1:] != " " or len(text[: match.start()].split()) < WORDS_BEFORE:
            continue
        context, word = text[: match.start() - 1], " " + match.group()
        if _ends_between_tokens(tokenizer, context, word):
            rows.append({"context": context, "word": word, "concept": concept, "role": role})
    return rows


def _ends_between_tokens(tokenizer: Any, context: str, word: str) -> bool:
    whole, start = (tokenizer(text, add_special_tokens=True)["input_ids"] for text in (context + word, context))
    return len(whole) > len(start) and list(whole[: len(start)]) == list(start)
