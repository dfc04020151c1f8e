"""Recipe in, run folder out: a list of steps, each one call of the module that knows it."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rotate_edit import channel_job
from rotate_edit.channels.channel_set import Channel, save_channels
from rotate_edit.channels.chosen import Chosen
from rotate_edit.channels.locate import ConceptGroup, by_concept
from rotate_edit.console import Report, silent, tell_found
from rotate_edit.edits.channel_edit import METHOD, told
from rotate_edit.edits.edit import Edit
from rotate_edit.edits.edit_file import save_edit
from rotate_edit.edits.writing.adapter import write_adapter
from rotate_edit.edits.writing.patch import write_checkpoint
from rotate_edit.errors import BadInput, Failure
from rotate_edit.evaluation import curves
from rotate_edit.evaluation.provenance import provenance
from rotate_edit.evaluation.text_tasks import save_items
from rotate_edit.files import check_output_free, plain, read_json, whole_folder, write_atomically
from rotate_edit.machine import peak_memory
from rotate_edit.models.checkpoint import identity, open_checkpoint
from rotate_edit.recipe import Recipe, parse_recipe, recipe_text
from rotate_edit.reporting.card import write_cards
from rotate_edit.reporting.report import write_report
from rotate_edit.reporting.reproduce import (
    REPRODUCE,
    Difference,
    check_same_base,
    differences,
    read_reproduction,
    write_reproduction,
)
from rotate_edit.session import Session, Tell, missed_goals, open_session, untold

FORMAT = 1
CHANNELS = "channels.json"


@dataclass
class Run:
    """A run as it goes on: what its steps have found so far.

    Attributes:
        session: The recipe, opened.
        folder: Where the run is written until it is whole.
        report: Is told how far it is.
        result: The content of evaluation.json so far.
        seconds: How long each step took.
        groups: What was located.
        edits: The edit and its controls at strength 1, by method.
        edit: The edit at its strengths.
        strengths: By concept.
        chosen: The channels that the recipe chooses.
    """

    session: Session
    folder: Path
    report: Report = silent
    result: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    groups: tuple[ConceptGroup, ...] = ()
    edits: dict[str, Edit] = field(default_factory=dict)
    edit: Edit | None = None
    strengths: dict[str, float] = field(default_factory=dict)
    chosen: tuple[Chosen, ...] = ()


@dataclass(frozen=True)
class Written:
    """What `edit_only` wrote.

    Attributes:
        edit: The edit.
        warnings: What the user should know about what was written.
        neurons: What became of the neurons of chosen channels, as plain JSON (`edits.channel_edit.TurnedNeuron`).
        channels: What the chosen channels do to the running model, as plain JSON (`channel_job.measured`). Empty where
            none was chosen or nothing was measured.
    """

    edit: Edit
    warnings: list[str]
    neurons: list[dict[str, Any]] = field(default_factory=list)
    channels: dict[str, Any] = field(default_factory=dict)


def run(
    recipe: Recipe,
    output: Path,
    *,
    overwrite: bool = False,
    allow_code: bool = False,
    report: Report = silent,
    tell: Tell = untold,
) -> dict[str, Any]:
    """The whole pipeline. It leaves a run folder.

    Args:
        recipe: What is done.
        output: The run folder, which must not exist unless `overwrite`.
        overwrite: Replace a folder that exists.
        allow_code: Let the definitions of the items run code that they bring along.
        report: Is told how far it is.
        tell: Is told what the user should know of the words, before anything long begins.

    Returns:
        The content of its evaluation.json.

    Raises:
        BadInput: Something cannot work. Nothing was written.
        Failure: Nothing was located. The run folder then holds the recipe, the channels and a report that says why, and
            no checkpoint.
    """
    if not recipe.concepts:
        raise BadInput(
            "concepts: a run measures concepts, and this recipe has channels alone; use `rotate-edit edit`, which "
            "measures channels."
        )
    check_output_free(output, overwrite=overwrite)
    session = open_session(recipe, output=output, allow_code=allow_code, tell=tell)
    with whole_folder(output, overwrite=overwrite) as folder:
        going = Run(session, folder, report)
        write_atomically(folder / "recipe.yaml", recipe_text(recipe))
        _locate(going)
        failure = session.why_not_located(going.groups)
        if failure is None:
            for step in (_build, _solve, _draw_curves, _save, _evaluate):
                step(going)
        else:
            going.result["failure"] = failure
        result = _write_result(going, recipe)
        write_report(folder)
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
    measured: bool = True,
    overwrite: bool = False,
    report: Report = silent,
    tell: Tell = untold,
) -> Written:
    """Locate and edit without evaluating. It leaves recipe.yaml, channels/, edit/ and what was asked for.

    Chosen channels are measured: what becomes of them stands in channels.json.

    Args:
        recipe: What is done.
        output: The folder, which must not exist unless `overwrite`.
        checkpoint: Whether the patched checkpoint is written.
        adapter: Whether the LoRA adapter is written.
        measured: Whether chosen channels are measured on the running model.
        overwrite: Replace a folder that exists.
        report: Is told how far it is.
        tell: Is told what the user should know of the words, before anything long begins, and which channels were
            chosen.

    Returns:
        The edit, what the user should know about what was written, and what the chosen channels do.

    Raises:
        BadInput: Something cannot work. Nothing was written.
        Failure: Nothing was located, or no strength reaches the goal.
    """
    check_output_free(output, overwrite=overwrite)
    session = open_session(recipe, output=output, measured=False, tell=tell)
    chosen = _chosen(session, report)
    edit, groups, missed = _concepts_edit(session, report) if recipe.concepts else (Edit(METHOD, ()), (), [])
    edit = channel_job.with_channels(session, edit, chosen)
    neurons = channel_job.described(session, chosen)
    effects: dict[str, Any] = {}
    if chosen and measured:
        report("measure channels", 0, 1)
        effects = channel_job.measured(session, chosen, edit)
        report("measure channels", 1, 1)
    with whole_folder(output, overwrite=overwrite) as folder:
        write_atomically(folder / "recipe.yaml", recipe_text(recipe))
        _save_channels(session, groups, chosen, folder)
        if chosen:
            content = plain({"neurons": neurons, **effects})
            write_atomically(folder / CHANNELS, json.dumps(content, indent=1, allow_nan=False))
        saved = _save_edit(session, edit, folder, checkpoint=checkpoint, adapter=adapter, report=report)
        write_cards(folder)
    return Written(edit, missed + saved["warnings"], neurons, effects)


def _chosen(session: Session, report: Report) -> tuple[Chosen, ...]:
    """The channels that the recipe chooses, told one by one before anything is made of them."""
    chosen = channel_job.choose_channels(session, report)
    for wish in chosen:
        for sentence in told(wish):
            tell_found(report, sentence)
    return chosen


def _concepts_edit(session: Session, report: Report) -> tuple[Edit, tuple[ConceptGroup, ...], list[str]]:
    """The edit of a recipe's concepts at its strengths, what was located, and which goals were missed."""
    if session.seeks_strengths:
        # What the model writes itself comes first, since it may not be enough.
        report("write texts", 0, 1)
        _ = session.items
        report("write texts", 1, 1)
    groups = session.locate(report=report)
    session.check_located(groups)
    session.forget("projections")
    report("build edits", 0, 1)
    unit = session.build([session.method], groups)[session.recipe.method]
    session.forget("material")
    report("build edits", 1, 1)
    report("strengths", 0, 1)
    solved = session.solve(unit)
    strengths = {name: found.strength for name, found in solved.items()}
    report("strengths", 1, 1)
    for name, strength in strengths.items():
        tell_found(report, f"{name}: strength {strength:.4g}")
    report("describe the edit", 0, 1)
    edit = session.described(unit.at(strengths), groups)
    session.forget("projections")
    report("describe the edit", 1, 1)
    return edit, groups, missed_goals(solved)


def repeat(
    path: Path,
    output: Path,
    *,
    model: str | None = None,
    allow_code: bool = False,
    overwrite: bool = False,
    report: Report = silent,
) -> tuple[list[Difference], int]:
    """Run the recipe of a reproduce.json into a new run folder and compare.

    Args:
        path: The reproduce.json.
        output: The new run folder.
        model: Where the base lies here, when not where the recipe says.
        allow_code: As in `run`.
        overwrite: Replace a folder that exists.
        report: Is told how far it is.

    Returns:
        The differences, and how many hashes, numbers and settings agree.

    Raises:
        BadInput: The file cannot be read, or the base is another one.
        Failure: The run fails.
    """
    content, before = read_reproduction(path)
    recipe = parse_recipe(content | ({"model": model} if model else {}), f"the recipe in {path.name}")
    check_same_base(before, open_checkpoint(recipe.model, recipe.revision))
    run(recipe, output, overwrite=overwrite, allow_code=allow_code, report=report)
    now = read_json(output, REPRODUCE)
    found = differences(before, now)
    compared = sum(len({*before[part], *now[part]}) for part in ("items", "hashes", "numbers", "versions", "hardware"))
    return found, compared - len(found)


# The steps of a run.


def _locate(going: Run) -> None:
    session = going.session
    # The model is loaded first, so that its loading is not counted with a step.
    _ = session.model
    if session.writes_items:
        with _timed(going, "write texts"):
            _ = session.items
        for sentence in session.remarks[len(session.notes) :]:
            tell_found(going.report, sentence)
    with _timed(going, "locate"):
        going.groups = session.locate((session.method, *session.controls), going.report)
    going.chosen = _chosen(session, going.report)
    for group in going.groups:
        if group.chosen:
            tell_found(going.report, f"{group.name}: {len(group.chosen)} channels located")
    going.result |= _describe(session, going.groups) | {"warnings": session.remarks}
    _save_channels(session, going.groups, going.chosen, going.folder)
    if session.items is not None and session.recipe.evaluate.items is None:
        save_items(session.items, going.folder / "items")


def _build(going: Run) -> None:
    session = going.session
    with _timed(going, "build edits"):
        session.forget("projections")
        going.edits = session.build((session.method, *session.controls), going.groups)
        session.forget("material")


def _solve(going: Run) -> None:
    session = going.session
    with _timed(going, "strengths"):
        unit = going.edits[session.recipe.method]
        solved = session.solve(unit)
        going.strengths = {name: found.strength for name, found in solved.items()}
        described = session.described(unit.at(going.strengths), going.groups)
        going.edit = channel_job.with_channels(session, described, going.chosen)
        session.forget("projections")
    missed = missed_goals(solved)
    going.result["warnings"] += missed
    for sentence in missed:
        tell_found(going.report, sentence)
    for entry in going.result["concepts"]:
        entry["missed"] = solved[entry["name"]].missed
        entry["strength"] = going.strengths[entry["name"]]
        tell_found(going.report, f"{entry['name']}: strength {entry['strength']:.4g}")
    going.result["neurons"] = [asdict(vector) for vector in going.edit.vectors]


def _draw_curves(going: Run) -> None:
    session, drawn = going.session, {}
    strengths = session.recipe.evaluate.strengths
    with _timed(going, "curves"):
        for name in by_concept(going.groups):
            known = session.reference(name, "test")
            if known is not None:
                own = {method: edit.only(name) for method, edit in going.edits.items()}
                drawn[name] = curves.draw(
                    session.model, known, own, strengths, going.strengths[name], going.report, sparse=session.is_large
                )
    method = session.recipe.method
    going.result["curves"], going.result["chosen_method"] = drawn, method
    removed = {name: points for name, points in drawn.items() if going.strengths[name] > 0}
    going.result["matched"] = {name: curves.matched_table(points, method) for name, points in removed.items()}


def _save(going: Run) -> None:
    assert going.edit is not None  # solved before
    save = going.session.recipe.save
    with _timed(going, "save"):
        going.result["saved"] = _save_edit(
            going.session, going.edit, going.folder, checkpoint=save.checkpoint, adapter=save.adapter,
            report=going.report,
        )  # fmt: skip


def _evaluate(going: Run) -> None:
    assert going.edit is not None  # solved before
    with _timed(going, "evaluate"):
        going.result.update(going.session.evaluate(going.edit, going.report).result)
        if going.chosen:
            neurons = channel_job.described(going.session, going.chosen)
            effects = channel_job.measured(going.session, going.chosen, going.edit)
            going.result["channels"] = {"neurons": neurons, **effects}


def _write_result(going: Run, recipe: Recipe) -> dict[str, Any]:
    going.result["cost"] = {"seconds": going.seconds, "peak_memory_mb": peak_memory()}
    result: dict[str, Any] = plain(going.result)
    write_atomically(going.folder / "evaluation.json", json.dumps(result, indent=1, allow_nan=False))
    write_reproduction(going.folder, recipe_text(recipe), result)
    return result


# What the steps write and describe.


def _save_edit(
    session: Session, edit: Edit, folder: Path, *, checkpoint: bool, adapter: bool, report: Report
) -> dict[str, Any]:
    """Write the edit and what is wanted of it; returns what rounding did, what was left out and warnings, as JSON."""
    report("write edit", 0, 1)
    save_edit(edit, folder / "edit")
    report("write edit", 1, 1)
    saved: dict[str, Any] = {"rounding": None, "left_out": [], "warnings": []}
    if checkpoint:
        report("write checkpoint", 0, len(session.checkpoint.headers))
        patch = write_checkpoint(
            session.checkpoint, edit, folder / "model", edit_folder=folder / "edit", undo=session.recipe.save.undo,
            progress=report,
        )  # fmt: skip
        saved = {
            "rounding": asdict(patch.rounding()),
            "left_out": list(patch.left_out),
            "warnings": list(patch.warnings),
        }
    if adapter:
        report("write adapter", 0, 1)
        saved["warnings"] += write_adapter(session.checkpoint, edit, folder / "adapter").warnings
    return saved


def _save_channels(session: Session, groups: Sequence[ConceptGroup], chosen: Sequence[Chosen], folder: Path) -> None:
    unique = {channel.name: channel for group in groups for channel in group.channels}
    unique |= {channel.name: channel for wish in chosen for channel in (*wish.channels, *wish.beside)}
    if not unique:
        return
    save_channels(
        list(unique.values()),
        folder / "channels",
        base=identity(session.checkpoint),
        settings=asdict(session.search_settings.solver) | asdict(session.vocabulary.rules),
    )


def _describe(session: Session, groups: Sequence[ConceptGroup]) -> dict[str, Any]:
    checkpoint = session.checkpoint
    return {
        "format": FORMAT,
        "concepts": [_describe_concept(session, own) for own in by_concept(groups).values()],
        "selected_channels": [
            {
                "name": channel.name,
                "concept": group.name,
                "tokens": list(channel.tokens),
                "z_scores": list(channel.z_scores),
                "kurtosis": channel.kurtosis,
                "cosine": channel.cosine,
                "support": channel.support,
                "p_value": channel.p_value,
                "sign": channel.sign,
            }
            for group in groups
            for channel in group.chosen
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
        "provenance": provenance(checkpoint, session.recipe.seed, session.device),
    }


def _describe_concept(session: Session, groups: Sequence[ConceptGroup]) -> dict[str, Any]:
    first, texts = groups[0], session.vocabulary.texts
    channels = {channel.name: channel for group in groups for channel in group.channels}
    chosen = {channel.name: channel for group in groups for channel in group.chosen}
    goal = next(concept.goal for concept in session.recipe.concepts if concept.name == first.name)
    return {
        "name": first.name,
        "goal": asdict(goal),
        "strength": goal.value if goal.kind == "strength" else None,
        "words": list(first.tokens.words),
        "tokens": [texts[index] for index in first.tokens.ids.tolist()],
        "groups": [[texts[index] for index in group.ids.tolist()] for group in groups],
        "left_out": list(first.tokens.left_out),
        "warnings": list(first.tokens.warnings),
        "candidates": len({(c.layer, c.expert, c.neuron, c.matrix) for c in channels.values()}),
        "channels": len(channels),
        "fdr": session.recipe.select.fdr,
        "located_channels": len(chosen),
        "located_neurons": len({(c.layer, c.expert, c.neuron, c.matrix) for c in chosen.values()}),
    }


@contextmanager
def _timed(going: Run, step: str) -> Iterator[None]:
    started = time.monotonic()
    going.report(step, 0, 1)
    try:
        yield
        going.report(step, 1, 1)
    finally:
        going.seconds[step] = round(time.monotonic() - started, 2)


def with_save(recipe: Recipe, **changes: Any) -> Recipe:
    """A recipe with other settings of what is saved, such as `undo=False`."""
    return recipe.model_copy(update={"save": recipe.save.model_copy(update=changes)})


def locate_channels(
    recipe: str | Path, report: Report = silent, tell: Tell = untold
) -> dict[str, tuple[int, list[Channel]]]:
    """Which channels carry a recipe's concepts. Nothing is written.

    Args:
        recipe: The file or the bundled name of a recipe.
        report: Is told how far the search is.
        tell: Is told what the user should know of the words, before anything long begins.

    Returns:
        By concept how many groups its tokens fall into, and the channels that carry it.

    Raises:
        Failure: No channel carries any of the concepts.
    """
    session = open_session(recipe, tell=tell)
    groups = session.locate_channels(report)
    if not any(group.chosen for group in groups):
        raise Failure(
            "no channel carries the concepts; raise select.fdr, lower select.share or raise locate.candidates."
        )
    found = {}
    for name, own in by_concept(groups).items():
        chosen = {channel.name: channel for group in own for channel in group.chosen}
        found[name] = (len(own), list(chosen.values()))
    return found
