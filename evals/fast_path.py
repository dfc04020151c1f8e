"""Figures of the fast path against the plain one: whole passes, every logit, lm-eval's own scoring, whole curves.

`python evals/fast_path.py recipes/demo.yaml --output evals/results/fast-path-demo`. The edit is made once. Its damage,
what it leaves, its curve and the scores of its items are then computed both ways.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from speed import changed

import rotate_edit
from rotate_edit import Edit, parse_recipe
from rotate_edit.edits.apply import applied
from rotate_edit.evaluation import curves, harness, measures
from rotate_edit.evaluation.items import divide
from rotate_edit.evaluation.measures import Reference
from rotate_edit.models.batches import Passages, next_logits, real_positions

Figures = dict[str, float]


def plain_rows(model: Any, texts: Passages) -> list[torch.Tensor]:
    """Log-probabilities [rows, length, V] of every batch from whole passes."""
    return [logits.float().log_softmax(-1) for logits in next_logits(model, texts)]


def plain_figures(model: Any, known: Reference, base: list[torch.Tensor]) -> Figures:
    """Share of the concept left, damage and perplexity, written out."""
    left = before = 0.0
    for values, batch, lengths in zip(plain_rows(model, known.concept), known.concept.batches, known.concept.lengths):
        real = real_positions(batch, lengths)[:, 1:] & torch.isin(batch[:, 1:], known.concept_ids)
        left += float(values[:, :-1][real][:, known.concept_ids].exp().sum())
    before = float(known.concept_mass[0].sum())
    divergence = positions = likelihood = tokens = 0.0
    others = known.others
    for values, old, batch, lengths in zip(plain_rows(model, others), base, others.batches, others.lengths):
        real = real_positions(batch, lengths)
        divergence += float((old.exp() * (old - values)).sum(-1)[real].double().sum())
        positions += int(real.sum())
        followed = values[:, :-1].gather(2, batch[:, 1:, None])[:, :, 0][real[:, 1:]]
        likelihood, tokens = likelihood + float(followed.double().sum()), tokens + len(followed)
    return {"share left": left / before, "damage": divergence / positions, "log-likelihood": likelihood / tokens}


def fast_figures(model: Any, known: Reference) -> Figures:
    """The same from the package's measures."""
    mass = measures.mass_by_text(model, known.concept, known.concept_ids)[0]
    sums, counts, likelihood, tokens = measures.damage_by_text(model, known.others, known.others_base)
    return {
        "share left": float(mass.sum() / known.concept_mass[0].sum()),
        "damage": float(sums.sum() / counts.sum()),
        "log-likelihood": float(likelihood.sum() / tokens.sum()),
    }


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What work returns, and its seconds."""
    started = time.monotonic()
    return work(), time.monotonic() - started


def item_scores(session: Any, edit: Edit, limit: int | None) -> dict[str, list[list[float]]]:
    """Every item's score in the edited model, by lm-eval's own code and by the package's."""
    from lm_eval.models.huggingface import HFLM

    local, _ = divide(session.items.tasks, session.plan)
    loaded = harness.open_harness([task.with_rows(task.rows[:limit]) for task in local], session.plan.settings)
    with applied(session.model, edit):
        own = harness.score(loaded, session.model, session.tokenizer)
        size = session.plan.settings.batch_size
        theirs = HFLM(pretrained=session.model, tokenizer=session.tokenizer, batch_size=size)
        plain = harness._score(loaded, theirs, lambda *_: None, "")
    return {name: [list(plain[name].values), list(own[name].values)] for name in own}


def compared(session: Any, limit: int | None) -> tuple[list[dict[str, Any]], Mapping[str, float]]:
    """Rows of a figure's plain and fast value, and the seconds of both."""
    model, name = session.model, session.tokens[0].name
    groups = session.locate()
    unit = session.build([session.method], groups)[session.method.about.name]
    strength = session.strengths(unit)[name]
    known = session.reference(name, "test")
    base, _ = timed(lambda: plain_rows(model, known.others))
    rows: list[dict[str, Any]] = []
    seconds = {"plain": 0.0, "fast": 0.0}
    for share in (0.5, 1.0, 2.0):
        with applied(model, unit.at(share * strength)):
            plain, took = timed(lambda: plain_figures(model, known, base))
            seconds["plain"] += took
            first = rotate_edit.edits.apply.first_changed_layer(model, unit)
            fast, took = timed(lambda first=first: fast_figures(model, known.starting_at(first)))
            seconds["fast"] += took
        rows += [
            {"figure": f"{figure} at {share * strength:.3g}", "plain": plain[figure], "fast": fast[figure]}
            for figure in plain
        ]
    strengths = session.recipe.evaluate.strengths
    whole = measures.removal_curve(model, known, strengths, lambda at: applied(model, unit.at(at)))
    crossing = measures.at_matched_removal(whole)
    points = curves.draw(model, known, {"own": unit}, strengths, strengths[0])
    found = curves.matched_table(points, "own")["rows"][0]
    if crossing is not None:
        rows.append({"figure": "damage at a tenth", "plain": crossing.damage, "fast": found["collateral_kl"]})
    for task, (theirs, own) in item_scores(session, unit.at(strength), limit).items():
        rows.append({"figure": f"mean of {task}", "plain": sum(theirs) / len(theirs), "fast": sum(own) / len(own)})
    return rows, seconds


def main() -> None:
    """Compare and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--settings", default="{}", help="YAML of settings that the recipe gets")
    parser.add_argument("--items", type=int, help="at most this many items of each task")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    content = changed(yaml.safe_load(options.recipe.read_text(encoding="utf-8")), yaml.safe_load(options.settings))
    rows, seconds = compared(rotate_edit.open(parse_recipe(content, options.recipe.name)), options.items)
    lines = ["| figure | plain | fast | relative difference |", "|---|---|---|---|"]
    worst = 0.0
    for row in rows:
        difference = abs(row["fast"] - row["plain"]) / max(abs(row["plain"]), 1e-12)
        worst = max(worst, difference)
        lines.append(f"| {row['figure']} | {row['plain']:.6g} | {row['fast']:.6g} | {difference:.1e} |")
    told = f"Measuring the edit took {seconds['plain']:.1f} s the plain way and {seconds['fast']:.1f} s the fast way."
    text = f"# The fast path against the plain one: {options.recipe.name}\n\n" + "\n".join(lines) + f"\n\n{told}\n"
    options.output.with_suffix(".md").write_text(text, encoding="utf-8")
    options.output.with_suffix(".json").write_text(json.dumps({"rows": rows, "seconds": seconds}, indent=1) + "\n")
    print(text)
    if worst > 1e-3:
        raise SystemExit(f"the largest relative difference is {worst:.1e}")


if __name__ == "__main__":
    main()
