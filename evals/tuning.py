"""What a search buys: `rotate-edit tune` on several concepts of the demo, its choice against the recipe as it was.

`python evals/tuning.py --output evals/results/tuning-demo`. The comparison is on texts that the search never saw, at
the removal that the choice reaches there.
"""

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from rotate_edit import demo_concepts, parse_recipe, tune

CHOSEN = "dogs,ships,music,horses,birds,trees"


def tuned(name: str, trials: int, method: str) -> dict[str, Any]:
    """One concept's search under the package's defaults; what it chose and how long it took."""
    concept = {"name": name, "words": list(demo_concepts()[name].words), "plurals": True}
    content = {"model": "demo", "concepts": [concept], "edit": {"method": method}, "evaluate": {"items": "demo"}}
    recipe = parse_recipe(content)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        record = tune(recipe, Path(folder) / "tune", trials=trials)
    chosen = record["trials"][record["front"][record["chosen"]]]
    seconds = [trial["seconds"] for trial in record["trials"]]
    return {
        "concept": name,
        "seconds": round(time.monotonic() - started, 1),
        "trials": len(record["trials"]),
        "failed": len(record["failed"]),
        "seconds_a_trial": sum(seconds) / len(seconds),
        "front": len(record["front"]),
        "settings": chosen["settings"],
        "strengths": chosen["strengths"],
        "test": record["test"],
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| concept | trials (failed) | seconds | a trial | removal | KL, chosen | KL, recipe as it was | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        held = row["test"]
        own, ratio = "never", ""
        if held["own_damage"] is not None:
            own = f"{held['own_damage']:.5f}"
            ratio = f"{held['damage'] / held['own_damage']:.2f}"
        lines.append(
            f"| {row['concept']} | {row['trials']} ({row['failed']}) | {row['seconds']} | "
            f"{row['seconds_a_trial']:.2f} | {held['removal']:.3f} | {held['damage']:.5f} | {own} | {ratio} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Search for each concept and write the JSON and the Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", default=CHOSEN, help="names of the demo's concepts, separated by commas")
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--method", default="auto", help="the recipe's edit.method")
    parser.add_argument("--output", type=Path, required=True, help="path without its ending")
    arguments = parser.parse_args()
    command = f"python evals/tuning.py --output {arguments.output.as_posix()}"
    command += "" if arguments.concepts == CHOSEN else f" --concepts {arguments.concepts}"
    command += "" if arguments.trials == 60 else f" --trials {arguments.trials}"
    command += "" if arguments.method == "auto" else f" --method {arguments.method}"
    about = {
        "command": command,
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    rows: list[dict[str, Any]] = []
    for name in arguments.concepts.split(","):
        rows.append(tuned(name, arguments.trials, arguments.method))
        print(table(rows[-1:]).splitlines()[2], flush=True)
        arguments.output.with_suffix(".json").write_text(json.dumps({**about, "rows": rows}, indent=1))
        words = (
            f"# {len(rows)} searches on the demo model\n\n`{command}`, {about['date']}, Python {about['python']}, "
            f"torch {about['torch']}, {about['threads']} thread(s), seed 0. The knee of each search against the "
            "recipe's own "
            "settings, both on texts that the search never saw, the recipe at the strength that removes as much as the "
            "choice. Collateral KL in nats; a ratio below 1 is a gain.\n\n"
        )
        arguments.output.with_suffix(".md").write_text(words + table(rows) + "\n")


if __name__ == "__main__":
    main()
