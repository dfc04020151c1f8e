"""Where the time of a run goes, step by step, with an empty cache folder.

`python evals/speed.py recipes/demo.yaml --label before --output evals/results/speed-demo`. A second call with another
label adds a column to the same table. `--settings` changes the recipe, for instance to read less self-generated text.
"""

import argparse
import cProfile
import json
import os
import pstats
import resource
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from rotate_edit import parse_recipe, read_recipe
from rotate_edit.errors import Failure
from rotate_edit.pipeline import edit_only, run

# What is looked up in the profile: a line of the table, and the functions (file, name) whose time it adds up. A line
# that begins with a dash is a part of the line before it.
STEPS: Sequence[tuple[str, Sequence[tuple[str, str]]]] = (
    ("open and load", (("session.py", "open_session"), ("checkpoint.py", "load_model"))),
    ("locate", (("session.py", "locate"),)),
    ("build the edits", (("session.py", "build"),)),
    ("- the model writes text", (("self_text.py", "self_text"),)),
    ("- moments of activations", (("key_moments.py", "key_moments"), ("key_moments.py", "last_moments"))),
    ("- positions of the last layer", (("output_head.py", "positions"),)),
    ("- whitening", (("low_rank.py", "whitened"),)),
    ("- predictions at these positions", (("output_head.py", "predicted"),)),
    ("- related tokens", (("low_rank.py", "related_tokens"),)),
    ("- the low-rank fit", (("low_rank.py", "fit_change"),)),
    ("strengths", (("session.py", "strengths"),)),
    ("curves", (("pipeline.py", "_draw_curves"),)),
    ("save", (("pipeline.py", "_save_edit"),)),
    ("evaluate", (("pipeline.py", "_evaluate"),)),
    ("- lm-eval's items", (("harness.py", "score"),)),
    ("- texts that both models write", (("generation.py", "generate"),)),
    ("report and cards", (("report.py", "write_report"), ("card.py", "write_cards"))),
)


def changed(content: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's content with other values, section by section."""
    merged = dict(content)
    for key, value in settings.items():
        merged[key] = changed(merged.get(key) or {}, value) if isinstance(value, dict) else value
    return merged


def profiled(recipe: Path, settings: Mapping[str, Any], *, alone: bool) -> dict[str, float]:
    """Run a recipe once and return the seconds of each step, and of all (also as processor time, over all threads)."""
    parsed = read_recipe(recipe)
    if settings:
        # Left-out controls stand for the default ones, so that the file's own content is read again.
        parsed = parse_recipe(changed(yaml.safe_load(recipe.read_text(encoding="utf-8")), settings), recipe.name)
    profile = cProfile.Profile()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        started, before = time.monotonic(), time.process_time()
        try:
            profile.runcall(edit_only if alone else run, parsed, Path(folder) / "run")
        except Failure as error:
            print(error)
        total, processor = time.monotonic() - started, time.process_time() - before
    found: dict[tuple[str, str], float] = {}
    for (file, _, name), (*_, inclusive, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        found[Path(file).name, name] = found.get((Path(file).name, name), 0.0) + inclusive
    seconds = {step: sum(found.get(key, 0.0) for key in keys) for step, keys in STEPS}
    return seconds | {"all": total, "all, of a processor": processor}


def table(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """The columns as Markdown."""
    lines = [f"| seconds | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for step in [*(step for step, _ in STEPS), "all", "all, of a processor"]:
        cells = " | ".join(f"{column['seconds'].get(step, 0):.1f}" for column in columns.values())
        lines.append(f"| {step} | {cells} |")
    lines.append(f"| most memory, MB | {' | '.join(str(column['memory_mb']) for column in columns.values())} |")
    return "\n".join(lines)


def main() -> None:
    """Profile one run and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--label", required=True, help="the column's heading")
    parser.add_argument("--settings", default="{}", help="YAML of settings that the recipe gets")
    parser.add_argument("--edit", action="store_true", help="edit alone, without evaluating")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, required=True, help="without its ending: .json and .md are written")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = yaml.safe_load(options.settings)
    seconds = profiled(options.recipe, settings, alone=options.edit)
    file = options.output.with_suffix(".json")
    columns = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    columns[options.label] = {
        "recipe": options.recipe.name,
        "settings": settings,
        "threads": options.threads,
        "torch": torch.__version__,
        "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "seconds": {step: round(value, 2) for step, value in seconds.items()},
    }
    file.write_text(json.dumps(columns, indent=1) + "\n", encoding="utf-8")
    text = f"# Where the time of {options.recipe.name} goes\n\n{table(columns)}\n"
    options.output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
