"""Norm-preserving or not: an edit whose vectors are scaled back to their lengths, at equal removal, on the demo model.

`python evals/norms.py --output evals/results/norms-demo`. Each vector that an edit changes is given the length that it
had, as norm-preserving abliteration does it; both edits are taken at the strength that leaves a tenth of the concept's
probability mass in held-out text.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from material import open_recipe, provenance, write_result
from scipy.optimize import brentq

from rotate_edit import (
    Checkpoint,
    Edit,
    Reference,
    applied,
    collateral_kl,
    demo_concepts,
    load_model,
    make_method,
    mass_by_text,
    paired_log_ratio,
    parse_recipe,
    read_matrix,
)

CHOSEN = "dogs,ships,horses,trees"
METHODS = ("silence-words", "channel-located", "lm-head-located", "direction-everywhere", "least-collateral-everywhere")
TARGET = 0.1
STRENGTHS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


def as_long_as_before(checkpoint: Checkpoint, edit: Edit) -> Edit:
    """The edit of neuron matrices with every changed vector scaled to the length that it had."""
    changes = []
    for change in edit.changes:
        assert change.layer is not None
        before = read_matrix(checkpoint, change.layer, change.matrix, change.expert)[change.rows]
        after = before + change.delta()
        kept = after * (before.norm(dim=1) / after.norm(dim=1).clamp_min(1e-12))[:, None]
        changes.append(replace(change, left=torch.eye(len(before)), right=kept - before, strength=1.0))
    return replace(edit, changes=tuple(changes))


def cost(model: Any, held: Reference, at: Callable[[float], Edit]) -> float | None:
    """Collateral KL in nats at the weakest strength that leaves a tenth; None where none does."""

    def left(strength: float) -> float:
        with applied(model, at(strength)):
            sums, _ = mass_by_text(model, held.concept, held.concept_ids)
        return float(sums.sum() / held.concept_mass[0].sum()) - TARGET

    before = 0.0
    for strength in STRENGTHS:
        if left(strength) <= 0:
            with applied(model, at(float(brentq(left, before, strength, rtol=1e-3)))):
                return collateral_kl(model, held.others, held.others_base, draws=1).value
        before = strength
    return None


def measure_concept(name: str, model: Any) -> list[dict[str, Any]]:
    """Every method's damage with lengths as they come and as they were."""
    concept = {"name": name, "words": list(demo_concepts()[name].words), "plurals": True, "strength": 1.0}
    recipe = {"model": "demo", "concepts": [concept], "evaluate": {"items": "demo", "tokens": 1500}}
    session = open_recipe(parse_recipe(recipe), model)
    methods = [make_method(method) for method in METHODS]
    held = session.reference(name, "test")
    assert held is not None
    rows = []
    for method, edit in session.build(methods, session.locate(methods)).items():

        def preserved(strength: float, edit: Edit = edit) -> Edit:
            return as_long_as_before(session.checkpoint, edit.at(strength))

        damage = {"plain": cost(model, held, edit.at), "preserved": cost(model, held, preserved)}
        rows.append({"concept": name, "method": method, **damage})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """By method: damage with lengths preserved as a multiple of the plain edit's, over the concepts both reach."""
    lines = [
        "| method | reaches a tenth | with lengths preserved | times the plain edit's KL | p |",
        "|---|---|---|---|---|",
    ]
    for method in METHODS:
        own = [row for row in rows if row["method"] == method]
        both = [row for row in own if row["plain"] is not None and row["preserved"] is not None]
        cells = [f"{sum(row[kind] is not None for row in own)} of {len(own)}" for kind in ("plain", "preserved")]
        if len(both) > 1:
            ratio = paired_log_ratio([row["plain"] for row in both], [row["preserved"] for row in both])
            value = ratio.measure
            cells += [f"{value.value:.2f} ({value.low:.2f} to {value.high:.2f})", f"{ratio.p:.3g}"]
        else:
            cells += ["", ""]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure the concepts and write the JSON and the Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", default=CHOSEN, help="names of the demo's concepts, separated by commas")
    parser.add_argument("--output", type=Path, required=True, help="path without its ending")
    arguments = parser.parse_args()
    model, rows = load_model("demo"), []
    for name in arguments.concepts.split(","):
        rows += measure_concept(name, model)
        print(*rows[-len(METHODS) :], sep="\n", flush=True)
    words = (
        f"{len(rows) // len(METHODS)} concepts of the demo model. Collateral KL at the strength that leaves a tenth of "
        "the concept's mass in held-out text, geometric mean with the 95 % interval over concepts."
    )
    title = "Edited vectors scaled back to their lengths"
    write_result(arguments.output, provenance("norms.py", parser, arguments), {"rows": rows}, title, words, table(rows))


if __name__ == "__main__":
    main()
