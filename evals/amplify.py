"""Amplifying: each concept raised to five times its odds after neutral prompts, and what that costs.

`python evals/amplify.py --model demo --output evals/results/amplify-demo`; for a model of real prose
`--model ../shared/models/bookworm --concepts evals/bookworm/concepts.yaml --texts ../shared/corpora/books --half dev`.
Odds: of the concept's tokens as the next one, by their mean probability over prompts that are openings of held-out text
without the concept; beside it how many times likelier they are after the median prompt, and how many of the sampled
continuations of these prompts name the concept.
"""

import argparse
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from matched import OTHER_TOKENS, load
from material import Material, add_arguments, materials, provenance
from torch import Tensor

from rotate_edit.edits.apply import applied
from rotate_edit.edits.build import edits_of
from rotate_edit.edits.edit import Edit
from rotate_edit.errors import Failure
from rotate_edit.evaluation import measures
from rotate_edit.evaluation.generations import repetition
from rotate_edit.models import batches
from rotate_edit.models.generation import generate
from rotate_edit.pipeline import locate
from rotate_edit.recipe import Recipe, parse_recipe
from rotate_edit.session import open_recipe

TIMES = 5.0
WORDS_OF_A_PROMPT = 8
PROMPTS, GENERATED, NEW_TOKENS = 300, 60, 60
STRONGEST = 64.0
MOST_PERPLEXITY, MOST_REPETITION = 0.03, 1.5


def weakest_strength(raised: Callable[[float], float], times: float) -> float | None:
    """The smallest strength (to 2 %) at which `raised(strength)` is at least `times`; None up to 64."""
    low, high = 0.0, 0.5
    while raised(high) < times:
        low, high = high, 2 * high
        if high > STRONGEST:
            return None
    for _ in range(6):
        middle = (low + high) / 2
        low, high = (middle, high) if raised(middle) < times else (low, middle)
    return high


def measure_concept(model: Any, material: Material, recipe: Recipe) -> dict[str, Any]:
    """Amplify one concept by the recipe's method and measure odds, perplexity and repetition; plain JSON."""
    opened = replace(open_recipe(recipe), items=material.items)
    tokenizer, ids = opened.tokenizer, opened.tokens[0].ids
    vocabulary = model.config.get_text_config().vocab_size
    method = recipe.edit.method
    try:
        edit = edits_of(opened, locate(opened, model), [method], model)[method]
    except Failure as failure:
        return {"concept": material.name, "strength": None, "why": str(failure)}
    free = [text for _, text in material.others]
    prompts = [" ".join(text.split()[:WORDS_OF_A_PROMPT]) for text in free[:PROMPTS]]
    asked = batches.tokenise(tokenizer, prompts, vocabulary_size=vocabulary)
    others = batches.tokenise(
        tokenizer, free[PROMPTS:] or free, vocabulary_size=vocabulary, longest=128, token_limit=OTHER_TOKENS
    )

    def chances() -> Tensor:
        return measures.last_position(model, asked)[:, ids].exp().sum(dim=1).double()

    chance = chances()
    before = _odds(chance)

    def raised(strength: float) -> float:
        with applied(model, edit, -strength):
            return _odds(chances()) / before

    strength = weakest_strength(raised, TIMES)
    if strength is None:
        return {"concept": material.name, "strength": None, "why": f"no strength up to {STRONGEST:g} raises it so far"}
    found: dict[str, Any] = {"concept": material.name, "method": method, "strength": -strength, "odds_before": before}
    names = re.compile(r"\b(?:" + "|".join(map(re.escape, material.words)) + r")(?:s|es)?\b", re.IGNORECASE)
    base = _quality(model, tokenizer, others, prompts, names)
    with applied(model, edit, -strength):
        after = chances()
        found |= {"times": _odds(after) / before, "median_times": float((after / chance).median())}
        now = _quality(model, tokenizer, others, prompts, names)
    found |= {f"{name}_before": value for name, value in base.items()}
    found |= now | {"vectors": _vectors(edit)}
    found["perplexity_rise"] = now["perplexity"] / base["perplexity"] - 1
    for kind in ("greedy", "sampled"):
        found[f"{kind}_ratio"] = now[kind] / base[kind] if base[kind] else None
    return found


def _odds(chances: Tensor) -> float:
    probability = float(chances.mean())
    return probability / (1 - probability)


def _quality(
    model: Any, tokenizer: Any, others: batches.Passages, prompts: Sequence[str], names: re.Pattern[str]
) -> dict[str, float]:
    greedy = [texts[0] for texts in generate(model, tokenizer, prompts[:GENERATED], new_tokens=NEW_TOKENS)]
    sampled = [texts[0] for texts in generate(model, tokenizer, prompts, new_tokens=NEW_TOKENS, seed=0)]
    sums, counts = measures.log_likelihood_by_text(model, others)
    return {
        "perplexity": math.exp(-float(sums.sum() / counts.sum())),
        "greedy": repetition(greedy).value,
        "sampled": repetition(sampled[:GENERATED]).value,
        "named": sum(bool(names.search(text)) for text in sampled) / len(sampled),
    }


def _vectors(edit: Edit) -> int:
    return sum(len(change.rows) for change in edit.changes)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| concept | strength | odds | times | median prompt | named | perplexity | repeated 4-grams, greedy "
        "| sampled |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["strength"] is None:
            lines.append(f"| {row['concept']} | never | | | | | | | |")
            continue
        repeated = [
            f"{row[f'{kind}_before']:.3f} to {row[kind]:.3f}"
            + (f" ({row[f'{kind}_ratio']:.2f}×)" if row[f"{kind}_ratio"] else "")
            for kind in ("greedy", "sampled")
        ]
        lines.append(
            f"| {row['concept']} | {row['strength']:.2f} | {row['odds_before']:.5f} | {row['times']:.2f} | "
            f"{row['median_times']:.2f} | {row['named_before']:.1%} to {row['named']:.1%} | "
            f"{row['perplexity_rise']:+.2%} | {' | '.join(repeated)} |"
        )
    return "\n".join(lines)


def goals(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """How many concepts meet each goal: raised at all, perplexity, repetition (greedy), all of them."""
    raised = [row for row in rows if row["strength"] is not None]
    cheap = [row for row in raised if row["perplexity_rise"] <= MOST_PERPLEXITY]
    fluent = [row for row in raised if row["greedy"] <= MOST_REPETITION * row["greedy_before"]]
    return {
        "raised": len(raised),
        "perplexity": len(cheap),
        "repetition": len(fluent),
        "all": sum(row in fluent for row in cheap),
    }


def _measured(file: Path, model: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The rows of an earlier run of the same model and settings, by concept."""
    if not file.is_file():
        return {}
    earlier = json.loads(file.read_text(encoding="utf-8"))
    same = earlier.get("model") == model and earlier.get("settings") == settings
    return {row["concept"]: row for row in earlier["rows"]} if same else {}


def main() -> None:
    """Measure every concept and write the JSON and the Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--settings", default="{}", help="recipe sections as YAML")
    parser.add_argument("--output", type=Path, required=True, help="path without its ending")
    arguments = parser.parse_args()
    settings = yaml.safe_load(arguments.settings)
    model = load(arguments.model)
    rows = []
    measured = _measured(arguments.output.with_suffix(".json"), Path(arguments.model).name, settings)
    for material in materials(arguments):
        concept = {"name": material.name, "words": material.words, "plurals": material.plurals, "strength": -1.0}
        recipe = parse_recipe({"model": arguments.model, "concepts": [concept], **settings})
        if material.name in measured:
            rows.append(measured[material.name])
            continue
        rows.append(measure_concept(model, material, recipe))
        print(table(rows[-1:]).splitlines()[2], flush=True)
    about = provenance("amplify.py", parser, arguments) | {
        "model": Path(arguments.model).name,
        "settings": settings,
        "goals": goals(rows),
    }
    arguments.output.with_suffix(".json").write_text(json.dumps({**about, "rows": rows}, indent=1, allow_nan=False))
    met = about["goals"]
    words = (
        f"# {len(rows)} concepts of {about['model']} amplified\n\n`{about['command']}`, {about['date']}, Python "
        f"{about['python']}, torch {about['torch']}, seed 0. Method: {recipe.edit.method}. "
        "Each at the smallest strength that makes the concept's "
        f"odds after {PROMPTS} neutral prompts {TIMES:g} times the base's. Perplexity: on held-out text without the "
        "concept. Named: sampled continuations of the prompts that name the concept. Repetition: share of 4-grams "
        f"that a text repeats, {GENERATED} texts of {NEW_TOKENS} tokens.\n\n"
        f"Raised that far: {met['raised']} of {len(rows)}; perplexity up at most {MOST_PERPLEXITY:.0%}: "
        f"{met['perplexity']}; greedy repetition at most {MOST_REPETITION:g} times the base's: {met['repetition']}; "
        f"both: {met['all']}.\n\n"
    )
    arguments.output.with_suffix(".md").write_text(words + table(rows) + "\n")


if __name__ == "__main__":
    main()
