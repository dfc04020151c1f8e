"""Search for the settings of an edit that remove most for least damage, on one loaded model.

A trial writes nothing. The edit is switched on in the loaded model as low-rank changes. Then the concept's probability
mass and the collateral KL are measured on fixed validation texts. Channels are searched once for each division of the
concept into groups, and a trial only chooses among them. Each trial aims at a removal of its own and solves for the
strength that reaches it. So no trial is spent on a strength that does nothing or everything.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rotate_edit.console import Report, silent
from rotate_edit.edits.methods import Choice, Distribution, Whole
from rotate_edit.errors import BadInput, Failure
from rotate_edit.evaluation.evaluate import evaluate
from rotate_edit.evaluation.variants import Variant
from rotate_edit.files import write_atomically
from rotate_edit.models.cost import size_of
from rotate_edit.recipe import Recipe, recipe_text
from rotate_edit.search import pareto
from rotate_edit.search.trials import (
    TOKENS,
    SearchContext,
    Trial,
    built,
    compared,
    measured_on,
    own_settings,
    prepare,
    references,
    try_settings,
)
from rotate_edit.session import Session, Tell, open_session, untold

JOURNAL, RECORD, CHOSEN, FIGURE = "trials.journal", "front.json", "recipe.yaml", "front.png"
STUDY = "rotate-edit tune"
# Shares of the concept's mass that a trial may aim at, and those that the recipe itself is tried at.
LEAST_LEFT, MOST_LEFT = 0.02, 0.5
OWN_TARGETS = (0.1, 0.3, 0.05)
STARTUP_TRIALS = 15
# A choice is confirmed and reported on so many times the text of a trial, since few comparisons are made there.
CONFIRMING, PROVING = 2, 4
# So many points of the Pareto front are confirmed at most, a few seconds each.
CANDIDATES = 3
# Other settings must save at least a tenth of the damage on texts that no trial saw, or the recipe's own are kept.
CLEARLY_LESS = 0.9


# Settings.


def suggest(trial: Any, context: SearchContext) -> dict[str, Any]:
    """Suggest the settings of one trial.

    Args:
        trial: A trial of the search.
        context: What all trials share.

    Returns:
        The settings by the keys of `Session.with_settings`, and `target`. `target` is the share of the concept's
        probability mass that the trial aims to leave.
    """
    methods = {method.about.name: method for method in context.session.search_methods}
    settings: dict[str, Any] = {}
    name = next(iter(methods))
    if len(methods) > 1:
        settings["edit.method"] = name = trial.suggest_categorical("edit.method", list(methods))
    if len(context.groups) > 1:
        settings["locate.group_distance"] = trial.suggest_categorical("locate.group_distance", list(context.groups))
    for key, values in context.session.search_space(methods[name]).items():
        settings[key] = _drawn(trial, key, values)
    return settings | {"target": trial.suggest_float("target", LEAST_LEFT, MOST_LEFT, log=True)}


def _drawn(trial: Any, key: str, values: Distribution) -> Any:
    if isinstance(values, Choice):
        return trial.suggest_categorical(key, list(values.options))
    if isinstance(values, Whole):
        return trial.suggest_int(key, values.low, values.high, log=values.log)
    return trial.suggest_float(key, values.low, values.high, log=values.log)


def own_parameters(context: SearchContext, target: float) -> dict[str, Any]:
    """Give the recipe's own settings as the parameters of a trial, so that the search starts from them.

    Args:
        context: What all trials share.
        target: The share of the concept's probability mass to leave.

    Returns:
        The parameters by key.
    """
    return context.session.own_settings | own_settings(context) | {"target": target}


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
    tell: Tell = untold,
) -> dict[str, Any]:
    """Try settings, and write the Pareto front and the chosen recipe.

    The trials are kept in a journal in `output`. The same command goes on where an earlier one was stopped.

    Args:
        recipe: What is searched for.
        output: The folder of the search.
        trials: How many trials there are in all, with those of earlier calls.
        pick: `knee`, a number of the Pareto front, or `damage=X` in nats.
        seed: Of the search.
        tokens: Of text for each trial.
        lm_eval: Also ask the edits of the Pareto front the recipe's items and tasks, a minute each.
        report: Receives the progress.
        tell: Is told what the user should know of the words, before the search begins.

    Returns:
        The record, which is written to `output` too.

    Raises:
        BadInput: `output` holds the search of another recipe, or the pick means nothing.
        Failure: No trial worked.
    """
    import optuna

    checked_pick(pick)
    session = open_session(recipe, output=output, tell=tell)
    _own_folder(output, recipe_text(recipe), tokens)
    started = time.monotonic()
    context = prepare(session, tokens=tokens, report=report)
    study = _study(output, context, seed)
    done = len(finished(study))

    def objective(trial: Any) -> tuple[float, float]:
        report("tune", len(finished(study)), trials)
        try:
            tried = try_settings(context, suggest(trial, context))
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
    record = summary(context, study, pick, seed, tokens)
    if lm_eval and not interrupted:
        record["front_summaries"] = asked_front(context, record, report)
    record |= {"interrupted": interrupted, "seconds": round(time.monotonic() - started, 1)}
    write_record(session, record, output)
    return record


def _study(output: Path, context: SearchContext, seed: int) -> Any:
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
        starts = [own_parameters(context, target) for target in OWN_TARGETS]
        method, size = context.session.method, size_of(context.session.checkpoint)
        if method.finest(size) != method:
            finest = {f"edit.settings.{name}": value for name, value in method.finest(size).settings.items()}
            starts += [own | finest for own in starts]
        for parameters in starts:
            study.enqueue_trial(parameters)
    return study


def finished(study: Any) -> list[Any]:
    """Find the trials that ended, pruned ones included.

    Args:
        study: The search.

    Returns:
        The trials.
    """
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
    """Check that a pick is `knee`, a number, or `damage=X`.

    Args:
        pick: The pick.

    Raises:
        BadInput: When it is none of them.
    """
    number = pick.removeprefix("damage=")
    try:
        valid = pick == "knee" or (float(number) > 0 if pick.startswith("damage=") else int(number) >= 1)
    except ValueError:
        valid = False
    if not valid:
        raise BadInput(f"pick {pick!r} means nothing; give knee, a number of the Pareto front, or damage=0.01.")


def picked(points: Sequence[pareto.Point], pick: str) -> int:
    """Find the place on a Pareto front that a pick means.

    Args:
        points: The points (removal, damage) of the Pareto front, ascending in removal. Damage is in nats.
        pick: `knee`, a number of the Pareto front counted from 1, or `damage=X` in nats.

    Returns:
        The place, counted from 0.

    Raises:
        BadInput: When the Pareto front has no such point.
    """
    if pick == "knee":
        return pareto.knee(points)
    if pick.startswith("damage="):
        place = pareto.within_budget(points, float(pick.removeprefix("damage=")))
        if place is None:
            least = min(damage for _, damage in points)
            raise BadInput(
                f"no point of the Pareto front has a damage of at most {pick[7:]}; the least is {least:.3g}."
            )
        return place
    if int(pick) > len(points):
        raise BadInput(f"the Pareto front has {len(points)} points, so {pick} is none of them.")
    return int(pick) - 1


def summary(context: SearchContext, study: Any, pick: str, seed: int, tokens: int) -> dict[str, Any]:
    """Summarise a search, and compare the choice with the recipe's own settings on test texts.

    Args:
        context: What all trials share.
        study: The search.
        pick: `knee`, a number of the Pareto front, or `damage=X` in nats.
        seed: Of the search.
        tokens: Of text for each trial.

    Returns:
        All trials, the Pareto front, the chosen point and the comparison.

    Raises:
        BadInput: When the Pareto front has no such point.
        Failure: When no trial worked.
    """
    tried = [
        Trial(trial.user_attrs["settings"], trial.user_attrs["strengths"], removal, damage, trial.user_attrs["seconds"])
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
        places, chosen = confirmed(context, tried, places, tokens)
    held_out = references(context.session, "test", PROVING * tokens)
    return {
        "trials": [vars(one) for one in tried],
        "failed": failures,
        "front": places,
        "pick": pick,
        "chosen": chosen,
        "test": compared(measured_on(context, held_out), tried[places[chosen]]),
        "seed": seed,
        "tokens": tokens,
    }


def confirmed(
    context: SearchContext,
    tried: Sequence[Trial],
    places: list[int],
    tokens: int,
    *,
    compare: Callable[[SearchContext, Trial], dict[str, Any]] = compared,
) -> tuple[list[int], int]:
    """Find the knee that holds on validation texts which the trials did not see.

    The best of many trials is partly the luckiest. So candidates are compared with the recipe as it was, at equal
    removal. The knee comes first. Then comes what of the Pareto front saved most over the recipe's own trials, then the
    strongest removals. The first that does clearly less damage there is taken. Without one it is the recipe's own
    trial, put into the Pareto front if it is not on it.

    Args:
        context: What all trials share.
        tried: The trials.
        places: Those of the Pareto front, ascending in removal.
        tokens: Of text for each trial.
        compare: What a candidate and the recipe's own settings do on the other texts.

    Returns:
        The Pareto front as places of trials, and the chosen place on it.
    """
    others = references(context.session, "validation", CONFIRMING * tokens, from_the_end=True)
    there = measured_on(context, others)
    front = [tried[place] for place in places]
    own = [place for place, one in enumerate(tried) if _is_own(context, one)]
    first = pareto.knee([one.point for one in front])
    saved = pareto.savings([one.point for one in front], [tried[place].point for place in own])
    by_savings = sorted(range(len(front)), key=lambda place: (saved.get(place, math.inf), -front[place].removal))
    order = [first, *(place for place in by_savings if place != first)]
    for candidate in [place for place in order if places[place] not in own][:CANDIDATES]:
        found = compare(there, front[candidate])
        if found["own_damage"] is None or found["damage"] <= CLEARLY_LESS * found["own_damage"]:
            return places, candidate
    if not own:
        return places, first
    together = sorted({*places, own[0]}, key=lambda place: tried[place].removal)
    return together, together.index(own[0])


def own_trial(context: SearchContext, target: float) -> dict[str, Any]:
    """Give the settings of a trial of the recipe as it is.

    Args:
        context: What all trials share.
        target: The share of the concept's probability mass to leave.

    Returns:
        The settings, as from `suggest`.
    """
    from optuna.trial import FixedTrial

    return suggest(FixedTrial(own_parameters(context, target)), context)


def _is_own(context: SearchContext, tried: Trial) -> bool:
    return tried.settings == own_trial(context, tried.settings["target"])


def asked_front(context: SearchContext, record: dict[str, Any], report: Report) -> list[dict[str, Any]]:
    """Evaluate every edit of the Pareto front.

    Args:
        context: What all trials share.
        record: The record of the search, from `summary`.
        report: Receives the progress.

    Returns:
        The headline metrics of each edit, as plain JSON.
    """
    session = context.session
    variants: list[Variant] = []
    for place in record["front"]:
        tried = Trial(**record["trials"][place])
        variants.append(Variant(str(len(variants) + 1), built(context, tried.settings).at(tried.strengths)))
    plan = replace(session.plan, generations=0, words=())
    found = evaluate(session.model, session.tokenizer, variants, plan, session.items, report=report)
    return [found.result["variants"][variant.name]["summary"] for variant in variants]


def write_record(session: Session, record: dict[str, Any], output: Path) -> None:
    """Write front.json, front.png and the chosen recipe, each whole or not at all.

    Args:
        session: The session of the search.
        record: The record of the search.
        output: The folder of the search.
    """
    from rotate_edit.search.figure import front_figure

    tried = [Trial(**trial) for trial in record["trials"]]
    front = [tried[place] for place in record["front"]]
    write_atomically(output / RECORD, json.dumps(record, indent=1, allow_nan=False))
    write_atomically(output / CHOSEN, recipe_text(chosen_recipe(session, front[record["chosen"]])))
    points = [one.point for one in tried]
    write_atomically(output / FIGURE, front_figure(points, record["front"], record["chosen"]))


def chosen_recipe(session: Session, chosen: Trial) -> Recipe:
    """Build the recipe with a trial's settings and strengths.

    Args:
        session: The session of the search.
        chosen: The trial.

    Returns:
        The recipe.
    """
    return session.with_settings(chosen.settings).recipe_at(chosen.strengths)
