"""Amplifying: each concept at five times its odds after neutral prompts, and what that costs.

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
from pathlib import Path
from typing import Any

import yaml
from matched import OTHER_TOKENS
from material import Material, add_arguments, materials, open_recipe, provenance
from torch import Tensor

from rotate_edit import (
    Edit,
    Failure,
    Passages,
    Recipe,
    applied,
    cross,
    generate,
    last_position,
    load_model,
    log_likelihood_by_text,
    parse_recipe,
    repetition,
    tokenise,
)

TIMES = 5.0
WORDS_OF_A_PROMPT = 8
PROMPTS, GENERATED, NEW_TOKENS = 300, 60, 60
STRONGEST = 64.0
MOST_PERPLEXITY, MOST_REPETITION = 0.03, 1.5


def weakest_strength(amplified: Callable[[float], float], times: float) -> float | None:
    """The smallest strength (to 2 %) at which `amplified(strength)` is at least `times`; None up to 64."""
    found = cross(amplified, times, falling=False, start=0.5, limit=STRONGEST)
    return found.high if found.reached else None


def measure_concept(model: Any, material: Material, recipe: Recipe) -> dict[str, Any]:
    """Amplify one concept by the recipe's method and measure odds, perplexity and repetition; plain JSON."""
    session = open_recipe(recipe, model, material.items)
    tokenizer, ids = session.tokenizer, session.tokens[0].ids
    vocabulary = model.config.get_text_config().vocab_size
    try:
        edit = session.build([session.method], session.locate())[recipe.method]
    except Failure as failure:
        return {"concept": material.name, "strength": None, "why": str(failure)}
    free = [text for _, text in material.others]
    prompts = [" ".join(text.split()[:WORDS_OF_A_PROMPT]) for text in free[:PROMPTS]]
    asked = tokenise(tokenizer, prompts, vocabulary_size=vocabulary)
    others = tokenise(
        tokenizer, free[PROMPTS:] or free, vocabulary_size=vocabulary, longest=128, token_limit=OTHER_TOKENS
    )

    def chances() -> Tensor:
        return last_position(model, asked)[:, ids].exp().sum(dim=1).double()

    chance = chances()
    before = _odds(chance)

    def amplified(strength: float) -> float:
        with applied(model, edit.at(-strength)):
            return _odds(chances()) / before

    strength = weakest_strength(amplified, TIMES)
    if strength is None:
        return {"concept": material.name, "strength": None, "why": f"no strength up to {STRONGEST:g} does it"}
    found: dict[str, Any] = {"concept": material.name, "method": recipe.method, "strength": -strength}
    found["odds_before"] = before
    names = re.compile(r"\b(?:" + "|".join(map(re.escape, material.words)) + r")(?:s|es)?\b", re.IGNORECASE)
    base = _quality(model, tokenizer, others, prompts, names)
    with applied(model, edit.at(-strength)):
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
    model: Any, tokenizer: Any, others: Passages, prompts: Sequence[str], names: re.Pattern[str]
) -> dict[str, float]:
    greedy = [texts[0] for texts in generate(model, tokenizer, prompts[:GENERATED], new_tokens=NEW_TOKENS)]
    sampled = [texts[0] for texts in generate(model, tokenizer, prompts, new_tokens=NEW_TOKENS, seed=0)]
    sums, counts = log_likelihood_by_text(model, others)
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
    """How many concepts meet each goal: amplified so far at all, perplexity, repetition (greedy), all of them."""
    amplified = [row for row in rows if row["strength"] is not None]
    cheap = [row for row in amplified if row["perplexity_rise"] <= MOST_PERPLEXITY]
    fluent = [row for row in amplified if row["greedy"] <= MOST_REPETITION * row["greedy_before"]]
    return {
        "raised": len(amplified),
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
    model = load_model(arguments.model)
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
        f"{about['python']}, torch {about['torch']}, seed 0. Method: {recipe.method}. "
        "Each at the smallest strength that makes the concept's "
        f"odds after {PROMPTS} neutral prompts {TIMES:g} times the base's. Perplexity: on held-out text without the "
        "concept. Named: sampled continuations of the prompts that name the concept. Repetition: share of 4-grams "
        f"that a text repeats, {GENERATED} texts of {NEW_TOKENS} tokens.\n\n"
        f"Amplified that far: {met['raised']} of {len(rows)}; perplexity up at most {MOST_PERPLEXITY:.0%}: "
        f"{met['perplexity']}; greedy repetition at most {MOST_REPETITION:g} times the base's: {met['repetition']}; "
        f"both: {met['all']}.\n\n"
    )
    arguments.output.with_suffix(".md").write_text(words + table(rows) + "\n")


if __name__ == "__main__":
    main()
