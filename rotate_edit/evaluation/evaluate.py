"""Base against edited on the same items: what was removed, what was kept, and what may be concluded."""

import importlib.metadata
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from rotate_edit.console import Report, silent
from rotate_edit.evaluation import harness as scoring
from rotate_edit.evaluation.compare import Part, Plan, compare_parts, conclusion
from rotate_edit.evaluation.harness import Harness, Scores
from rotate_edit.evaluation.items import divide, texts_about, whole_task
from rotate_edit.evaluation.metrics import MeasuredModel, all_metrics
from rotate_edit.evaluation.statistics import Measure
from rotate_edit.evaluation.tasks import Items, Row, Task
from rotate_edit.evaluation.variants import Variant, opened
from rotate_edit.models import fingerprint, generation

__all__ = ["Evaluation", "divide", "evaluate", "evaluate_checkpoints", "side_by_side", "texts_about"]

VERSION = 1
NOT_MEASURED = Measure(math.nan, math.nan, math.nan, 0, math.nan)


@dataclass(frozen=True)
class Evaluation:
    """What was found.

    Attributes:
        result: Plain JSON, the content of evaluation.json.
        items: Every item's score, by model and task.
    """

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
    amplified_ids: Tensor | None = None,
    weights_hash: str | None = None,
    cache: Path | None = None,
    report: Report = silent,
) -> Evaluation:
    """Measure the base model, then every variant on the same items, in one process.

    Variants that are edits or adapters are switched on and off in the base's own weights. Whole checkpoints are loaded
    one after another.

    Args:
        model: The loaded base, nothing switched on.
        tokenizer: Its tokenizer.
        variants: The edited models.
        plan: What is asked.
        items: The items, texts and prompts. None asks lm-eval's own tasks alone.
        concept_ids: Tokens of the edited concepts, for probability mass, int64 [k]. Of the suppressed ones where
            others are amplified.
        amplified_ids: Tokens of the amplified concepts, where others are suppressed, int64 [k].
        weights_hash: Of the base. Computed from the loaded weights when it is not given.
        cache: A folder in which the base's scores are kept for the next run.
        report: Is told how far it is.

    Raises:
        BadInput: A task cannot be loaded, or a variant does not fit the base.
    """
    started = time.monotonic()
    local, parts = divide(items.tasks if items else (), plan)
    tasks = (*local, *(Task(name) for name in plan.tasks))
    harness = scoring.open_harness(tasks, plan.settings)
    amplified_ids = concept_ids if plan.only_amplifies else amplified_ids
    scores, cached = _base_scores(harness, tasks, model, tokenizer, weights_hash, cache, report)
    base = MeasuredModel(plan, scores, model, tokenizer, items, concept_ids, amplified_ids)
    parts = (*parts, *(whole_task(base.scores[name]) for name in plan.tasks))
    known = {}
    for done, metric in enumerate(all_metrics()):
        report("measure base", done, len(all_metrics()))
        known[metric.name] = metric.prepare(base)
    prompts = _prompts(items, plan)
    base = _write(base, prompts, report, "write with base")
    seconds = {"base": time.monotonic() - started}
    compared, everyone = {}, {"base": base}
    for variant in variants:
        began = time.monotonic()
        with opened(model, variant) as edited:
            scores = scoring.score(harness, edited, tokenizer, report=report, step=f"evaluate {variant.name}")
            after = MeasuredModel(plan, scores, edited, tokenizer, items)
            after = _write(after, prompts, report, f"write with {variant.name}")
            compared[variant.name] = _compared(base, after, parts, known, report, f"measure {variant.name}")
        everyone[variant.name] = after
        seconds[variant.name] = time.monotonic() - began
    found = _evaluation(everyone, compared, plan)
    found.result.update(
        _asked(items, tasks),
        cached_baseline=cached,
        seconds=seconds,
        generations=side_by_side(prompts, everyone),
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

    Only lm-eval's tasks are measured. KL, probability mass and generations need a model in this process.

    Args:
        base: The base's folder.
        variants: The edited checkpoints' folders by name.
        plan: What is asked.
        items: The items.
        backend: lm-eval's name of it.
        options: Further arguments of the backend.
        report: Is told how far it is.

    Raises:
        BadInput: The backend is not installed, or it cannot load a checkpoint.
    """
    local, parts = divide(items.tasks if items else (), plan)
    tasks = (*local, *(Task(name) for name in plan.tasks))
    harness = scoring.open_harness(tasks, plan.settings)
    everyone = {}
    for name, folder in {"base": base, **variants}.items():
        scores = scoring.score_checkpoint(
            harness, folder, backend, options or {}, report=report, step=f"evaluate {name}"
        )
        everyone[name] = MeasuredModel(plan, scores)
    first = everyone["base"]
    parts = (*parts, *(whole_task(first.scores[name]) for name in plan.tasks))
    compared = {name: _compared(first, everyone[name], parts, {}) for name in variants}
    found = _evaluation(everyone, compared, plan)
    found.result.update(_asked(items, tasks))
    return found


def _compared(
    base: MeasuredModel,
    edited: MeasuredModel,
    parts: Sequence[Part],
    known: Mapping[str, Any],
    report: Report = silent,
    step: str = "",
) -> dict[str, Any]:
    """One variant against the base: `summary`, `rows` (one a part), `measures` and `words`, all plain JSON."""
    rows, kept = compare_parts(parts, base.scores, edited.scores, base.plan)
    edited = replace(edited, parts=parts, kept=kept)
    summary, found = {}, {}
    for done, metric in enumerate(all_metrics()):
        report(step, done, len(all_metrics()))
        measure = metric.measure(edited, base, known.get(metric.name))
        if measure is not None:
            found[metric.name] = measure.plain()
        if metric.headline:
            summary[metric.name] = (measure or NOT_MEASURED).plain()
    return {
        "summary": summary,
        "rows": rows,
        "measures": found,
        "words": conclusion(summary, rows, base.plan),
    }


def _asked(items: Items | None, tasks: Sequence[Task]) -> dict[str, Any]:
    return {
        "items": items.name if items else None,
        "definitions": {task.name: {"version": task.version, "content": task.content_hash()} for task in tasks},
    }


def _evaluation(everyone: Mapping[str, MeasuredModel], compared: Mapping[str, Any], plan: Plan) -> Evaluation:
    result: dict[str, Any] = {
        "version": VERSION,
        "plan": asdict(plan) | {"only_amplifies": plan.only_amplifies},
        "versions": {name: importlib.metadata.version(name) for name in ("lm_eval", "torch", "transformers")},
        "lm_eval": {
            name: {task: dict(scores.aggregates) for task, scores in model.scores.items()}
            for name, model in everyone.items()
        },
        "variants": dict(compared),
    }
    if compared:
        # The first variant is the run's own edit; reports read its numbers from here.
        first = next(iter(compared.values()))
        result |= {"summary": first["summary"], "tasks": first["rows"]}
    every_item = {
        name: {task: list(scores.values) for task, scores in model.scores.items()} for name, model in everyone.items()
    }
    return Evaluation(result, every_item)


# Measuring one model.


def _base_scores(
    harness: Harness,
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


def _prompts(items: Items | None, plan: Plan) -> list[Row]:
    rows = items.generation if items else ()
    edited = {name.casefold() for name in plan.concepts}
    own = [row for row in rows if str(row.get("concept") or "").casefold() in edited]
    return [*own, *[row for row in rows if not row.get("concept")][: plan.generations]]


def _write(model: MeasuredModel, prompts: Sequence[Row], report: Report, step: str) -> MeasuredModel:
    """Add what the model writes: greedy continuations of the prompts, and samples for the leak rate."""
    if not prompts:
        return model
    report(step, 0, 1 + model.plan.samples)
    plan, asked = model.plan, [row["prompt"] for row in prompts]
    greedy = generation.generate(model.model, model.tokenizer, asked, new_tokens=plan.new_tokens)
    samples: tuple[list[str], ...] = ()
    report(step, 1, 1 + plan.samples)
    if plan.words and plan.samples:
        drawn = generation.generate(
            model.model, model.tokenizer, asked, new_tokens=plan.new_tokens, samples=plan.samples, seed=plan.seed
        )
        samples = tuple(drawn)
    report(step, 1 + plan.samples, 1 + plan.samples)
    asked_of = {name.casefold() for name in plan.suppressed or plan.concepts}
    named = [str(row.get("concept") or "").casefold() for row in prompts]
    about = tuple(name in asked_of if name in asked_of or not name else None for name in named)
    return replace(model, texts=tuple(texts[0] for texts in greedy), samples=samples, about=about)


def side_by_side(prompts: Sequence[Row], everyone: Mapping[str, MeasuredModel]) -> list[dict[str, Any]]:
    """The continuations of every prompt by all models.

    Args:
        prompts: The rows that were continued.
        everyone: The base under "base", then the variants by name.

    Returns:
        For each prompt: prompt, about (its concept; None when neutral), base, edited (the first variant's) and variants
        (all of them by name).
    """
    rows = []
    for place, row in enumerate(prompts):
        texts = {name: model.texts[place] for name, model in everyone.items() if name != "base"}
        rows.append(
            {
                "prompt": row["prompt"],
                "about": row.get("concept"),
                "base": everyone["base"].texts[place],
                "edited": next(iter(texts.values()), None),
                "variants": texts,
            }
        )
    return rows
