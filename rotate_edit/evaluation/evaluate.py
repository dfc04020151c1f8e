"""Base against edited on the same items: what was removed, what was kept, and what may be concluded."""

import importlib.metadata
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from torch import Tensor

from rotate_edit.console import Report, silent
from rotate_edit.evaluation import harness as scoring
from rotate_edit.evaluation import measures
from rotate_edit.evaluation.compare import ROLES, Part, Plan, Reading, compare
from rotate_edit.evaluation.harness import Scores
from rotate_edit.evaluation.tasks import Items, Row, Task
from rotate_edit.evaluation.variants import Variant, opened
from rotate_edit.models import batches, fingerprint, generation

VERSION = 1
TYPES = {"A": "words (type A)", "B": "facts (type B)"}


@dataclass(frozen=True)
class Evaluation:
    """What was found: `result` is plain JSON (evaluation.json); `items` holds every item's score, by model and task."""

    result: dict[str, Any]
    items: dict[str, dict[str, list[float]]]


def evaluate(
    model: Any,
    tokenizer: Any,
    variants: Sequence[Variant],
    plan: Plan,
    items: Items | None = None,
    *,
    concept_ids: Tensor | None = None,
    raised_ids: Tensor | None = None,
    weights_hash: str | None = None,
    cache: Path | None = None,
    report: Report = silent,
) -> Evaluation:
    """Measure the base model, then every variant on the same items, in one process.

    model, tokenizer: the loaded base, nothing switched on; concept_ids: int64 [k], the tokens of the edited concepts
    (for probability mass), of those that are lowered where others are raised, whose tokens are raised_ids; cache: a
    folder in which the base's scores are kept for the next run, under weights_hash (of the base; computed from the
    loaded weights when it is not given). Variants that are edits or adapters are switched on and off in the base's own
    weights; whole checkpoints are loaded one after another. Raises BadInput when a task cannot be loaded or a variant
    does not fit the base.
    """
    started = time.monotonic()
    local, parts = divide(items.tasks if items else (), plan)
    tasks = (*local, *(Task(name) for name in plan.tasks))
    harness = scoring.open_harness(tasks, plan.settings)
    raised_ids = concept_ids if plan.amplified else raised_ids
    known = _known(model, tokenizer, items, plan, concept_ids, raised_ids)
    prompts = _prompts(items, plan)
    scores, cached = _base_scores(harness, tasks, model, tokenizer, weights_hash, cache, report)
    base = _write(model, tokenizer, prompts, plan, Reading(scores))
    seconds = {"base": time.monotonic() - started}
    readings = {}
    for variant in variants:
        began = time.monotonic()
        with opened(model, variant) as edited:
            scores = scoring.score(harness, edited, tokenizer, report=report, step=f"evaluate {variant.name}")
            readings[variant.name] = _write(edited, tokenizer, prompts, plan, _read(edited, scores, known))
        seconds[variant.name] = time.monotonic() - began
    parts = (*parts, *(_whole_task(base.scores[name]) for name in plan.tasks))
    found = _evaluation(base, readings, parts, plan)
    found.result.update(
        _asked(items, tasks),
        cached_baseline=cached,
        seconds=seconds,
        generations=side_by_side(prompts, base, readings),
    )
    return found


def evaluate_checkpoints(
    base: Path,
    variants: Mapping[str, Path],
    plan: Plan,
    items: Items | None = None,
    *,
    backend: str,
    options: Mapping[str, Any] | None = None,
    report: Report = silent,
) -> Evaluation:
    """Score whole checkpoints on one of lm-eval's other backends, for instance "vllm", one after another.

    Only lm-eval's tasks are measured: KL, probability mass and generations need a model in this process. options: for
    the backend. Raises BadInput when the backend is not installed or cannot load a checkpoint.
    """
    local, parts = divide(items.tasks if items else (), plan)
    tasks = (*local, *(Task(name) for name in plan.tasks))
    harness = scoring.open_harness(tasks, plan.settings)
    readings = {}
    for name, folder in {"base": base, **variants}.items():
        scores = scoring.score_checkpoint(
            harness, folder, backend, options or {}, report=report, step=f"evaluate {name}"
        )
        readings[name] = Reading(scores)
    first = readings.pop("base")
    parts = (*parts, *(_whole_task(first.scores[name]) for name in plan.tasks))
    found = _evaluation(first, readings, parts, plan)
    found.result.update(_asked(items, tasks))
    return found


def _asked(items: Items | None, tasks: Sequence[Task]) -> dict[str, Any]:
    return {
        "items": items.name if items else None,
        "definitions": {task.name: {"version": task.version, "content": task.content_hash()} for task in tasks},
    }


def _evaluation(base: Reading, readings: Mapping[str, Reading], parts: Sequence[Part], plan: Plan) -> Evaluation:
    everyone = {"base": base, **readings}
    result: dict[str, Any] = {
        "version": VERSION,
        "plan": asdict(plan) | {"amplified": plan.amplified},
        "versions": {name: importlib.metadata.version(name) for name in ("lm_eval", "torch", "transformers")},
        "lm_eval": {
            name: {task: dict(scores.aggregates) for task, scores in reading.scores.items()}
            for name, reading in everyone.items()
        },
        "variants": {name: compare(base, reading, parts, plan) for name, reading in readings.items()},
    }
    if readings:
        # The first variant is the run's own edit; reports read its numbers from here.
        first = next(iter(result["variants"].values()))
        result |= {"summary": first["summary"], "tasks": first["rows"]}
    every_item = {
        name: {task: list(scores.values) for task, scores in reading.scores.items()}
        for name, reading in everyone.items()
    }
    return Evaluation(result, every_item)


# Which items are asked, and what they stand for.


def divide(tasks: Sequence[Task], plan: Plan) -> tuple[tuple[Task, ...], tuple[Part, ...]]:
    """Choose the items and divide them into parts: the edited concepts, their neighbours, everything else.

    Items without a concept are general. A part that has more than `plan.items` takes them from its concepts in
    turn, always the same ones. Returns the tasks with the chosen items, and the parts over those.
    """
    chosen, parts = [], []
    for task in tasks:
        groups: dict[tuple[str, str, str], list[int]] = {}
        for place, row in enumerate(task.rows):
            role, concept = _role(row, plan)
            groups.setdefault((role, concept, str(row.get("type", ""))), []).append(place)
        rows: list[Row] = []
        for (role, concept, kind), places in sorted(groups.items(), key=lambda group: ROLES.index(group[0][0])):
            taken = _in_turn(places, [str(task.rows[place].get("concept", "")) for place in places])[: plan.items]
            numbers = tuple(range(len(rows), len(rows) + len(taken)))
            rows += [task.rows[place] for place in taken]
            about_something = any(task.rows[place].get("concept") for place in taken)
            title = _title(task, role, concept, kind, about_something)
            parts.append(Part(task.name, role, title, kind, numbers, concept))
        chosen.append(task.with_rows(rows))
    return tuple(chosen), tuple(parts)


def _role(row: Row, plan: Plan) -> tuple[str, str]:
    concept = str(row.get("concept", ""))
    edited = {name.casefold() for name in plan.concepts}
    if concept.casefold() in edited:
        return ("neighbour", "") if row.get("role") == "neighbour" else ("concept", concept)
    close = {name.casefold() for name in plan.neighbours}
    return ("neighbour", "") if concept.casefold() in close else ("general", "")


def _in_turn(places: Sequence[int], concepts: Sequence[str]) -> list[int]:
    lists: dict[str, list[int]] = {}
    for place, concept in zip(places, concepts, strict=True):
        lists.setdefault(concept, []).append(place)
    return [place for turn in zip_longest(*lists.values()) for place in turn if place is not None]


def _title(task: Task, role: str, concept: str, kind: str, about_something: bool) -> str:
    if not about_something:
        return task.name
    whose = {"concept": concept, "neighbour": "neighbours", "general": "everything else"}[role]
    if kind:
        return f"{whose}: {TYPES.get(kind, f'{kind} ({task.name})')}"
    return f"{whose}: {'cloze' if task.kind == 'probability' else task.name}"


def _whole_task(scores: Scores) -> Part:
    return Part(scores.task, "general", scores.task, "", tuple(range(len(scores.values))))


# Measuring one model.


def _base_scores(
    harness: scoring.Harness,
    tasks: Sequence[Task],
    model: Any,
    tokenizer: Any,
    weights_hash: str | None,
    cache: Path | None,
    report: Report,
) -> tuple[dict[str, Scores], bool]:
    keys: dict[str, str | None] = {}
    if cache is not None and tasks:
        weights = weights_hash or fingerprint.model_hash(model)
        keys = {task.name: scoring.cache_key(task, harness.settings, model, weights, tokenizer) for task in tasks}
    found: dict[str, Scores] = {}
    for name, key in keys.items():
        kept = scoring.read_cached(cache, key) if cache and key else None
        if kept is not None:
            found[name] = kept
    missing = [task.name for task in tasks if task.name not in found]
    if missing:
        rest = replace(harness, loaded={name: harness.loaded[name] for name in missing})
        scored = scoring.score(rest, model, tokenizer, report=report, step="evaluate base")
        for name, scores in scored.items():
            key = keys.get(name)
            if cache and key:
                scoring.write_cached(cache, key, scores)
        found |= scored
    return {task.name: found[task.name] for task in tasks}, bool(tasks) and not missing


@dataclass(frozen=True)
class _Known:
    reference: measures.Reference | None
    prompts: batches.Passages | None
    prompts_base: Tensor | None
    concept_ids: Tensor | None
    raised_ids: Tensor | None


def _known(
    model: Any,
    tokenizer: Any,
    items: Items | None,
    plan: Plan,
    concept_ids: Tensor | None,
    raised_ids: Tensor | None,
) -> _Known:
    if items is None:
        return _Known(None, None, None, concept_ids, raised_ids)
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    found = None
    others = texts_about(items, plan.concepts)[1]
    own = texts_about(items, plan.lowered or plan.concepts)[0]
    if concept_ids is not None and own and others:
        found = measures.reference(
            model, tokenizer, concept_ids, concept_texts=own, other_texts=others, longest=longest
        )
    prompts = None
    if items.prompts:
        prompts = batches.tokenise(tokenizer, items.prompts, vocabulary_size=config.vocab_size, longest=longest)
    base = measures.last_position(model, prompts) if prompts else None
    return _Known(found, prompts, base, concept_ids, raised_ids)


def texts_about(items: Items, concepts: Sequence[str], split: str = "test") -> tuple[list[str], list[str]]:
    """Texts of a split that are about one of the concepts, and texts that hold none of their words.

    The latter come from all other concepts in turn. Both are empty when the items have no such split.
    """
    rows = items.texts.get(split, ())
    edited = {name.casefold() for name in concepts}

    def named(row: Row) -> set[str]:
        return {str(name).casefold() for name in (row.get("concept"), *row.get("contains", ())) if name}

    own = [row["text"] for row in rows if str(row.get("concept") or "").casefold() in edited]
    free = [row for row in rows if not named(row) & edited]
    order = _in_turn(range(len(free)), [str(row.get("concept")) for row in free])
    return own, [free[place]["text"] for place in order]


def _read(model: Any, scores: Mapping[str, Scores], known: _Known) -> Reading:
    first = probability = raised = mass = collateral = None
    if known.prompts is not None and known.prompts_base is not None:
        first = measures.first_token_kl(model, known.prompts, known.prompts_base)
        if known.concept_ids is not None:
            probability = measures.concept_probability(model, known.prompts, known.concept_ids, known.prompts_base)
        if known.raised_ids is not None:
            raised = measures.concept_probability(model, known.prompts, known.raised_ids, known.prompts_base)
    if known.reference is not None:
        kept = known.reference
        mass = measures.concept_mass(model, kept.concept, kept.concept_ids, kept.concept_mass)
        collateral = measures.collateral_kl(model, kept.others, kept.others_base)
    return Reading(scores, first, collateral, mass, probability, raised)


def _prompts(items: Items | None, plan: Plan) -> list[Row]:
    rows = items.generation if items else ()
    edited = {name.casefold() for name in plan.concepts}
    own = [row for row in rows if str(row.get("concept") or "").casefold() in edited]
    return [*own, *[row for row in rows if not row.get("concept")][: plan.generations]]


def _write(model: Any, tokenizer: Any, prompts: Sequence[Row], plan: Plan, reading: Reading) -> Reading:
    """Add what the model writes: greedy continuations of the prompts, and samples for the leak rate."""
    if not prompts:
        return reading
    asked = [row["prompt"] for row in prompts]
    greedy = generation.generate(model, tokenizer, asked, new_tokens=plan.new_tokens)
    samples: tuple[list[str], ...] = ()
    if plan.words and plan.samples:
        drawn = generation.generate(
            model, tokenizer, asked, new_tokens=plan.new_tokens, samples=plan.samples, seed=plan.seed
        )
        samples = tuple(drawn)
    asked_of = {name.casefold() for name in plan.lowered or plan.concepts}
    named = [str(row.get("concept") or "").casefold() for row in prompts]
    about = tuple(name in asked_of if name in asked_of or not name else None for name in named)
    return replace(reading, texts=tuple(texts[0] for texts in greedy), samples=samples, about=about)


def side_by_side(prompts: Sequence[Row], base: Reading, readings: Mapping[str, Reading]) -> list[dict[str, Any]]:
    """The continuations of every prompt: prompt, about (its concept; None when neutral), base, edited (the first
    variant's) and variants (all of them by name)."""
    rows = []
    for place, row in enumerate(prompts):
        texts = {name: reading.texts[place] for name, reading in readings.items()}
        rows.append(
            {
                "prompt": row["prompt"],
                "about": row.get("concept"),
                "base": base.texts[place],
                "edited": next(iter(texts.values()), None),
                "variants": texts,
            }
        )
    return rows
