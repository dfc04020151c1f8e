"""A small run folder as a run leaves it, without a run: tiny weights, a random edit, made-up numbers."""

import json
from pathlib import Path
from typing import Any

import torch
from tiny_models import random_edit, save_tiny
from tiny_words import tiny_tokenizer

from rotate_edit.edits.edit_file import save_edit
from rotate_edit.edits.writing.adapter import write_adapter
from rotate_edit.edits.writing.patch import write_checkpoint
from rotate_edit.evaluation.provenance import provenance
from rotate_edit.models.checkpoint import open_checkpoint
from rotate_edit.recipe import parse_recipe, recipe_text
from rotate_edit.reporting.card import write_cards
from rotate_edit.reporting.reproduce import write_reproduction

BASE_CARD = "---\nlicense: mit\nlanguage: en\ntags: [secret-tag]\n---\n# The base\n"


def measure(value: float, n: int = 40) -> dict[str, Any]:
    """A measure with an interval."""
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": n, "baseline": 1.0}


def result_of(title: str = "dogs: words (type A)") -> dict[str, Any]:
    """What a run's evaluation.json holds of numbers."""
    row = {
        "task": "demo_choice", "title": title, "group": "concept", "kind": "A", "scale": "accuracy", "metric": "acc",
        "n": 40, "chance": 0.25, "used": True, "reason": None, "base": measure(0.9), "edited": measure(0.2),
        "difference": measure(-0.7), "p": 0.001, "p_holm": 0.001, "kept": measure(0.0), "sentence": "Less.",
    }  # fmt: skip
    return {
        "concepts": [{"name": "test", "strength": 1.7, "words": ["dog", "puppy"], "warnings": []}],
        "items": "demo",
        "summary": {"efficacy": measure(0.9), "first_token_kl": measure(0.3)},
        "variants": {"edited": {"measures": {"collateral_kl": measure(0.25)}, "rows": [row], "words": ["It works."]}},
        "definitions": {"demo_choice": {"version": 1, "content": "0" * 64}},
    }


def tiny_run(
    folder: Path, *, result: dict[str, Any] | None = None, tied: bool = False, dtype: torch.dtype = torch.float32
) -> Path:
    """A run folder with everything in it, and its base in `base` beside it."""
    base_folder = save_tiny("llama", folder.with_name("base"), tied=tied, dtype=dtype)
    tiny_tokenizer().save_pretrained(base_folder)
    (base_folder / "README.md").write_text(BASE_CARD)
    for name in ("pytorch_model.bin", ".token", "code.py"):
        (base_folder / name).write_text("never published")
    base = open_checkpoint(base_folder)
    edit = random_edit(base, biases=False)
    folder.mkdir()
    save_edit(edit, folder / "edit")
    write_checkpoint(base, edit, folder / "model", edit_folder=folder / "edit")
    write_adapter(base, edit, folder / "adapter")
    concept = {"name": "test", "words": ["dog", "puppy"], "strength": 1.7}
    recipe = parse_recipe({"model": str(base_folder), "concepts": [concept], "evaluate": {"items": "demo"}})
    (folder / "recipe.yaml").write_text(recipe_text(recipe))
    content = (result or result_of()) | {"provenance": provenance(base, 0, "cpu")}
    (folder / "evaluation.json").write_text(json.dumps(content))
    (folder / "report.md").write_text("# Report\n")
    write_reproduction(folder, recipe_text(recipe), content)
    write_cards(folder)
    (folder / "notes.txt").write_text("never published")
    return folder
