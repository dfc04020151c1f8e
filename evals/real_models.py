"""One concept removed from three real models, as anybody would do it: a run of each, and one table.

python evals/real_models.py [--output runs/real] [--only smollm2] [--json FILE]

The models lie in ROTATE_EDIT_MODELS (~/.cache/rotate-edit-models when it is not set), in smollm2, gemma3 and qwen. A
run that is there already is not made again, so that the table can be printed from finished runs.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

WORDS = "golf,golfer,putter,fairway,birdie,bogey,caddie"
MODELS = {"smollm2": "SmolLM2-135M-Instruct", "gemma3": "Gemma-3-270M", "qwen": "Qwen2.5-Coder-0.5B-Instruct"}
COLUMNS = (
    ("words' probability left", "concept_mass_fraction", "{:.1%}"),
    ("knowledge left", "knowledge_kept", "{:.0%}"),
    ("log-odds lost (nats)", "knowledge_drop", "{:.2f}"),
    ("loss on text about it (nats)", "comprehension_rise", "{:+.2f}"),
    ("on other text (nats)", "comprehension_elsewhere", "{:+.2f}"),
    ("other knowledge left", "general_kept", "{:.0%}"),
    ("KL on other text (nats)", "collateral_kl", "{:.3f}"),
)


def models_folder() -> Path:
    """Where the three models lie."""
    return Path(os.environ.get("ROTATE_EDIT_MODELS") or Path.home() / ".cache" / "rotate-edit-models")


def run(name: str, output: Path) -> None:
    """The run of one model, in a process of its own."""
    arguments = ["run", str(models_folder() / name), "--suppress", "golf", "--words", WORDS, "--output", str(output)]
    subprocess.run([sys.executable, "-m", "rotate_edit", *arguments], check=True)


def row(name: str, folder: Path) -> dict[str, Any]:
    """What a run found: figures with their intervals, time in seconds and memory in GB."""
    result = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    measures = next(iter(result["variants"].values()))["measures"]
    rounding = result["saved"]["rounding"]
    return {
        "model": MODELS[name],
        "strength": result["concepts"][0]["strength"],
        **{key: measures.get(key) for _, key, _ in COLUMNS},
        "rounding": (rounding["error_squares"] / rounding["change_squares"]) ** 0.5,
        "seconds": sum(result["cost"]["seconds"].values()),
        "edit_seconds": sum(
            result["cost"]["seconds"][step] for step in ("write texts", "locate", "build edits", "strengths", "save")
        ),
        "gigabytes": result["cost"]["peak_memory_mb"] / 1024,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, intervals in brackets."""
    names = [title for title, _, _ in COLUMNS]
    lines = ["| model | " + " | ".join(names) + " | lost in rounding | run | memory |"]
    lines.append("|---|" + "---|" * (len(names) + 3))
    for found in rows:
        cells = []
        for _, key, form in COLUMNS:
            measure = found[key]
            if measure is None or measure["value"] is None:
                cells.append("not measured")
                continue
            interval = f"{form.format(measure['low'])} to {form.format(measure['high'])}"
            cells.append(f"{form.format(measure['value'])} ({interval})")
        time = f"{found['seconds'] / 60:.1f} min"
        cells += [f"{found['rounding']:.0%}", time, f"{found['gigabytes']:.1f} GB"]
        lines.append(f"| {found['model']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Make the runs that are missing, and print the table."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--output", type=Path, default=Path("runs/real"))
    options.add_argument("--only", action="append", choices=MODELS)
    options.add_argument("--json", type=Path)
    choice = options.parse_args()
    rows = []
    for name in choice.only or MODELS:
        folder = choice.output / name
        if not (folder / "evaluation.json").is_file():
            run(name, folder)
        rows.append(row(name, folder))
    print(table(rows))
    if choice.json:
        choice.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
