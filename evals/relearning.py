"""Relearning on the demo model: the default edits with and without embeddings, and every baseline, at equal removal.

`python evals/relearning.py --output evals/results/relearning-demo`. Every edit leaves a tenth of the concept's
probability mass (on the validation texts); then the model is fine-tuned on paragraphs about the concept that do not
hold what is asked, and asked again after each epoch, with EMBER's settings unless options say otherwise. The rank-one
edit with embeddings is measured at a smaller share too, since it can go there and still be the one that damages least.
"""

import argparse
import json
import platform
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from material import open_recipe
from scipy.stats import gmean

from rotate_edit import (
    Failure,
    Goal,
    Plan,
    Training,
    Variant,
    applied,
    collateral_kl,
    demo_concepts,
    load_model,
    make_method,
    mass_by_text,
    paired_log_ratio,
    parse_recipe,
    relearn,
    solve_strength,
)

CHOSEN = "church,cities,clothes,food,fruit,furniture,kitchen,medicine,money,music,painting,rivers,weather,dogs,ships"
# What `auto` takes beside embeddings, and what it takes without them.
OWN = ("rank-one", "silence-words")
LASTING = "rank-one with embeddings"
TEXTS = {"items": "demo", "tokens": 1500}
BASELINES = (
    "lm-head-located", "direction-everywhere", "least-collateral-everywhere", "layer-kernel", "difference-of-means",
    "snmf-features",
)  # fmt: skip


def measure_concept(name: str, model: Any, training: Training, target: float, deeper: float) -> dict[str, Any]:
    """Every method's edit of one concept at `target` of its mass, relearned, and the lasting one at `deeper` of it too;
    plain JSON."""
    concept = {"name": name, "words": list(demo_concepts()[name].words), "plurals": True, "strength": 1.0}
    session = open_recipe(parse_recipe({"model": "demo", "concepts": [concept], "evaluate": TEXTS}), model)
    assert session.items is not None
    methods = [make_method(method) for method in (*OWN, "token-embeddings", *BASELINES)]
    groups = session.locate(methods)
    made = session.build(methods, groups)
    lasting = {}
    for own in OWN:
        # The rows go with the recipe's own method alone.
        with_rows = session.with_settings({"edit.method": own, "edit.embeddings": True})
        lasting |= with_rows.build([with_rows.method], groups)
    wanted = {f"{own} with embeddings": (edit, target) for own, edit in lasting.items()}
    wanted[f"{LASTING}, {deeper:.0%} left"] = (lasting["rank-one"], deeper)
    wanted |= {method: (edit, target) for method, edit in made.items()}
    known, held = (session.reference(name, split) for split in ("validation", "test"))
    assert known is not None
    assert held is not None
    variants, strengths = [], {}
    for method, (edit, left) in wanted.items():
        try:
            solved = solve_strength(model, known, edit, Goal("remaining", left))
        except Failure:
            solved = None
        if solved is None or solved.missed:
            strengths[method] = None
            continue
        strengths[method] = solved.strength
        variants.append(Variant(method, edit.at(strengths[method])))

    def mass(edited: Any) -> float:
        sums, _ = mass_by_text(edited, held.concept, held.concept_ids)
        return float(sums.sum() / held.concept_mass[0].sum())

    plan = Plan(concepts=(name,))
    result = relearn(model, session.tokenizer, variants, plan, session.items, training=training, probe=mass)
    for method, row in result["models"].items():
        row["strength"] = strengths.get(method)
        row["collateral_kl"] = 0.0
    for variant in variants:
        assert variant.edit is not None
        with applied(model, variant.edit):
            damage = collateral_kl(model, held.others, held.others_base, draws=1).value
        result["models"][variant.name]["collateral_kl"] = damage
    never = [method for method, strength in strengths.items() if strength is None]
    return {"concept": name, "never_reached": never, **result}


def table(results: Sequence[dict[str, Any]]) -> str:
    """By method, over all concepts: damage, mass before and after each epoch, how many times the lasting edit's mass
    is left in the end (with the 95 % interval over concepts) and on how many concepts less is, and accuracy."""
    methods = list(dict.fromkeys(name for result in results for name in result["models"]))
    epochs = results[0]["training"]["epochs"]
    steps = [f"after epoch {number + 1}" for number in range(epochs)]
    head = ["method", "collateral KL", "mass left, edited", *steps, f"times {LASTING}", "more comes back on"]
    head += ["accuracy, edited", *steps]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for method in methods:
        both = [result["models"] for result in results if {method, LASTING} <= set(result["models"])]
        rows = [models[method] for models in both]
        own, other = ([models[name]["probe"][-1] for models in both] for name in (LASTING, method))
        ratio = paired_log_ratio(own, other).measure
        against = f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})" if len(both) > 1 else f"{ratio.value:.2f}"
        more = sum(theirs > ours for ours, theirs in zip(own, other))
        asked = [[row["before"], *row["epochs"]] for row in rows]
        cells = [
            method,
            f"{sum(row['collateral_kl'] for row in rows) / len(rows):.4f}",
            *(f"{gmean([row['probe'][step] for row in rows]):.4f}" for step in range(epochs + 1)),
            *(("", "") if method == LASTING else (against, f"{more} of {len(rows)}")),
            *(f"{sum(part[step]['value'] for part in asked) / len(asked):.3f}" for step in range(epochs + 1)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def by_concept(results: Sequence[dict[str, Any]], deeper: float) -> str:
    """What has come back of each concept in the end, after the lasting edits and after the baseline where least has."""
    own = (LASTING, f"{LASTING}, {deeper:.0%} left")
    lines = [f"| concept | {' | '.join(own)} | the baseline that keeps most | |", "|---|---|---|---|---|"]
    for result in results:
        left = {name: row["probe"][-1] for name, row in result["models"].items()}
        best = min((name for name in BASELINES if name in left), key=left.__getitem__)
        cells = [f"{left[name]:.3f}" if name in left else "never" for name in own]
        lines.append(f"| {result['concept']} | {' | '.join(cells)} | {best} | {left[best]:.3f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure every concept, print the table so far after each, and write the JSON and the Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", default=CHOSEN, help="names of the demo's concepts, separated by commas")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--target", type=float, default=0.1, help="share of the mass that every edit leaves")
    parser.add_argument("--deeper", type=float, default=0.01, help="share that the lasting edit leaves too")
    parser.add_argument("--output", type=Path, required=True, help="path without its ending")
    arguments = parser.parse_args()
    training = Training(epochs=arguments.epochs, learning_rate=arguments.learning_rate)
    command = f"python evals/relearning.py --output {arguments.output.as_posix()}"
    for name in ("concepts", "learning_rate", "epochs", "target", "deeper"):
        value = getattr(arguments, name)
        if value != parser.get_default(name):
            command += f" --{name.replace('_', '-')} {value}"
    about = {"command": command, "date": date.today().isoformat(), "python": platform.python_version()}
    about["torch"] = torch.__version__
    model = load_model("demo")
    results: list[dict[str, Any]] = []
    for name in arguments.concepts.split(","):
        results.append(measure_concept(name, model, training, arguments.target, arguments.deeper))
        print(table(results), flush=True)
        arguments.output.with_suffix(".json").write_text(json.dumps({**about, "results": results}, indent=1))
        never = {result["concept"]: result["never_reached"] for result in results if result["never_reached"]}
        words = (
            f"# Relearning {len(results)} concepts of the demo model\n\n`{command}`, "
            f"{about['date']}, Python {about['python']}, torch {about['torch']}, seed 0. All parameters, AdamW at "
            f"{training.learning_rate:g}, {results[0]['paragraphs']} paragraphs, one a step. Mass: share of the base's "
            f"probability mass on the concept's words in held-out text, geometric mean over concepts; every edit "
            f"was made to leave {arguments.target:.0%} on other texts, unless its name says less. Times: of what is "
            f"left after the last epoch, with the 95 % interval over concepts. Accuracy: multiple-choice items about "
            f"the concept.\n\n"
        )
        reached = f"Never reached that removal: {never}.\n\n" if never else ""
        ends = f"\n\n{reached}After the last epoch:\n\n{by_concept(results, arguments.deeper)}\n"
        arguments.output.with_suffix(".md").write_text(words + table(results) + ends)


if __name__ == "__main__":
    main()
