"""ARC-easy, LAMBADA and EMBER from a folder of data, without a network, on small real models and an edit of each.

`python evals/local_tasks.py --models ../shared/models --data ../shared/evals --output evals/results/local-tasks` writes
.json and .md. The same for one model is `rotate-edit evaluate MODEL EDIT --data FOLDER --limit 500`.
"""

import argparse
import json
import platform
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import lm_eval
import torch

from rotate_edit import Plan, edit_only, evaluate_models, parse_recipe

# Words that are tokens of each model, under the name of the EMBER concept that they touch, where one does.
CONCEPTS = {
    "bookworm": {"name": "World War II", "words": ["war", "army", "soldiers", "battle", "enemy", "guns"]},
    "stories260K": {"name": "things", "words": ["dog", "tree", "ball"]},
}


def measure(folder: Path, data: Path, limit: int) -> dict[str, Any]:
    """Edit one model from its weights alone, and ask base and edited model everything the data hold."""
    recipe = parse_recipe(
        {
            "model": str(folder),
            "concepts": [CONCEPTS[folder.name] | {"strength": 4}],
            "decompose": {"channels": 1, "words_only": folder.name == "bookworm"},
            "select": {"top": 5, "share": 0.2, "fdr": 0.2},
        }
    )
    with tempfile.TemporaryDirectory() as place:
        edited = Path(place) / "edited"
        edit_only(recipe, edited, checkpoint=False)
        started = time.monotonic()
        found = evaluate_models(str(folder), [edited], Plan((), items=limit), data=data, device="cpu")
        seconds = time.monotonic() - started
    return {"seconds": seconds, "words": found["variants"]["edited"]["words"], "rows": found["tasks"]}


def markdown(head: str, models: dict[str, Any]) -> str:
    """The tables for people."""

    def cell(measure: dict[str, Any]) -> str:
        return f"{measure['value']:.3g} [{measure['low']:.3g}, {measure['high']:.3g}]"

    lines = [head]
    for name, found in models.items():
        lines += [
            f"\n## {name}: {CONCEPTS[name]['name']} ({', '.join(CONCEPTS[name]['words'])}), {found['seconds']:.0f} s\n",
            "| items | n | chance | base | edited | difference | p (Holm) |\n|---|---|---|---|---|---|---|",
        ]
        for row in found["rows"]:
            chance = "" if row["chance"] is None else f"{row['chance']:.3g}"
            p = f"{row['p_holm']:.3g}" if row["p_holm"] is not None else row["reason"]
            lines.append(
                f"| {row['task']}, {row['title']} | {row['n']} | {chance} | {cell(row['base'])} | "
                f"{cell(row['edited'])} | {cell(row['difference'])} | {p} |"
            )
        lines += ["", *(f"* {sentence}" for sentence in found["words"])]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Evaluate small models on local copies of public benchmarks.")
    parser.add_argument("--models", type=Path, required=True, help="a folder with bookworm and stories260K")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=500, help="items of each part")
    parser.add_argument("--output", type=Path, required=True, help="file name without its ending")
    options = parser.parse_args()
    models = {name: measure(options.models / name, options.data, options.limit) for name in CONCEPTS}
    command = f"python evals/local_tasks.py --models MODELS --data DATA --limit {options.limit} --output OUTPUT"
    head = (
        f"# ARC-easy, LAMBADA and EMBER offline\n\n{date.today()}, {platform.machine()} CPU, Python "
        f"{platform.python_version()}, torch {torch.__version__}, lm-eval {lm_eval.__version__}; `{command}`. At most "
        f"{options.limit} items of each part; 95 % intervals in brackets. Models of 0.3 and a few million parameters "
        "are at chance on questions: the table shows that everything runs, offline, and that such tasks are refused."
    )
    print(markdown(head, models))
    content = {"command": command, "limit": options.limit, "models": models}
    options.output.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    options.output.with_suffix(".md").write_text(markdown(head, models), encoding="utf-8")


if __name__ == "__main__":
    main()
