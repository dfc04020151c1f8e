"""The tables of `table.py`: cells in, means over concepts with intervals that resample questions and concepts out."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000
Cells = dict[str, dict[str, Any]]


def resampled(by_concept: Sequence[NDArray[np.float64]], *, draws: int = DRAWS, seed: int = 0) -> NDArray[np.float64]:
    """Means over concepts of means over items, when both concepts and their items are resampled; float64 [draws, k].

    Args:
        by_concept: For each concept its items, [items, k]. Columns are methods, which are resampled together.
        draws: How many times.
        seed: Of the draw.
    """
    generator = np.random.default_rng(seed)
    means = np.empty((draws, by_concept[0].shape[1]))
    for draw in range(draws):
        chosen = generator.integers(0, len(by_concept), len(by_concept))
        parts = [by_concept[place] for place in chosen]
        means[draw] = np.mean(
            [part[generator.integers(0, len(part), len(part))].mean(axis=0) for part in parts], axis=0
        )
    return means


def pooled(by_concept: Sequence[NDArray[np.float64]]) -> tuple[float, float, float]:
    """The mean over concepts with its 95 % interval, for one method: items [n] by concept."""
    columns = [np.asarray(items, dtype=float)[:, None] for items in by_concept if len(items)]
    if not columns:
        return math.nan, math.nan, math.nan
    draws = resampled(columns)[:, 0]
    return (float(np.mean([part.mean() for part in columns])), *(float(v) for v in np.quantile(draws, [0.025, 0.975])))


def paired_p(first: Sequence[NDArray[np.float64]], second: Sequence[NDArray[np.float64]]) -> float:
    """How often the mean difference of two methods on the same items changes sign when resampled, two-sided."""
    columns = [
        np.stack([np.asarray(a, float), np.asarray(b, float)], axis=1) for a, b in zip(first, second, strict=True)
    ]
    draws = resampled(columns)
    difference = draws[:, 0] - draws[:, 1]
    below = (1 + (difference <= 0).sum()) / (len(difference) + 1)
    return float(min(1.0, 2 * min(below, 1 - below + 1 / (len(difference) + 1))))


def get(cell: dict[str, Any], *path: str) -> Any:
    """A value inside a cell, None where it was not measured."""
    for name in path:
        if not isinstance(cell, dict) or name not in cell:
            return None
        cell = cell[name]
    return cell


def by_method(cells: Cells, model: str) -> dict[str, Cells]:
    """A model's cells by method and concept."""
    found: dict[str, Cells] = {}
    for key, cell in cells.items():
        one, concept, label = key.split(" | ")
        if one == model and "strength" in cell:
            found.setdefault(label, {})[concept] = cell
    return found


def kept(cell: dict[str, Any], part: str) -> float | None:
    """The share of the accuracy above chance left on the questions that the base knows."""
    value: float | None = get(cell, "knowledge", part, "kept", "value")
    return value


def mean(cells: Cells, read: Callable[[dict[str, Any]], float | None], digits: str = ".2f") -> str:
    """The mean over concepts of one number."""
    values = [value for cell in cells.values() if (value := read(cell)) is not None and math.isfinite(value)]
    return format(sum(values) / len(values), digits) if values else ""


def drop(cells: Cells, *path: str) -> str:
    """The mean fall of the log-odds with its interval over questions and concepts."""
    items = [found for cell in cells.values() if (found := get(cell, *path, "drops"))]
    if not items:
        return ""
    value, low, high = pooled([np.array(found) for found in items])
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def markdown(content: dict[str, Any]) -> str:
    """The tables for people, one set for each model."""
    cells: Cells = content["cells"]
    models = list(dict.fromkeys(key.split(" | ")[0] for key in cells))
    lines = [
        f"# Concepts at one budget: the {content['table']} table",
        "",
        f"`python evals/concepts/table.py`, {content['date']}, Python {content['python']}, torch {content['torch']}. "
        f"Every edit at the largest strength with at most {content['budget']} nats of KL on neutral sentences. Means "
        "over concepts. Falls of log-odds are in nats with 95 % intervals that resample questions and concepts. "
        f"At most {content['questions']} questions of each kind, {content['general']} of each general task, and about "
        f"{content['tokens']} tokens of each set of texts. docs/evaluation.md says what each measure "
        "means. A method with settings after its name was made with them.",
    ]
    for model in models:
        methods = by_method(cells, model)
        lines += ["", f"## {model}", "", *_knowledge(methods), "", *_rest(methods), "", *_attacks(methods)]
        lines += ["", *_against(methods, content.get("against")), "", *_concepts(methods)]
    return "\n".join(lines) + "\n"


def _knowledge(methods: dict[str, Cells]) -> list[str]:
    lines = [
        "| method | concepts | strength not bounded by the budget | knowledge above chance left | fall of log-odds | "
        "five shots | neighbours left | neighbours' fall | other wordings' fall | other languages' fall |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for label, cells in methods.items():
        unbounded = sum(cell["strength"] >= 64 for cell in cells.values())
        forms = {name: {**cell, "forms": {"drops": _joined(cell, lambda key: key.startswith("form"))}}
                 for name, cell in cells.items()}  # fmt: skip
        tongues = {name: {**cell, "tongues": {"drops": _joined(cell, lambda key: len(key) == 2 and key != "en")}}
                   for name, cell in cells.items()}  # fmt: skip
        lines.append(
            f"| {label} | {len(cells)} | {unbounded} | {mean(cells, lambda cell: kept(cell, 'asked'))} | "
            f"{drop(cells, 'knowledge', 'asked')} | {drop(cells, 'knowledge', 'five shots')} | "
            f"{mean(cells, lambda cell: kept(cell, 'neighbours'))} | {drop(cells, 'knowledge', 'neighbours')} | "
            f"{drop(forms, 'forms')} | {drop(tongues, 'tongues')} |"
        )
    return lines


def _joined(cell: dict[str, Any], wanted: Callable[[str], bool]) -> list[float]:
    found = get(cell, "wording") or {}
    return [value for key, entry in found.items() if wanted(key) for value in entry.get("drops", ())]


def _rest(methods: dict[str, Cells]) -> list[str]:
    lines = [
        "| method | loss at its words | loss on its text elsewhere | on neighbours' text | on other text | "
        "mass left of unlisted words | ARC-easy left | OpenBookQA left | MMLU left | LAMBADA nats | log perplexity | "
        "first-token KL | neutral KL |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for label, cells in methods.items():
        reading = [mean(cells, lambda cell, name=name: get(cell, "reading", name, "value"))
                   for name in ("words", "about", "near", "others")]  # fmt: skip
        tasks = [mean(cells, lambda cell, name=name: get(cell, "general", name, "kept of all", "value"))
                 for name in ("ARC-easy", "OpenBookQA", "MMLU")]  # fmt: skip
        names = ("LAMBADA log-likelihood", "log perplexity", "first-token KL", "neutral KL")
        figures = [mean(cells, lambda cell, name=name: get(cell, "general", name, "value"), ".3f") for name in names]
        lines.append(f"| {label} | " + " | ".join([*reading, mean(cells, _unlisted), *tasks, *figures]) + " |")
    return lines


def _unlisted(cell: dict[str, Any]) -> float | None:
    found = [row["left"]["value"] for row in get(cell, "unlisted") or () if row["left"]["value"] is not None]
    return sum(found) / len(found) if found else None


def _attacks(methods: dict[str, Cells]) -> list[str]:
    names = list(
        dict.fromkeys(
            (part, name)
            for cells in methods.values()
            for cell in cells.values()
            for part in ("hints", "relearning")
            for name in get(cell, part) or ()
        )
    )
    if not names:
        return []
    titles = {"none": "no attack", "definition": "definition in the prompt", "4 bits": "rounded to 4 bits",
              "steering": "one steering vector"}  # fmt: skip
    lines = [
        "Fall of the log-odds that is left after an attack, against the base after the same attack:",
        "",
        "| method | " + " | ".join(titles.get(name, f"{name} steps") for _, name in names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for label, cells in methods.items():
        lines.append(f"| {label} | " + " | ".join(drop(cells, part, name) for part, name in names) + " |")
    return lines


def _against(methods: dict[str, Cells], chosen: str | None) -> list[str]:
    """One method against all others on the concepts that both were measured on."""
    own = methods.get(chosen or "")
    if own is None:
        return []
    lines = [
        f"Fall of the log-odds of `{chosen}` less that of another method, on the same questions:",
        "",
        "| other method | concepts | difference | p |",
        "|---|---|---|---|",
    ]
    for label, cells in methods.items():
        shared = [name for name in own if name in cells and get(own[name], "knowledge", "asked", "drops")]
        pairs = [[np.array(get(one[name], "knowledge", "asked", "drops") or []) for one in (own, cells)]
                 for name in shared]  # fmt: skip
        pairs = [(first, second) for first, second in pairs if len(first) == len(second)]
        if label == chosen or not pairs:
            continue
        value, low, high = pooled([first - second for first, second in pairs])
        p = paired_p(*zip(*pairs, strict=True))
        lines.append(f"| {label} | {len(pairs)} | {value:.2f} [{low:.2f}, {high:.2f}] | {p:.3g} |")
    return lines


def _concepts(methods: dict[str, Cells]) -> list[str]:
    names = list(dict.fromkeys(name for cells in methods.values() for name in cells))
    lines = [
        "By concept: questions known of those asked; then for each method the share of knowledge above chance that is "
        "left, and the fall of the log-odds.",
        "",
        "| concept | known | " + " | ".join(methods) + " |",
        "|---" * (len(methods) + 2) + "|",
    ]
    for name in names:
        row, known = [], ""
        for cells in methods.values():
            found = get(cells.get(name, {}), "knowledge", "asked")
            known = f"{found['known']} of {found['n']}" if found else known
            shown = f"{found['kept']['value']:.2f}, {found['drop']['value']:+.2f}" if found and "kept" in found else ""
            row.append(shown)
        lines.append(f"| {name} | {known} | " + " | ".join(row) + " |")
    return lines
