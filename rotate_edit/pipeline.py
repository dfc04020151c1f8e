"""Recipe in, run folder out: locate, decompose, select, edit, patch, evaluate, report.

No formula stands here and nothing is computed twice: every step is one call of the room that knows it.
"""

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from rotate_edit.channels.channel_set import save_channels
from rotate_edit.channels.locate import Located, by_concept, locate_concept, solver_settings
from rotate_edit.console import Report, silent
from rotate_edit.edits.build import edits_of, fit
from rotate_edit.edits.edit import SAMPLED, Edit
from rotate_edit.edits.edit_file import save_edit
from rotate_edit.edits.writing.adapter import write_adapter
from rotate_edit.edits.writing.patch import write_checkpoint
from rotate_edit.errors import BadInput, Failure
from rotate_edit.evaluation import curves, measures
from rotate_edit.evaluation.compare import Plan
from rotate_edit.evaluation.evaluate import Variant, evaluate, texts_about
from rotate_edit.evaluation.harness import Settings
from rotate_edit.evaluation.provenance import peak_memory, provenance, weights_hash
from rotate_edit.evaluation.text_tasks import save_items
from rotate_edit.files import cache_folder, check_output_free, plain, whole_folder, write_atomically
from rotate_edit.models.checkpoint import identity
from rotate_edit.recipe import ConceptRecipe, Recipe, recipe_text
from rotate_edit.reporting.card import write_cards
from rotate_edit.reporting.report import write_report
from rotate_edit.reporting.reproduce import write_reproduction
from rotate_edit.session import Opened, open_recipe
from rotate_edit.vocabulary.concept import TokenSet
from rotate_edit.vocabulary.projection import read_projections

FORMAT = 1
# Divisions of a concept into groups that `group_distance: auto` tries; the first keeps it whole.
GROUP_DISTANCES = (2.0, 0.7, 0.5)
# These methods have nothing to do for a concept that no channel carries.
LOCATED_METHODS = (
    "channel-located",
    "channel-keyed",
    "random-keyed",
    "project-channel",
    "zero-neurons",
    "random-neurons",
)


def locate(opened: Opened, model: Any = None, report: Report = silent) -> tuple[Located, ...]:
    """Find the neurons that carry each concept of the recipe: one entry for each group of a concept's tokens.

    model: the loaded base, for `group_distance: auto`, which takes the division into groups whose edit does least
    damage at `edit.target` on the items' `choose` texts; without a model or such texts, and for keyed methods, which
    fit every place where the concept comes next, a concept is one group.
    """
    recipe = opened.recipe
    projections = read_projections(opened.checkpoint, opened.vocabulary, opened.device)
    wanted = recipe.locate.group_distance
    found: list[Located] = []
    for place, (concept, tokens) in enumerate(zip(recipe.concepts, opened.tokens)):

        def at(
            distance: float, concept: ConceptRecipe = concept, tokens: TokenSet = tokens, place: int = place
        ) -> list[Located]:
            def named(step: str, done: int, total: int) -> None:
                report(f"{step} {concept.name}, groups at {distance:g}", done, total)

            return locate_concept(
                opened.checkpoint, recipe, projections, opened.vocabulary, concept, tokens, distance, place, named
            )

        if wanted != "auto":
            found += at(wanted)
        elif model is None or opened.items is None or recipe.edit.method in SAMPLED:
            found += at(GROUP_DISTANCES[0])
        else:
            found += _least_damage(opened, [at(distance) for distance in GROUP_DISTANCES], model)
    return tuple(found)


def _least_damage(opened: Opened, divisions: Sequence[list[Located]], model: Any) -> list[Located]:
    """The division of one concept into groups whose edit costs least on the texts for choosing, at equal removal.

    Groups must at least halve the damage to be preferred to the whole concept, which needs fewer ranks and neurons.
    """
    known = reference(opened, divisions[0][0], model, "validation")
    costs = []
    for groups in divisions:
        cost = math.inf
        if known is not None and any(located.chosen for located in groups):
            method = opened.recipe.edit.method
            edit = edits_of(opened, groups, [method], model)[method]
            cost = curves.cost_of_removal(model, known, edit, opened.recipe.edit.target)
        costs.append(cost if groups is divisions[0] else 2 * cost)
    return divisions[costs.index(min(costs))]


def run(
    recipe: Recipe, output: Path, *, overwrite: bool = False, allow_code: bool = False, report: Report = silent
) -> dict[str, Any]:
    """The whole pipeline: leaves a run folder and returns the content of its evaluation.json.

    allow_code: let the definitions of the items run code that they bring along. Raises BadInput before anything is
    written, and Failure when nothing was located; the run folder then holds the recipe, the channels and a report that
    says why, and no checkpoint.
    """
    check_output_free(output, overwrite=overwrite)
    opened = open_recipe(recipe, output, allow_code=allow_code)
    seconds: dict[str, float] = {}
    with whole_folder(output, overwrite=overwrite) as folder:
        write_atomically(folder / "recipe.yaml", recipe_text(recipe))
        model = opened.load_base()
        with _timed(seconds, "locate"):
            found = locate(opened, model, report)
        result = _describe(opened, found, seconds) | {"warnings": list(opened.notes)}
        _save_channels(opened, found, folder)
        if opened.items is not None and recipe.evaluate.text is not None:
            save_items(opened.items, folder / "items")
        failure = _why_nothing(found) if _is_missing(recipe, found) else None
        if failure is None:
            _edit_and_measure(opened, found, model, folder, result, seconds, report)
        else:
            result["failure"] = failure
        result["cost"] = {"seconds": seconds, "peak_memory_mb": peak_memory()}
        result = plain(result)
        write_atomically(folder / "evaluation.json", json.dumps(result, indent=1, allow_nan=False))
        write_report(folder)
        write_reproduction(folder, recipe, result)
        if failure is None:
            write_cards(folder)
    if failure is not None:
        raise Failure(f"{failure} The report in {output} says what was looked at.")
    return result


def edit_only(
    recipe: Recipe,
    output: Path,
    *,
    checkpoint: bool = True,
    adapter: bool = False,
    overwrite: bool = False,
    report: Report = silent,
) -> tuple[Edit, list[str]]:
    """Locate and edit without evaluating: leaves recipe.yaml, channels/, edit/ and what was asked for.

    Returns the edit and what the user should know about the words and about what was written. Raises BadInput before
    anything is written, and Failure when nothing was located.
    """
    check_output_free(output, overwrite=overwrite)
    opened = open_recipe(recipe, output, measured=False)
    model = opened.load_base() if opened.items else None
    found = locate(opened, model, report)
    if _is_missing(recipe, found):
        raise Failure(_why_nothing(found))
    method = recipe.edit.method
    fitted = fit(opened, found, [method], model)
    edit = edits_of(opened, found, [method], model, fitted)[method]
    if any(concept.strength == "auto" for concept in recipe.concepts):
        solved = at_strengths(found, solve_strengths(opened, found, edit, model))
        edit = edits_of(opened, solved, [method], model, fitted)[method]
    with whole_folder(output, overwrite=overwrite) as folder:
        write_atomically(folder / "recipe.yaml", recipe_text(recipe))
        _save_channels(opened, found, folder)
        saved = _save_edit(opened, edit, folder, checkpoint=checkpoint, adapter=adapter)
        write_cards(folder)
    return edit, opened.warnings() + saved["warnings"]


def _save_edit(opened: Opened, edit: Edit, folder: Path, *, checkpoint: bool, adapter: bool) -> dict[str, Any]:
    """Write the edit and what is wanted of it; returns what rounding did, what was left out and warnings, as JSON."""
    save_edit(edit, folder / "edit")
    saved: dict[str, Any] = {"rounding": None, "left_out": [], "warnings": []}
    if checkpoint:
        patch = write_checkpoint(
            opened.checkpoint, edit, folder / "model", edit_folder=folder / "edit", undo=opened.recipe.save.undo
        )
        saved = {
            "rounding": asdict(patch.rounding()),
            "left_out": list(patch.left_out),
            "warnings": list(patch.warnings),
        }
    if adapter:
        saved["warnings"] += write_adapter(opened.checkpoint, edit, folder / "adapter").warnings
    return saved


def _is_missing(recipe: Recipe, found: Sequence[Located]) -> bool:
    nothing = [name for name, groups in by_concept(found).items() if not any(located.chosen for located in groups)]
    return recipe.edit.method in LOCATED_METHODS and bool(nothing)


def _edit_and_measure(
    opened: Opened,
    found: Sequence[Located],
    model: Any,
    folder: Path,
    result: dict[str, Any],
    seconds: dict[str, float],
    report: Report,
) -> None:
    recipe = opened.recipe
    method = recipe.edit.method
    with _timed(seconds, "build edits"):
        methods = list(dict.fromkeys([method, *recipe.evaluate.controls]))
        fitted = fit(opened, found, methods, model)
        edits = edits_of(opened, found, methods, model, fitted)
    with _timed(seconds, "curves"):
        strengths = solve_strengths(opened, found, edits[method], model)
        drawn = {}
        for name, groups in by_concept(found).items():
            known = reference(opened, groups[0], model, "test")
            if known is not None:
                own = {other: curves.only(edit, name) for other, edit in edits.items()}
                drawn[name] = curves.draw(model, known, own, recipe.evaluate.strengths, strengths[name], report)
    edit = edits_of(opened, at_strengths(found, strengths), [method], model, fitted)[method]
    result["curves"], result["chosen_method"] = drawn, method
    removed = {name: points for name, points in drawn.items() if strengths[name] > 0}
    result["matched"] = {name: curves.matched_table(points, method) for name, points in removed.items()}
    for entry in result["concepts"]:
        entry["strength"] = strengths[entry["name"]]
    result["neurons"] = [asdict(vector) for vector in edit.vectors]
    with _timed(seconds, "save"):
        result["saved"] = _save_edit(
            opened, edit, folder, checkpoint=recipe.save.checkpoint, adapter=recipe.save.adapter
        )
    with _timed(seconds, "evaluate"):
        result.update(_asked(opened, edit, strengths, model, report))


def _asked(opened: Opened, edit: Edit, strengths: dict[str, float], model: Any, report: Report) -> dict[str, Any]:
    """What lm-eval and the live measures say of an edit: the evaluation's part of the result."""
    recipe = opened.recipe
    raised = tuple(name for name, strength in strengths.items() if strength < 0)
    lowered = [concept for concept in recipe.concepts if concept.name not in raised] or recipe.concepts
    plan = Plan(
        concepts=tuple(concept.name for concept in recipe.concepts),
        neighbours=tuple(name for concept in recipe.concepts for name in concept.neighbours),
        tasks=tuple(recipe.evaluate.tasks),
        items=recipe.evaluate.limit or 240,
        settings=Settings(batch_size=recipe.evaluate.batch_size, limit=recipe.evaluate.limit),
        raised=raised,
        words=tuple(word for concept in lowered for word in concept.words),
        seed=recipe.seed,
    )
    names = {concept.name for concept in lowered}
    upwards = [tokens.ids for tokens in opened.tokens if tokens.name in raised]
    evaluation = evaluate(
        model,
        opened.tokenizer,
        [Variant("edited", edit)],
        plan,
        opened.items,
        concept_ids=torch.cat([tokens.ids for tokens in opened.tokens if tokens.name in names]).unique(),
        raised_ids=torch.cat(upwards).unique() if upwards else None,
        weights_hash=weights_hash(opened.checkpoint),
        cache=cache_folder(),
        report=report,
    )
    return evaluation.result


def reference(opened: Opened, located: Located, model: Any, split: str) -> measures.Reference | None:
    """The base model's answers on one split of the items' texts, or None when they hold nothing about the concept."""
    if opened.items is None:
        return None
    own, others = texts_about(opened.items, [located.concept.name], split)
    if not own or not others:
        return None
    return measures.reference(
        model,
        opened.tokenizer,
        located.tokens.ids,
        concept_texts=own,
        other_texts=others,
        prompts=opened.items.prompts,
        longest=getattr(model.config.get_text_config(), "max_position_embeddings", None),
        token_limit=opened.recipe.evaluate.tokens,
    )


def solve_strengths(opened: Opened, found: Sequence[Located], edit: Edit, model: Any) -> dict[str, float]:
    """Each concept's strength: the recipe's number, or for `auto` the one that reaches `edit.target`.

    It is solved on the items' `choose` texts, which the report never shows.
    """
    solved = {}
    for name, groups in by_concept(found).items():
        strength = groups[0].concept.strength
        if strength == "auto":
            known = reference(opened, groups[0], model, "validation") or reference(opened, groups[0], model, "test")
            if known is None:
                raise BadInput(f"concepts.{name}.strength: auto, but the items hold no text about it; give a number.")
            strength = curves.solve_strength(model, known, curves.only(edit, name), opened.recipe.edit.target)
        solved[name] = float(strength)
    return solved


def at_strengths(found: Sequence[Located], strengths: dict[str, float]) -> list[Located]:
    """What was located, with the strengths that were solved for in place of `auto`."""
    return [
        replace(located, concept=located.concept.model_copy(update={"strength": strengths[located.concept.name]}))
        for located in found
    ]


def _describe(opened: Opened, found: Sequence[Located], seconds: dict[str, float]) -> dict[str, Any]:
    checkpoint = opened.checkpoint
    return {
        "format": FORMAT,
        "concepts": [_describe_concept(opened, groups) for groups in by_concept(found).values()],
        "selected_channels": [
            {
                "name": channel.name,
                "concept": located.concept.name,
                "tokens": list(channel.tokens),
                "z_scores": list(channel.z_scores),
                "kurtosis": channel.kurtosis,
                "cosine": channel.cosine,
                "support": channel.support,
                "sign": channel.sign,
            }
            for located in found
            for channel in located.chosen
        ],
        "model": {
            "source": checkpoint.source,
            "family": checkpoint.architecture.family,
            "layers": checkpoint.layers,
            "neurons": checkpoint.neurons,
            "hidden_size": checkpoint.hidden_size,
            "vocabulary_size": checkpoint.vocabulary_size,
            "tied": checkpoint.tied,
        },
        "provenance": provenance(checkpoint, opened.recipe.seed, opened.device),
    }


def _describe_concept(opened: Opened, groups: Sequence[Located]) -> dict[str, Any]:
    first, texts = groups[0], opened.vocabulary.texts
    channels = {channel.name: channel for located in groups for channel in located.channels}
    chosen = {channel.name: channel for located in groups for channel in located.chosen}
    return {
        "name": first.concept.name,
        "strength": first.concept.strength,
        "words": list(first.tokens.words),
        "tokens": [texts[index] for index in first.tokens.ids.tolist()],
        "groups": [[texts[index] for index in located.ids.tolist()] for located in groups],
        "left_out": list(first.tokens.left_out),
        "warnings": list(first.tokens.warnings),
        "candidates": len({(c.layer, c.expert, c.neuron, c.matrix) for c in channels.values()}),
        "channels": len(channels),
        "supported_channels": sum(c.support >= opened.recipe.select.support for c in channels.values()),
        "located_channels": len(chosen),
        "located_neurons": len({(c.layer, c.expert, c.neuron, c.matrix) for c in chosen.values()}),
    }


def _save_channels(opened: Opened, found: Sequence[Located], folder: Path) -> None:
    unique = {channel.name: channel for located in found for channel in located.channels}
    save_channels(
        list(unique.values()),
        folder / "channels",
        base=identity(opened.checkpoint),
        settings=asdict(solver_settings(opened.checkpoint, opened.recipe)) | asdict(opened.vocabulary.rules),
    )


def _why_nothing(found: Sequence[Located]) -> str:
    parts = []
    for name, groups in by_concept(found).items():
        if not any(located.chosen for located in groups):
            channels = {channel.name: channel for located in groups for channel in located.channels}
            neurons = {(c.layer, c.expert, c.neuron, c.matrix) for c in channels.values()}
            strongest = max(float(scores.abs().max()) for located in groups for scores in located.scores.values())
            parts.append(
                f"No channel of the {len(neurons)} candidate neurons carries {name}: {len(channels)} channels were "
                "found, none of them supported and with enough of the concept's words among its strongest tokens "
                f"(strongest LM-head z-score {strongest:.2f})."
            )
    return " ".join(parts) + " Lower select.share or select.support, raise locate.candidates, or name more words."


@contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    started = time.monotonic()
    try:
        yield
    finally:
        seconds[step] = round(time.monotonic() - started, 2)
