"""Two readings of the same items compared: the fractions kept, paired tests, and what may be concluded, in words."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rotate_edit.evaluation import statistics
from rotate_edit.evaluation.harness import Scores, Settings
from rotate_edit.evaluation.statistics import Difference, Estimate

ROLES = ("concept", "neighbour", "general")
SIGNIFICANT = 0.05
KIND_WORDS = {"accuracy": "choice", "probability": "cloze", "perplexity": "perplexity"}


@dataclass(frozen=True)
class Plan:
    """What is asked.

    Attributes:
        concepts: The edited concepts by the names that the items know them under.
        neighbours: Concepts that lie close to them.
        tasks: lm-eval tasks by name, as general abilities.
        items: At most this many items of each part (one concept's words, the neighbours' facts). None for all.
        settings: How lm-eval asks.
        amplified: The concepts among them that the edit means to amplify. Their removal is not measured.
        generations: How many neutral prompts are continued beside the concept's own.
        new_tokens: How long a continuation is.
        words: Of the concepts, which are looked for in sampled continuations (the leak rate).
        samples: How many continuations of every prompt are sampled.
        seed: Of the bootstrap and of the sampling.
    """

    concepts: tuple[str, ...]
    neighbours: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    items: int | None = 240
    settings: Settings = field(default_factory=Settings)
    amplified: tuple[str, ...] = ()
    generations: int = 5
    new_tokens: int = 40
    words: tuple[str, ...] = ()
    samples: int = 20
    seed: int = 0

    def amplifies(self, concept: str) -> bool:
        """Whether the edit means to amplify a concept."""
        return concept.casefold() in {name.casefold() for name in self.amplified}

    @property
    def suppressed(self) -> tuple[str, ...]:
        """The concepts that the edit means to remove."""
        return tuple(name for name in self.concepts if not self.amplifies(name))

    @property
    def only_amplifies(self) -> bool:
        """Whether the edit means to amplify all of its concepts, so that no removal is measured."""
        return bool(self.concepts) and not self.suppressed


@dataclass(frozen=True)
class Part:
    """Items of one task that are reported together.

    Attributes:
        task: The task's name.
        role: Of `ROLES`: about the concept, about its neighbours, or general.
        title: What reports call it.
        type: "A" (the answer is a word of the concept), "B" (a fact about it), or whatever the items say.
        rows: Their places among the task's items.
        concept: The concept that they are about, where they are a concept's own.
    """

    task: str
    role: str
    title: str
    type: str
    rows: tuple[int, ...]
    concept: str = ""


def compare_parts(
    parts: Sequence[Part], before: Mapping[str, Scores], after: Mapping[str, Scores], plan: Plan
) -> tuple[list[dict[str, Any]], dict[int, Estimate]]:
    """Compare two models' scores, part by part.

    Args:
        parts: The items that are reported together.
        before: The base's scores by task.
        after: The edited model's.
        plan: What was asked.

    Returns:
        A row for each part as plain JSON, with Holm's correction over all parts that are used. And by the place of a
        part the share of the base's result that is kept, for the parts that are used.
    """
    rows, kept = [], {}
    for number, part in enumerate(parts):
        row, estimate = _compare_part(part, before[part.task], after[part.task], plan)
        rows.append(row)
        if estimate is not None:
            kept[number] = estimate
    adjusted = statistics.holm([row["p"] if row["used"] else math.nan for row in rows])
    tests = sum(row["used"] for row in rows)
    for row, p in zip(rows, adjusted, strict=True):
        row["p_holm"] = p if math.isfinite(p) else None
        row["sentence"] = sentence(row, tests)
    return rows, kept


def _compare_part(part: Part, before: Scores, after: Scores, plan: Plan) -> tuple[dict[str, Any], Estimate | None]:
    base = [before.values[place] for place in part.rows]
    edited = [after.values[place] for place in part.rows]
    row: dict[str, Any] = {
        "task": part.task,
        "title": part.title,
        "group": part.role,
        "concept": part.concept,
        "kind": part.type or KIND_WORDS[before.kind],
        "scale": before.kind,
        "metric": before.metric,
        "n": len(base),
        "chance": before.chance if before.kind == "accuracy" else None,
        "used": True,
        "reason": None,
    }
    how = {"seed": plan.seed}
    if before.kind == "accuracy":
        right = round(sum(base))
        levels = statistics.wilson(right, len(base)), statistics.wilson(round(sum(edited)), len(base))
        change = statistics.paired_accuracy(base, edited, **how)
        estimate = statistics.kept_accuracy(base, edited, before.chance, **how)
        if not statistics.above_chance(right, len(base), before.chance):
            row["used"], row["reason"] = False, "the base model is not above chance on it"
    else:
        weights = [before.weights[place] for place in part.rows] if before.kind == "perplexity" else []
        pair = (
            statistics.paired_perplexities(base, edited, weights, **how)
            if before.kind == "perplexity"
            else statistics.paired_probabilities(base, edited, **how)
        )
        levels, change, estimate = (pair.base, pair.edited), pair.difference, pair.kept
    row |= {"base": levels[0].plain(), "edited": levels[1].plain(), **_difference(change)}
    row["kept"] = statistics.measure(estimate).plain() if row["used"] else None
    return row, estimate if row["used"] else None


def _difference(change: Difference) -> dict[str, Any]:
    return {"difference": change.measure.plain(), "p": change.p}


# Words.


def sentence(row: Mapping[str, Any], tests: int) -> str:
    """What one row shows and what it cannot show, in words; tests: how many rows Holm's correction covers."""
    what = {"accuracy": "accuracy", "probability": "the probability of the right word", "perplexity": "perplexity"}
    base, edited, change = row["base"], row["edited"], row["difference"]
    if not row["used"]:
        return (
            f"{row['title']}: not used. The base model's accuracy of {base['value']:.3g} on {row['n']} items has the "
            f"95 % interval {base['low']:.3g} to {base['high']:.3g}, which does not lie above chance "
            f"({row['chance']:.3g})."
        )
    moved = f"{what[row['scale']]} went from {base['value']:.3g} to {edited['value']:.3g}"
    start = f"{row['title']}: on {row['n']} items {moved}"
    interval = f"95 % interval of the difference {change['low']:+.3g} to {change['high']:+.3g}"
    p = row["p_holm"]
    shown = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    corrected = f" after Holm's correction over {tests} tests" if tests > 1 else ""
    if p < SIGNIFICANT:
        return f"{start} ({interval}, {shown}{corrected}): a difference that chance does not explain."
    worse = change["high"] if row["scale"] == "perplexity" else -change["low"]
    cannot = f"; a loss of up to {worse:.3g} cannot be excluded" if worse > 0 else ""
    return f"{start} ({interval}, {shown}{corrected}): no difference was shown{cannot}."


def conclusion(summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], plan: Plan) -> list[str]:
    """What can and cannot be concluded from all of it, one sentence each."""
    said = []
    efficacy, specificity = summary["efficacy"], summary["specificity"]
    names = ", ".join(plan.suppressed)
    own = [row for row in rows if row["used"] and row["group"] == "concept" and not plan.amplifies(row["concept"])]
    asked = any(row["scale"] == "accuracy" for row in own)
    words = any(row["kind"] == "A" for row in own)
    what = f"the words of {names}" if words else names
    known = f"what the base model knew of {what} above chance" if asked else f"the probability of words of {names}"
    if efficacy["value"] is not None:
        said.append(
            f"Of {known}, {efficacy['value']:.0%} is gone "
            f"({efficacy['low']:.0%} to {efficacy['high']:.0%}, {efficacy['n']} items)."
        )
        said += [
            f"That figure leaves out {row['title']}, where accuracy was {row['base']['value']:.3g} before and is "
            f"{row['edited']['value']:.3g} after."
            for row in own
            if row["scale"] == "accuracy" and row["kind"] == "B" and words
        ]
    elif own:
        said.append(f"Removal of {names} was not measured: no task on it has a base accuracy above chance.")
    asked_of = {row["concept"].casefold() for row in rows if row["group"] == "concept"}
    missing = [name for name in plan.suppressed if name.casefold() not in asked_of]
    if missing:
        said.append(
            f"No item is about {', '.join(missing)}, so that removal was not measured. An item names its concept in a "
            "field concept, or its task in metadata.concept; what names none counts as everything else."
        )
    if specificity["value"] is not None:
        said.append(
            f"Of everything else that was asked, {specificity['value']:.0%} is kept "
            f"({specificity['low']:.0%} to {specificity['high']:.0%}, {specificity['n']} items)."
        )
    if not any(row["used"] and row["group"] == "neighbour" for row in rows):
        said.append("Nothing was asked about neighbouring concepts, so harm close to the concept would not show.")
    few = [row["title"] for row in rows if row["used"] and row["scale"] == "accuracy" and row["n"] < 100]
    if few:
        said.append(
            f"Fewer than 100 items stand behind {'; '.join(few)}: differences of about "
            f"{100 / math.sqrt(min(row['n'] for row in rows if row['title'] in few)):.0f} points could be missed there."
        )
    unused = [row["title"] for row in rows if not row["used"]]
    if unused:
        said.append(f"Not used, because the base model is not above chance: {'; '.join(unused)}.")
    return said
