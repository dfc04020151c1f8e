"""Search for the settings of an edit that remove most for least damage, on one loaded model.

A trial writes nothing: the edit is switched on in the loaded model as low-rank changes, and the concept's probability
mass and the collateral KL are measured on fixed texts for choosing. Channels are searched once for each division of
the concept into groups; a trial only chooses among them. Each trial aims at a removal of its own and solves for the
strength that reaches it, so that no trial is spent on a strength that does nothing or everything.
"""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rotate_edit.console import Report, silent
from rotate_edit.edits.edit import KEYED, WHOLE_LAYER
from rotate_edit.errors import BadInput, Failure
from rotate_edit.evaluation.compare import Plan
from rotate_edit.evaluation.evaluate import evaluate
from rotate_edit.evaluation.harness import Settings
from rotate_edit.evaluation.variants import Variant
from rotate_edit.files import write_atomically
from rotate_edit.recipe import Recipe, recipe_text
from rotate_edit.search import pareto
from rotate_edit.search.trials import (
    TOKENS,
    Prepared,
    Tried,
    at_strengths,
    built,
    compared,
    finest_fit,
    last_layers,
    measured_on,
    prepare,
    references,
    try_settings,
    with_settings,
)
from rotate_edit.session import open_recipe

JOURNAL, RECORD, CHOSEN, FIGURE = "trials.journal", "front.json", "recipe.yaml", "front.png"
STUDY = "rotate-edit tune"
# Shares of the concept's mass that a trial may aim at, and those that the recipe itself is tried at.
LEAST_LEFT, MOST_LEFT = 0.02, 0.5
OWN_TARGETS = (0.1, 0.3, 0.05)
STARTUP_TRIALS = 15
# A choice is confirmed and reported on so many times the text of a trial, since few comparisons are made there.
CONFIRMING, PROVING = 2, 4
# So many points of the front are confirmed at most, a few seconds each.
CANDIDATES = 3
# Other settings must save at least a tenth of the damage on texts that no trial saw, or the recipe's own are kept.
CLEARLY_LESS = 0.9


# Settings.


def suggest(trial: Any, prepared: Prepared) -> dict[str, Any]:
    """The settings of one trial by their keys in the recipe, and `target`, the share of the mass it aims to leave."""
    recipe, layers = prepared.opened.recipe, prepared.opened.checkpoint.layers
    settings: dict[str, Any] = {}
    if recipe.edit.method == "fitted":
        # A fit takes seconds, so one is tried after each of its rounds and at several ranks, beside keyed edits of all
        # settings; not so where a concept is amplified, whose strength is in nats beside a fit and not beside a key.
        mixed = any(concept.amplified for concept in recipe.concepts)
        methods = ["fitted"] if mixed else list(WHOLE_LAYER)
        settings["edit.method"] = trial.suggest_categorical("edit.method", methods)
        if settings["edit.method"] == "fitted":
            rounds, rank = finest_fit(prepared.opened)
            settings["edit.fit_rounds"] = trial.suggest_int("edit.fit_rounds", 1, rounds)
            settings["edit.fit_rank"] = trial.suggest_int("edit.fit_rank", 1, rank, log=True)
            return settings | {"target": trial.suggest_float("target", LEAST_LEFT, MOST_LEFT, log=True)}
    if len(prepared.found) > 1:
        settings["locate.group_distance"] = trial.suggest_categorical("locate.group_distance", list(prepared.found))
    looked_at = recipe.locate.layers or range(layers)
    last = trial.suggest_categorical("last layer", last_layers(prepared.opened))
    first = min(looked_at)
    if recipe.edit.method not in KEYED:
        first = trial.suggest_int("first layer", first, min(last_layers(prepared.opened)))
    settings["locate.layers"] = [layer for layer in sorted(looked_at) if first <= layer <= last]
    if len(recipe.locate.matrices) > 1:
        choices = ["+".join(recipe.locate.matrices), *recipe.locate.matrices]
        settings["locate.matrices"] = trial.suggest_categorical("locate.matrices", choices).split("+")
    if recipe.edit.method in KEYED:
        settings["edit.key_ridge"] = trial.suggest_float("edit.key_ridge", 0.001, 1.0, log=True)
    if recipe.edit.method in ("lm-head-located", "lm-head-keyed"):
        settings["select.lm_head_z"] = trial.suggest_float("select.lm_head_z", 0.2, 3.0, log=True)
    elif recipe.edit.method not in WHOLE_LAYER:
        settings["select.share"] = trial.suggest_float("select.share", 0.05, 0.9)
        settings["select.support"] = trial.suggest_float("select.support", 0.5, 4.0)
        settings["select.top"] = trial.suggest_int("select.top", 3, 20)
    if recipe.edit.method != "fitted":
        # What the least-divergence direction needs is not read for the few keyed edits beside a fit.
        other = "least-divergence" if recipe.edit.method in KEYED else "plain"
        directions = dict.fromkeys(("least-collateral", other, recipe.edit.direction))
        settings["edit.direction"] = trial.suggest_categorical("edit.direction", list(directions))
    settings["edit.ridge"] = trial.suggest_float("edit.ridge", 0.003, 30.0, log=True)
    settings["edit.fold_norm"] = trial.suggest_categorical("edit.fold_norm", [True, False])
    settings["target"] = trial.suggest_float("target", LEAST_LEFT, MOST_LEFT, log=True)
    return settings


def own_parameters(recipe: Recipe, prepared: Prepared, target: float) -> dict[str, Any]:
    """The recipe's own settings as the parameters of a trial, so that the search starts from them."""
    parameters: dict[str, Any] = {
        "first layer": min(recipe.locate.layers or [0]),
        "last layer": max(recipe.locate.layers or [prepared.opened.checkpoint.layers - 1]),
        "select.lm_head_z": recipe.select.lm_head_z,
        "select.share": recipe.select.share,
        "select.support": recipe.select.support,
        "select.top": recipe.select.top,
        "edit.direction": recipe.edit.direction,
        "edit.ridge": recipe.edit.ridge,
        "edit.fold_norm": recipe.edit.fold_norm,
        "edit.key_ridge": recipe.edit.key_ridge,
        "edit.fit_rank": recipe.edit.fit_rank,
        "edit.fit_rounds": recipe.edit.fit_rounds,
        "edit.method": recipe.edit.method,
        "target": target,
    }
    if len(prepared.found) > 1:
        parameters["locate.group_distance"] = next(iter(prepared.found))
    if len(recipe.locate.matrices) > 1:
        parameters["locate.matrices"] = "+".join(recipe.locate.matrices)
    return parameters


# The search.


def search(
    recipe: Recipe,
    output: Path,
    *,
    trials: int = 60,
    pick: str = "knee",
    seed: int = 0,
    tokens: int = TOKENS,
    lm_eval: bool = False,
    report: Report = silent,
) -> dict[str, Any]:
    """Try settings until `trials` are done, write the front and the chosen recipe to `output`, and return the record.

    The trials are kept in a journal in `output`: the same command goes on where an earlier one was stopped. pick:
    `knee`, a number of the front, or `damage=X`; lm_eval: also ask the front's edits the recipe's items and tasks (a
    minute each). Raises BadInput when `output` holds the search of another recipe or
    the pick means nothing, and Failure when no trial worked.
    """
    import optuna

    checked_pick(pick)
    opened = open_recipe(recipe, output)
    _own_folder(output, recipe_text(recipe), tokens)
    started = time.monotonic()
    prepared = prepare(opened, tokens=tokens, report=report)
    study = _study(output, prepared, seed)
    done = len(finished(study))

    def objective(trial: Any) -> tuple[float, float]:
        report("tune", len(finished(study)), trials)
        try:
            tried = try_settings(prepared, suggest(trial, prepared))
        except Failure as failure:
            trial.set_user_attr("why", str(failure))
            raise optuna.TrialPruned from failure
        trial.set_user_attr("settings", tried.settings)
        trial.set_user_attr("strengths", tried.strengths)
        trial.set_user_attr("seconds", tried.seconds)
        return tried.point

    interrupted = False
    try:
        study.optimize(objective, n_trials=max(0, trials - done), catch=())
    except KeyboardInterrupt:
        # What was found is kept; a trial that was cut off is not counted and will be made up for.
        interrupted = True
    report("tune", len(finished(study)), trials)
    record = summary(prepared, study, pick, seed, tokens)
    if lm_eval and not interrupted:
        record["front_summaries"] = asked_front(prepared, record, report)
    record |= {"interrupted": interrupted, "seconds": round(time.monotonic() - started, 1)}
    write_record(recipe, record, output)
    return record


def _study(output: Path, prepared: Prepared, seed: int) -> Any:
    """The search that `output` holds, or a new one that tries the recipe as it is first."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(output / JOURNAL)))
    study = optuna.create_study(
        study_name=STUDY, storage=storage, directions=["maximize", "minimize"], load_if_exists=True
    )
    # Another seed for a search that goes on, or it would try the same settings again.
    again = seed + len(finished(study))
    study.sampler = optuna.samplers.TPESampler(seed=again, n_startup_trials=STARTUP_TRIALS, multivariate=True)
    if not study.trials:
        starts = [own_parameters(prepared.opened.recipe, prepared, target) for target in OWN_TARGETS]
        if prepared.changes:
            rounds, rank = finest_fit(prepared.opened)
            starts += [own | {"edit.fit_rounds": rounds, "edit.fit_rank": rank} for own in starts]
        for parameters in starts:
            study.enqueue_trial(parameters)
    return study


def finished(study: Any) -> list[Any]:
    """The trials that ended, pruned ones included."""
    return [trial for trial in study.trials if trial.state.name in ("COMPLETE", "PRUNED")]


def _own_folder(output: Path, text: str, tokens: int) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{output} cannot be a folder for the search: {error.strerror}.") from error
    marker, content = output / "searched.yaml", f"# tokens: {tokens}\n{text}"
    if marker.is_file():
        if marker.read_text(encoding="utf-8") != content:
            raise BadInput(f"{output} holds the search of another recipe or with other tokens; name another output.")
    elif any(output.iterdir()):
        raise BadInput(f"{output} is not empty and holds no search; name another output.")
    write_atomically(marker, content)


def checked_pick(pick: str) -> None:
    """Raises BadInput when a pick is neither `knee`, a number, nor `damage=X`."""
    number = pick.removeprefix("damage=")
    try:
        valid = pick == "knee" or (float(number) > 0 if pick.startswith("damage=") else int(number) >= 1)
    except ValueError:
        valid = False
    if not valid:
        raise BadInput(f"pick {pick!r} means nothing; give knee, a number of the front, or damage=0.01.")


def picked(points: Sequence[pareto.Point], pick: str) -> int:
    """The place on a front that a pick means. Raises BadInput when the front has no such point."""
    if pick == "knee":
        return pareto.knee(points)
    if pick.startswith("damage="):
        place = pareto.within_budget(points, float(pick.removeprefix("damage=")))
        if place is None:
            least = min(damage for _, damage in points)
            raise BadInput(f"no point of the front has a damage of at most {pick[7:]}; the least is {least:.3g}.")
        return place
    if int(pick) > len(points):
        raise BadInput(f"the front has {len(points)} points, so {pick} is none of them.")
    return int(pick) - 1


def summary(prepared: Prepared, study: Any, pick: str, seed: int, tokens: int) -> dict[str, Any]:
    """All trials, the front, the chosen point, and the choice against the recipe's own settings on other texts.

    Raises Failure when no trial worked."""
    tried = [
        Tried(trial.user_attrs["settings"], trial.user_attrs["strengths"], removal, damage, trial.user_attrs["seconds"])
        for trial in study.trials
        if trial.state.name == "COMPLETE"
        for removal, damage in [trial.values]
    ]
    failures = [trial.user_attrs.get("why", "") for trial in study.trials if trial.state.name == "PRUNED"]
    if not tried:
        raise Failure("no trial removed the concept: " + (failures[-1] if failures else "none was finished."))
    places = pareto.front([one.point for one in tried])
    chosen = picked([tried[place].point for place in places], pick)
    if pick == "knee":
        places, chosen = confirmed(prepared, tried, places, tokens)
    held_out = references(prepared.opened, prepared.model, "test", PROVING * tokens)
    return {
        "trials": [vars(one) for one in tried],
        "failed": failures,
        "front": places,
        "pick": pick,
        "chosen": chosen,
        "test": compared(measured_on(prepared, held_out), tried[places[chosen]]),
        "seed": seed,
        "tokens": tokens,
    }


def confirmed(prepared: Prepared, tried: Sequence[Tried], places: list[int], tokens: int) -> tuple[list[int], int]:
    """The knee that holds on texts for choosing which the trials did not see: the front, and the place on it.

    The best of many trials is partly the luckiest, so candidates are compared with the recipe as it was, at equal
    removal: the knee first, then what of the front saved most over the recipe's own trials, then the strongest
    removals. The first that does clearly less damage there is taken; without one the recipe's own trial, put into the
    front if it is not on it.
    """
    others = references(prepared.opened, prepared.model, "validation", CONFIRMING * tokens, from_the_end=True)
    there = measured_on(prepared, others)
    front = [tried[place] for place in places]
    own = [place for place, one in enumerate(tried) if _is_own(prepared, one)]
    first = pareto.knee([one.point for one in front])
    saved = pareto.savings([one.point for one in front], [tried[place].point for place in own])
    by_savings = sorted(range(len(front)), key=lambda place: (saved.get(place, math.inf), -front[place].removal))
    order = [first, *(place for place in by_savings if place != first)]
    for candidate in [place for place in order if places[place] not in own][:CANDIDATES]:
        found = compared(there, front[candidate])
        if found["own_damage"] is None or found["damage"] <= CLEARLY_LESS * found["own_damage"]:
            return places, candidate
    if not own:
        return places, first
    together = sorted({*places, own[0]}, key=lambda place: tried[place].removal)
    return together, together.index(own[0])


def own_trial(prepared: Prepared, target: float) -> dict[str, Any]:
    """The settings of a trial of the recipe as it is."""
    from optuna.trial import FixedTrial

    return suggest(FixedTrial(own_parameters(prepared.opened.recipe, prepared, target)), prepared)


def _is_own(prepared: Prepared, tried: Tried) -> bool:
    return tried.settings == own_trial(prepared, tried.settings["target"])


def asked_front(prepared: Prepared, record: dict[str, Any], report: Report) -> list[dict[str, Any]]:
    """Efficacy, specificity and first-token KL of every edit of the front, as lm-eval measures them; plain JSON."""
    opened, recipe = prepared.opened, prepared.opened.recipe
    variants: list[Variant] = []
    for place in record["front"]:
        tried = Tried(**record["trials"][place])
        edit = at_strengths(built(prepared, tried.settings), tried.strengths)
        variants.append(Variant(str(len(variants) + 1), edit))
    plan = Plan(
        concepts=tuple(concept.name for concept in recipe.concepts),
        neighbours=tuple(name for concept in recipe.concepts for name in concept.neighbours),
        tasks=tuple(recipe.evaluate.tasks),
        items=recipe.evaluate.limit or Plan.items,
        settings=Settings(batch_size=recipe.evaluate.batch_size, limit=recipe.evaluate.limit),
        raised=tuple(concept.name for concept in recipe.concepts if concept.amplified),
        generations=0,
        seed=recipe.seed,
    )
    found = evaluate(prepared.model, opened.tokenizer, variants, plan, opened.items, report=report)
    return [found.result["variants"][variant.name]["summary"] for variant in variants]


def write_record(recipe: Recipe, record: dict[str, Any], output: Path) -> None:
    """front.json, front.png and the chosen recipe, each whole or not at all."""
    from rotate_edit.search.figure import front_figure

    tried = [Tried(**trial) for trial in record["trials"]]
    front = [tried[place] for place in record["front"]]
    write_atomically(output / RECORD, json.dumps(record, indent=1, allow_nan=False))
    write_atomically(output / CHOSEN, recipe_text(chosen_recipe(recipe, front[record["chosen"]])))
    points = [one.point for one in tried]
    write_atomically(output / FIGURE, front_figure(points, record["front"], record["chosen"]))


def chosen_recipe(recipe: Recipe, chosen: Tried) -> Recipe:
    """The recipe with a trial's settings and strengths."""
    found = with_settings(recipe, chosen.settings)
    concepts = [
        concept.model_copy(update={"strength": round(chosen.strengths[concept.name], 4)}) for concept in found.concepts
    ]
    return found.model_copy(update={"concepts": concepts})
