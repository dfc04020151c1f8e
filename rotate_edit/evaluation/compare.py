"""Two readings of the same items compared: the fractions kept, paired tests, and what may be concluded, in words."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rotate_edit.evaluation import generations, statistics
from rotate_edit.evaluation.harness import Scores, Settings
from rotate_edit.evaluation.statistics import Difference, Estimate, Measure

ROLES = ("concept", "neighbour", "general")
SIGNIFICANT = 0.05
KIND_WORDS = {"accuracy": "choice", "probability": "cloze", "perplexity": "perplexity"}


@dataclass(frozen=True)
class Plan:
    """What is asked.

    concepts: the edited concepts by the names the items know them under; neighbours: those that lie close; tasks:
    lm-eval tasks by name, as general abilities; items: at most this many items of each part (one concept's words,
    the neighbours' facts ...), None for all; settings: how lm-eval asks; raised: the concepts among them that the edit
    means to raise, whose removal is not measured; generations: how many neutral prompts are continued beside the
    concept's own; new_tokens: how long a continuation is; words: of the concepts, which are looked for in `samples`
    sampled continuations of every prompt (the leak rate); seed: of the bootstrap and of the sampling.
    """

    concepts: tuple[str, ...]
    neighbours: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    items: int | None = 240
    settings: Settings = field(default_factory=Settings)
    raised: tuple[str, ...] = ()
    generations: int = 5
    new_tokens: int = 40
    words: tuple[str, ...] = ()
    samples: int = 20
    seed: int = 0

    def raises(self, concept: str) -> bool:
        """Whether the edit means to raise a concept."""
        return concept.casefold() in {name.casefold() for name in self.raised}

    @property
    def lowered(self) -> tuple[str, ...]:
        """The concepts that the edit means to remove."""
        return tuple(name for name in self.concepts if not self.raises(name))

    @property
    def amplified(self) -> bool:
        """Whether the edit means to raise all of its concepts, so that no removal is measured."""
        return bool(self.concepts) and not self.lowered


@dataclass(frozen=True)
class Part:
    """Items of one task that are reported together: `rows` are their places among the task's items, concept the one
    that they are about where they are a concept's own."""

    task: str
    role: str
    title: str
    type: str
    rows: tuple[int, ...]
    concept: str = ""


@dataclass(frozen=True)
class Reading:
    """Everything measured on one model. The measures are None where there was nothing to measure them on.

    raised_probability: of the concepts that the edit means to raise, after neutral prompts; texts: its greedy
    continuation of each prompt; samples: its sampled ones; about: whether the prompt is about a concept, None for one
    that is raised beside others that are lowered.
    """

    scores: Mapping[str, Scores]
    first_token_kl: Measure | None = None
    collateral_kl: Measure | None = None
    concept_mass: Measure | None = None
    concept_probability: Measure | None = None
    raised_probability: Measure | None = None
    texts: tuple[str, ...] = ()
    samples: tuple[list[str], ...] = ()
    about: tuple[bool | None, ...] = ()


def compare(base: Reading, edited: Reading, parts: Sequence[Part], plan: Plan) -> dict[str, Any]:
    """One variant against the base: `summary`, `rows` (one a part), `measures` and `words`, all plain JSON."""
    rows, kept = [], {}
    for number, part in enumerate(parts):
        row, estimate = _compare_part(part, base.scores[part.task], edited.scores[part.task], plan)
        rows.append(row)
        if estimate is not None:
            kept[number] = estimate
    adjusted = statistics.holm([row["p"] if row["used"] else math.nan for row in rows])
    tests = sum(row["used"] for row in rows)
    for row, p in zip(rows, adjusted, strict=True):
        row["p_holm"] = p if math.isfinite(p) else None
        row["sentence"] = sentence(row, tests)
    summary = _summary(parts, kept, edited, plan)
    return {
        "summary": summary,
        "rows": rows,
        "measures": _measures(base, edited, plan),
        "words": conclusion(summary, rows, plan),
    }


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


def _summary(parts: Sequence[Part], kept: Mapping[int, Estimate], edited: Reading, plan: Plan) -> dict[str, Any]:
    by_role: dict[str, list[int]] = {role: [] for role in ROLES}
    for number in kept:
        by_role[parts[number].role].append(number)
    lowered = [number for number in by_role["concept"] if not plan.raises(parts[number].concept)]
    headline = _headline(lowered, parts, edited)
    general = [kept[number] for number in by_role["general"]]
    neighbours = [kept[number] for number in by_role["neighbour"]]
    removal = None
    if headline:
        removal = statistics.efficacy(statistics.mean_kept([kept[number] for number in headline]))
    rest = statistics.specificity(general, neighbours) if general or neighbours else None
    both = statistics.harmonic(removal, rest) if removal and rest else None
    # The base model against itself: nothing removed, everything kept.
    summary: dict[str, Any] = {
        name: _plain(statistics.measure(estimate).against(base) if estimate else None)
        for name, estimate, base in (("efficacy", removal, 0), ("specificity", rest, 1), ("harmonic", both, 0))
    }
    summary["first_token_kl"] = _plain(edited.first_token_kl)
    if edited.raised_probability is not None:
        summary["amplification"] = _plain(_ratio(edited.raised_probability))
    return summary


def _headline(numbers: Sequence[int], parts: Sequence[Part], edited: Reading) -> list[int]:
    """The concept's own parts that removal is read from: type A, else any accuracy, else cloze."""
    accurate = [number for number in numbers if edited.scores[parts[number].task].kind == "accuracy"]
    return [number for number in accurate if parts[number].type == "A"] or accurate or list(numbers)


def _ratio(measure: Measure) -> Measure:
    base = measure.baseline or math.nan
    return Measure(
        measure.value / base, measure.low / base, measure.high / base, measure.n, measure.standard_error / base, 1.0
    )


def _plain(measure: Measure | None) -> dict[str, Any]:
    return (measure or Measure(math.nan, math.nan, math.nan, 0, math.nan)).plain()


def _measures(base: Reading, edited: Reading, plan: Plan) -> dict[str, Any]:
    found: dict[str, Measure | None] = {
        "first_token_kl": edited.first_token_kl,
        "collateral_kl": edited.collateral_kl,
        "concept_mass": edited.concept_mass,
        "concept_mass_fraction": _ratio(edited.concept_mass) if edited.concept_mass else None,
        "concept_probability": edited.concept_probability,
    }
    if edited.texts:
        before, after = _written(base), _written(edited)
        found["repetition_4"] = generations.repetition(after).against(generations.repetition(before).value)
        found["distinct_2"] = generations.distinct(after).against(generations.distinct(before).value)
    if edited.samples:
        for name, about in (("leak_rate_asked", True), ("leak_rate_neutral", False)):
            before_after = [_samples(reading, about) for reading in (base, edited)]
            if before_after[0]:
                was, now = (generations.leak_rate(samples, plan.words) for samples in before_after)
                found[name] = now.against(was.value)
    return {name: measure.plain() for name, measure in found.items() if measure is not None}


def _written(reading: Reading) -> list[str]:
    return [text for texts in reading.samples for text in texts] or list(reading.texts)


def _samples(reading: Reading, about: bool) -> list[list[str]]:
    return [texts for texts, asked in zip(reading.samples, reading.about, strict=True) if asked == about]


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
    names = ", ".join(plan.lowered)
    own = [row for row in rows if row["used"] and row["group"] == "concept" and not plan.raises(row["concept"])]
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
    elif plan.lowered:
        said.append(f"Removal of {names} was not measured: no task on it has a base accuracy above chance.")
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


# Gates.


def failed_gates(
    summary: Mapping[str, Any], *, minimum: Mapping[str, float] = {}, maximum: Mapping[str, float] = {}
) -> list[str]:
    """The gates that fail, one sentence each: every named number must be there and on the right side of its bound.

    summary: of an evaluation; minimum and maximum: bounds by name ("efficacy", "specificity", "harmonic",
    "first_token_kl").
    """
    failures = []
    for bounds, holds, wanted in (
        (minimum, lambda value, bound: value >= bound, "at least"),
        (maximum, lambda value, bound: value <= bound, "at most"),
    ):
        for name, bound in bounds.items():
            value = (summary.get(name) or {}).get("value")
            if value is None:
                failures.append(f"{name} was not measured, and {wanted} {bound:g} is asked for.")
            elif not holds(value, bound):
                failures.append(f"{name} is {value:.4g}, and {wanted} {bound:g} is asked for.")
    return failures
