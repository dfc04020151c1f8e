"""The demo's claim on many of its concepts: one run each, one table.

`python evals/demo_concepts.py --output evals/results/demo-concepts` writes .json and .md; `--concepts dogs,ships` for
some of them. Settings are the package's defaults for all; nothing is chosen per concept.
"""

import argparse
import json
import platform
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from scipy.stats import gmean

from rotate_edit import demo_concepts, parse_recipe, run

CHOSEN = "dogs,horses,ships,music,medicine,food"
METHODS = ("rank-one", "channel-located", "lm-head-located", "direction-everywhere", "zero-neurons", "random-neurons")


def run_concept(name: str) -> dict[str, Any]:
    """One concept suppressed under the default settings; its row of the table."""
    concept = demo_concepts()[name]
    recipe = {
        "model": "demo",
        "concepts": [
            {
                "name": name,
                "words": list(concept.words),
                "plurals": True,
                "neighbours": list(concept.neighbours),
            }
        ],
        "save": {"checkpoint": False, "adapter": False},
        "evaluate": {"items": "demo", "controls": list(METHODS), "tokens": 1500},
    }
    with tempfile.TemporaryDirectory() as folder:
        result = run(parse_recipe(recipe), Path(folder) / "run")
    summary = result["summary"]
    matched = {row["method"]: row for row in result["matched"][name]["rows"]}
    return {
        "concept": name,
        "method": result["chosen_method"],
        "strength": result["concepts"][0]["strength"],
        "neurons": result["concepts"][0]["located_neurons"],
        "summary": summary,
        "matched": matched,
        "curves": result["curves"][name],
        "rows": result["variants"]["edited"]["rows"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, with the geometric mean of every ratio."""
    head = [
        "concept",
        "neurons located",
        "strength",
        "efficacy",
        "specificity",
        "first-token KL",
        "collateral KL at 10 %",
    ]
    lines = ["| " + " | ".join([*head, *(f"{name}, times ours" for name in METHODS)]) + " |"]
    lines.append("|" + "---|" * (len(head) + len(METHODS)))
    for row in rows:
        own = row["matched"][row["method"]]["collateral_kl"]
        cells = [row["concept"], str(row["neurons"]), f"{row['strength']:.2f}"]
        cells += [_interval(row["summary"][key]) for key in ("efficacy", "specificity")]
        cells += [f"{row['summary']['first_token_kl']['value']:.4f}", "never" if own is None else f"{own:.4f}"]
        cells += [_ratio(row["matched"][name]) for name in METHODS]
        lines.append("| " + " | ".join(cells) + " |")
    means = []
    for name in METHODS:
        ratios = [row["matched"][name]["ratio"] for row in rows if row["matched"][name]["ratio"] is not None]
        means.append(f"{gmean(ratios):.2f} (of {len(ratios)})" if ratios else "never")
    lines.append("| " + " | ".join(["geometric mean", *[""] * (len(head) - 1), *means]) + " |")
    return "\n".join(lines)


def _interval(measure: dict[str, Any]) -> str:
    return f"{measure['value']:.3f} ({measure['low']:.3f} to {measure['high']:.3f})"


def _ratio(row: dict[str, Any]) -> str:
    if row["ratio"] is None:
        return "never"
    return f"{row['ratio']:.2f}"


def main() -> None:
    """Run every concept, print each as it ends, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="path without its ending")
    parser.add_argument("--concepts", default=CHOSEN, help="names, separated by commas")
    arguments = parser.parse_args()
    command = f"python evals/demo_concepts.py --output {arguments.output.as_posix()}"
    command += "" if arguments.concepts == CHOSEN else f" --concepts {arguments.concepts}"
    about = {"command": command, "date": date.today().isoformat(), "python": platform.python_version()}
    rows: list[dict[str, Any]] = []
    for name in arguments.concepts.split(","):
        rows.append(run_concept(name))
        print(table(rows[-1:]).splitlines()[2], flush=True)
        arguments.output.with_suffix(".json").write_text(json.dumps({**about, "rows": rows}, indent=1))
        words = (
            f"# {len(rows)} concepts of the demo model\n\n`{command}`, {about['date']}, two CPU cores. Default "
            "settings for all concepts. Collateral KL: mean over all positions of held-out texts without the concept, "
            "at the strength where a tenth of the concept's probability mass is left; the other methods' as a multiple "
            "of it. A method that never gets there is listed as such.\n\n"
        )
        arguments.output.with_suffix(".md").write_text(words + table(rows) + "\n")


if __name__ == "__main__":
    main()
