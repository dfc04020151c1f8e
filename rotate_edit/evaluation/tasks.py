"""Evaluation tasks: lm-eval's YAML definitions over local JSON lines, read without running any code in them.

A folder of items holds lm-eval task definitions (`*.yaml`), whose data files lie beside them. It may also hold texts,
prompts and generation prompts under fixed names. `evals/demo` is such a folder. `evals/local` holds definitions for
data that the user brings. `text_tasks` writes such a folder from any text.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from rotate_edit.errors import BadInput
from rotate_edit.files import data_folder, read_yaml

Row = dict[str, Any]

# What a definition may hold. Everything else (code, prompts fetched by name, images) needs `allow_code`.
PLAIN_KEYS = frozenset(
    {"task", "task_alias", "tag", "output_type", "description", "metadata", "repeats", "should_decontaminate"}
    | {"dataset_path", "dataset_kwargs", "training_split", "validation_split", "test_split", "fewshot_split"}
    | {"doc_to_text", "doc_to_target", "doc_to_choice", "target_delimiter", "fewshot_delimiter", "gen_prefix"}
    | {"num_fewshot", "generation_kwargs", "metric_list", "filter_list"}
)
TEMPLATES = ("doc_to_text", "doc_to_target", "doc_to_choice", "description", "gen_prefix")
# lm-eval renders these with jinja2 and no sandbox, so only the look-up of a field is let through.
FIELD = re.compile(
    r"\{\{-?\s*[A-Za-z]\w*(?:\[(?:\d+|[A-Za-z]\w*)\])?(?:\.(?:strip|lower|upper)\(\)|\s*\|\s*(?:trim|lower|upper))?\s*-?\}\}"
)
LAYOUTS = ("lines", "ember")
KINDS = {
    "multiple_choice": "accuracy",
    "generate_until": "accuracy",
    "loglikelihood": "probability",
    "loglikelihood_rolling": "perplexity",
}
LONGEST_LINE = 10_000_000
EMBER_PARAGRAPHS = "relearn_paragraphs.json"


@dataclass(frozen=True)
class Task:
    """One evaluation task.

    Attributes:
        name: The task's name in lm-eval.
        config: lm-eval's settings without the data. None for a task that lm-eval brings itself and that is known by its
            name alone.
        splits: The rows of each data split, by the split's name.
        test: Name of the split that is scored.
        version: Version of the definition.
        has_code: Whether `allow_code` let the definition through.
    """

    name: str
    config: Mapping[str, Any] | None = None
    splits: Mapping[str, tuple[Row, ...]] = field(default_factory=dict)
    test: str = "test"
    version: str = "lm-eval's"
    has_code: bool = False

    @property
    def rows(self) -> tuple[Row, ...]:
        """The rows that are scored."""
        return self.splits.get(self.test, ())

    @property
    def kind(self) -> str:
        """What one item yields: "accuracy", "probability" or "perplexity" ("" when only lm-eval knows)."""
        return "" if self.config is None else KINDS[self.config["output_type"]]

    def with_rows(self, rows: Sequence[Row]) -> "Task":
        """Return the same task on other rows.

        Args:
            rows: The rows that take the place of the scored split.

        Returns:
            A copy of the task.
        """
        return replace(self, splits={**self.splits, self.test: tuple(rows)})

    def content_hash(self) -> str:
        """Hash definition and data. Two tasks with the same hash ask the same questions.

        Returns:
            SHA-256 as 64 hexadecimal digits.
        """
        content = {"name": self.name, "config": self.config, "splits": self.splits, "test": self.test}
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()

    def for_lm_eval(self) -> "str | dict[str, Any]":
        """Return what `lm_eval.tasks.TaskManager.load` takes.

        Returns:
            A name, or a configuration that carries its data.
        """
        if self.config is None:
            return self.name
        return {**self.config, "custom_dataset": partial(_as_datasets, self.name, dict(self.splits))}


def _as_datasets(name: str, splits: dict[str, tuple[Row, ...]], **_: Any) -> dict[str, Any]:
    # Built in memory: nothing is written to the datasets cache, and no stale cache can be read.
    import datasets
    import pyarrow

    try:
        return {split: datasets.Dataset.from_list(list(rows)) for split, rows in splits.items()}
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, TypeError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise BadInput(
            f"the items of task {name} do not have the same kind of value in every line: {reason}."
        ) from error


@dataclass(frozen=True)
class Items:
    """A folder of evaluation items.

    Attributes:
        name: Name of the folder.
        tasks: Its task definitions.
        texts: Named lists of texts, for concept mass and collateral KL divergence. Each row has `text` and, where
            known, `concept` and `contains`.
        prompts: Neutral prompts.
        generation: Rows with `prompt` and `concept`.
        relearning: Paragraphs by concept.
    """

    name: str
    tasks: tuple[Task, ...]
    texts: Mapping[str, tuple[Row, ...]]
    prompts: tuple[str, ...]
    generation: tuple[Row, ...]
    relearning: Mapping[str, tuple[str, ...]]


def items_folder(name: str | Path) -> Path:
    """Find the folder in which items lie.

    Args:
        name: A folder, or the name of a folder in the package's own `evals`.

    Returns:
        The folder.

    Raises:
        BadInput: When there is no such folder.
    """
    if Path(name).is_dir():
        return Path(name)
    bundled = data_folder("evals")
    if str(name) and Path(str(name)).name == str(name) and (bundled / str(name)).is_dir():
        return bundled / str(name)
    have = sorted(path.name for path in bundled.iterdir() if path.is_dir()) if bundled.is_dir() else []
    raise BadInput(f"there is no folder of evaluation items at {name}; the bundled ones are {', '.join(have)}.")


def open_items(name: str | Path, *, data: Path | None = None, allow_code: bool = False) -> Items:
    """Read a folder of items: all its task definitions and the texts and prompts beside them.

    Args:
        name: A folder, or the name of a bundled one (see `items_folder`).
        data: The folder of the data files, when they are not in the folder itself. Definitions whose data are not there
            are then left out.
        allow_code: Let through definitions that are more than plain data (see `read_task`).

    Returns:
        The items.

    Raises:
        BadInput: When a folder is missing, a task is defined twice, or a definition or a line cannot be used.
    """
    folder = items_folder(name)
    where = folder if data is None else data
    if not where.is_dir():
        raise BadInput(f"there is no data folder {where}; give the folder that holds the evaluation data.")
    definitions = [path for path in sorted(folder.glob("*.yaml")) if not path.name.startswith("_")]
    tasks = [
        read_task(path, data=where, allow_code=allow_code, missing_is_none=data is not None) for path in definitions
    ]
    found = tuple(task for task in tasks if task is not None)
    if definitions and not found:
        wanted = ", ".join(sorted({name for path in definitions for name in _data_names(path)}))
        raise BadInput(f"the data folder {where} holds none of {wanted}.")
    repeated = {task.name for task in found if sum(other.name == task.name for other in found) > 1}
    if repeated:
        raise BadInput(f"{folder.name} defines the task {sorted(repeated)[0]} more than once.")
    return Items(
        name=folder.name,
        tasks=found,
        texts={
            path.stem.removeprefix("texts-"): read_rows(path, ("text",)) for path in sorted(where.glob("texts-*.jsonl"))
        },
        prompts=tuple(row["prompt"] for row in _rows_if_there(where / "prompts.jsonl", ("prompt",))),
        generation=_rows_if_there(where / "generation.jsonl", ("prompt",)),
        relearning=_relearning(where),
    )


def read_task(
    path: Path, *, data: Path | None = None, allow_code: bool = False, missing_is_none: bool = False
) -> Task | None:
    """Read one definition with its data.

    Without `allow_code` the definition must be plain data (see `PLAIN_KEYS`). Then `!function`, classes and remote
    datasets are refused. So are templates that do more than look up a field.

    Args:
        path: The definition, a YAML file.
        data: The folder its data files are relative to. By default the folder of the definition.
        allow_code: Let through definitions that are more than plain data.
        missing_is_none: Return None, instead of raising, when the data files are not there.

    Returns:
        The task. None only when `missing_is_none` and the data files are not there.

    Raises:
        BadInput: When the definition, its data files or one of its rows cannot be used.
    """
    content = _read_definition(path, allow_code=allow_code)
    where = path.parent if data is None else data
    if not allow_code:
        _check_plain(content, path.name)
    output_type = content.setdefault("output_type", "generate_until")
    if output_type not in KINDS:
        raise BadInput(f"{path.name}: output_type {output_type!r} is unknown; use one of {', '.join(KINDS)}.")
    metadata = content.get("metadata") or {}
    layout = metadata.get("layout", "lines")
    if layout not in LAYOUTS:
        raise BadInput(f"{path.name}: metadata.layout {layout!r} is unknown; use one of {', '.join(LAYOUTS)}.")
    files = _split_files(content, where, path.name)
    if any(not paths for paths in files.values()):
        if missing_is_none:
            return None
        split = next(split for split, paths in files.items() if not paths)
        raise BadInput(f"{path.name}: the data files of its split {split} are not in {where.name}.")
    test = str(content.get("test_split") or content.get("validation_split") or "test")
    read = partial(read_ember, split=test) if layout == "ember" else read_rows
    splits = {split: tuple(row for file in paths for row in read(file)) for split, paths in files.items()}
    concept = metadata.get("concept")
    if concept is not None:
        if not isinstance(concept, str) or not concept.strip():
            raise BadInput(f"{path.name}: metadata.concept must be the name of a concept.")
        splits = {split: tuple({"concept": concept} | row for row in rows) for split, rows in splits.items()}
    if not splits.get(test):
        raise BadInput(f"{path.name}: its split {test!r} holds no item.")
    for number, row in enumerate(splits[test], start=1):
        problem = _row_problem(content, row)
        if problem:
            raise BadInput(f"{path.name}: item {number} of its data cannot be asked: {problem}.")
    config = {key: value for key, value in content.items() if key not in ("dataset_path", "dataset_kwargs", "tag")}
    config.setdefault("test_split", test)
    return Task(
        name=str(content["task"]),
        config=config,
        splits=splits,
        test=test,
        version=str(metadata.get("version", "0")),
        has_code=allow_code,
    )


def _read_definition(path: Path, *, allow_code: bool) -> dict[str, Any]:
    try:
        if allow_code:
            from lm_eval.tasks._yaml_loader import load_yaml

            content = dict(load_yaml(path, resolve_func=True))
        else:
            content = read_yaml(path.read_text(encoding="utf-8"))
    except yaml.constructor.ConstructorError as error:
        raise BadInput(
            f"{path.name} asks for code to be run ({' '.join(str(error.problem).split())}); read it, and pass "
            f"--allow-code if you trust it."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"{path.name} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict) or not isinstance(content.get("task"), str):
        raise BadInput(f"{path.name} is not an lm-eval task definition: it has no `task:` with a name.")
    return content


def _check_plain(content: dict[str, Any], name: str) -> None:
    unknown = sorted(str(key) for key in content if key not in PLAIN_KEYS)
    if unknown:
        raise BadInput(
            f"{name}: the keys {', '.join(unknown)} are not plain data; read the file, and pass --allow-code if you "
            f"trust it."
        )
    if content.get("dataset_path", "json") != "json":
        raise BadInput(
            f"{name}: it reads the dataset {content['dataset_path']!r} from a network; local definitions use `json`."
        )
    for key in TEMPLATES:
        for template in _texts(content.get(key)):
            rest = FIELD.sub("", template)
            if any(mark in rest for mark in ("{{", "{%", "{#")):
                raise BadInput(
                    f"{name}: the template in {key} does more than look up a field; read the file, and pass "
                    f"--allow-code if you trust it."
                )
    for metric in content.get("metric_list") or ():
        if not isinstance(metric, dict) or metric.get("hf_evaluate") or not isinstance(metric.get("metric"), str):
            raise BadInput(f"{name}: each entry of metric_list must name one of lm-eval's own metrics.")


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for part in value.values() for text in _texts(part)]
    return [text for part in value for text in _texts(part)] if isinstance(value, list) else []


def _data_names(path: Path) -> list[str]:
    files = (_read_definition(path, allow_code=False).get("dataset_kwargs") or {}).get("data_files") or {}
    return [name for names in (files.values() if isinstance(files, dict) else [files]) for name in _as_list(names)]


def _as_list(value: Any) -> list[str]:
    return [str(entry) for entry in value] if isinstance(value, list) else [str(value)]


def _split_files(content: dict[str, Any], folder: Path, name: str) -> dict[str, list[Path]]:
    arguments = content.get("dataset_kwargs") or {}
    named = arguments.get("data_files") if isinstance(arguments, dict) else None
    if not named or set(arguments) != {"data_files"}:
        raise BadInput(f"{name}: dataset_kwargs must hold data_files, and nothing else, naming JSON lines files.")
    splits = named if isinstance(named, dict) else {"test": named}
    return {
        split: [path for entry in _as_list(names) for path in _inside(folder, entry, name)]
        for split, names in splits.items()
    }


def _inside(folder: Path, pattern: str, name: str) -> list[Path]:
    if Path(pattern).is_absolute() or ".." in Path(pattern).parts or "\\" in pattern or "\0" in pattern or not pattern:
        raise BadInput(f"{name}: the data file {pattern!r} does not lie in the folder of the items.")
    root = folder.resolve()
    found = sorted(path for path in folder.glob(pattern) if path.is_file())
    for path in found:
        if not path.resolve().is_relative_to(root):
            raise BadInput(f"{name}: the data file {path.name} is a link that leads out of the folder of the items.")
    return found


def _row_problem(definition: Mapping[str, Any], row: Row) -> str | None:
    """Why lm-eval could not ask this row, as far as the definition names its fields directly."""
    text, target, choices = (definition.get(key) for key in ("doc_to_text", "doc_to_target", "doc_to_choice"))
    if text in row and not isinstance(row[text], str):
        return f"its {text} is not a text"
    if definition["output_type"] != "multiple_choice":
        if target in row and (not isinstance(row[target], str) or not row[target].strip()):
            return f"its {target} is not a text, or empty"
        return None
    if choices not in row:
        return None
    options = row[choices]
    if not isinstance(options, list) or len(options) < 2 or not all(isinstance(o, str) and o.strip() for o in options):
        return f"its {choices} is not a list of two or more texts"
    if target in row:
        gold = row[target]
        if isinstance(gold, bool) or not (gold in options or (isinstance(gold, int) and 0 <= gold < len(options))):
            return f"its {target} is not one of its {choices}"
    return None


def _rows_if_there(path: Path, required: tuple[str, ...]) -> tuple[Row, ...]:
    return read_rows(path, required) if path.is_file() else ()


def read_rows(path: Path, required: Sequence[str] = ()) -> tuple[Row, ...]:
    """Read a file of JSON lines.

    Args:
        path: The file, with one JSON object per line. Empty lines are skipped.
        required: Fields that each object must have as text.

    Returns:
        The objects, in the file's order.

    Raises:
        BadInput: When the file is not UTF-8, or a line is too long, not a JSON object or lacks a required field.
    """
    rows = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        row = _json(line, f"line {number} of {path.name}")
        if not isinstance(row, dict) or any(not isinstance(row.get(key), str) for key in required):
            wanted = f" with the text field {', '.join(required)}" if required else ""
            raise BadInput(f"line {number} of {path.name} is not a JSON object{wanted}.")
        rows.append(row)
    return tuple(rows)


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path.name} cannot be read as UTF-8 text: {error}.") from error
    if any(len(line) > LONGEST_LINE for line in lines):
        raise BadInput(f"{path.name} has a line of more than {LONGEST_LINE} characters.")
    return lines


def _json(text: str, place: str) -> Any:
    def refuse(constant: str) -> float:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{place} is not valid JSON: {error}.") from error


def _relearning(folder: Path) -> dict[str, tuple[str, ...]]:
    found = {
        path.stem.removeprefix("relearn-"): tuple(row["text"] for row in read_rows(path, ("text",)))
        for path in sorted(folder.glob("relearn-*.jsonl"))
    }
    for path in (folder / "ember" / EMBER_PARAGRAPHS, folder / EMBER_PARAGRAPHS):
        if path.is_file():
            content = _json("\n".join(_lines(path)), path.name)
            for concept, entry in content.items() if isinstance(content, dict) else ():
                texts = entry.get("RelearnParagraphs") if isinstance(entry, dict) else None
                if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                    raise BadInput(f"{path.name}: the entry {concept} holds no list of RelearnParagraphs.")
                found[concept] = tuple(texts)
            break
    return found


def read_ember(path: Path, split: str | None = None) -> tuple[Row, ...]:
    """Read multiple-choice items in EMBER's layout, `{concept: {split: [{q, correct_answer, options}]}}`, as rows.

    The file may list the right option first every time. So the options are put in an order that depends on the question
    alone.

    Args:
        path: The JSON file.
        split: "train" or "test". None reads both.

    Returns:
        One row per question. `question` and `options` are texts. `listed` has the options with their letters. `gold` is
        the index of the right option and `letter` its letter. `concept` is the concept's name. `type` is "QA" for the
        concept, or "SimdomQA" for its neighbourhood. `role` is "concept" or "neighbour". `split` is the item's split.

    Raises:
        BadInput: When the file is not valid JSON, holds no items in this layout, or an item cannot be asked.
    """
    content = _json("\n".join(_lines(path)), path.name)
    rows: list[Row] = []
    for concept, splits in content.items() if isinstance(content, dict) else ():
        for name, questions in splits.items() if isinstance(splits, dict) else ():
            kind, _, part = name.partition("_")
            if split is not None and part != split:
                continue
            for number, item in enumerate(questions if isinstance(questions, list) else ()):
                rows.append(_ember_row(concept, kind, part, item, f"{concept}, {name}, item {number} of {path.name}"))
    if not rows:
        raise BadInput(f"{path.name} holds no items in EMBER's layout (concept, then split, then a list).")
    return tuple(rows)


def _ember_row(concept: str, kind: str, split: str, item: Any, place: str) -> Row:
    options = item.get("options") if isinstance(item, dict) else None
    if not isinstance(options, list) or not 2 <= len(options) <= 26 or item.get("correct_answer") not in options:
        raise BadInput(f"{place}: an item needs q, correct_answer and 2 to 26 options that contain it.")
    question, answer = str(item.get("q")), item["correct_answer"]
    ordered = sorted(options, key=lambda text: hashlib.sha256(f"{question}\0{text}".encode()).digest())
    gold = ordered.index(answer)
    return {
        "question": question,
        "options": [str(text) for text in ordered],
        "listed": "\n".join(f"{chr(65 + place)}. {text}" for place, text in enumerate(ordered)),
        "gold": gold,
        "letter": chr(65 + gold),
        "concept": concept,
        "type": kind,
        "role": "neighbour" if kind.lower().startswith("sim") else "concept",
        "split": split,
    }
