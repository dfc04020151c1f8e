"""Search for the settings of an edit that remove most for least damage, on one loaded model.

A trial writes nothing: the edit is switched on in the loaded model as low-rank changes, and the concept's probability
mass and the collateral KL are measured on fixed texts for choosing. Channels are searched once for each division of
the concept into groups; a trial only chooses among them. Each trial aims at a removal of its own and solves for the
strength that reaches it, so that no trial is spent on a strength that does nothing or everything.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rotate_edit import curves, measures, pareto
from rotate_edit.checkpoint import load_model
from rotate_edit.comparison import Plan
from rotate_edit.console import Report, silent
from rotate_edit.edit import Edit
from rotate_edit.errors import BadInput, Failure
from rotate_edit.evaluate import evaluate, texts_about
from rotate_edit.files import write_atomically
from rotate_edit.live import applied
from rotate_edit.locate import Located, choose_channels
from rotate_edit.pipeline import GROUP_DISTANCES, Opened, edits_of, locate, open_recipe
from rotate_edit.recipe import Recipe, parse_recipe, recipe_text
from rotate_edit.scoring import Settings
from rotate_edit.variants import Variant

JOURNAL, RECORD, CHOSEN, FIGURE = "trials.journal", "front.json", "recipe.yaml", "front.png"
STUDY = "rotate-edit tune"
TOKENS = 1200
# Shares of the concept's mass that a trial may aim at, and those that the recipe itself is tried at.
LEAST_LEFT, MOST_LEFT = 0.02, 0.5
OWN_TARGETS = (0.1, 0.3, 0.05)
SECANTS = 4
NEAR_ENOUGH = 1.1
STARTUP_TRIALS = 15


@dataclass(frozen=True)
class Prepared:
    """What all trials share: the opened recipe, the loaded base, what was located for each division into groups,
    and the base's answers for each concept on a split of the texts."""

    opened: Opened
    model: Any
    found: dict[float, tuple[Located, ...]]
    known: dict[str, measures.Reference]


@dataclass(frozen=True)
class Tried:
    """One trial: its settings, each concept's strength, and what they do.

    removal: 1 - the share of the concept's mass that is left (for an amplified concept 1 - before / after), mean over
    concepts; damage: collateral KL in nats; seconds: how long it took.
    """

    settings: dict[str, Any]
    strengths: dict[str, float]
    removal: float
    damage: float
    seconds: float

    @property
    def point(self) -> pareto.Point:
        """(removal, damage)."""
        return self.removal, self.damage


def prepare(opened: Opened, *, tokens: int = TOKENS, report: Report = silent) -> Prepared:
    """Load the model, search the channels and measure the base. Raises BadInput without texts to measure on."""
    if opened.items is None:
        raise BadInput("tune needs texts to measure on; give evaluate.items or evaluate.text in the recipe.")
    model = load_model(opened.checkpoint, device=opened.device)
    wanted = opened.recipe.locate.group_distance
    found = {}
    for distance in GROUP_DISTANCES if wanted == "auto" else (wanted,):
        settings = {"locate.group_distance": distance}
        found[distance] = locate(replace(opened, recipe=with_settings(opened.recipe, settings)), report=report)
    return Prepared(opened, model, found, references(opened, model, "choose", tokens))


def references(opened: Opened, model: Any, split: str, tokens: int) -> dict[str, measures.Reference]:
    """The base's answers for each concept; the texts without a concept hold none of the recipe's.

    Raises BadInput when a concept has no texts in the split.
    """
    assert opened.items is not None  # prepare refuses items that are missing
    names = [concept.name for concept in opened.recipe.concepts]
    known = {}
    for name, ids in zip(names, (found.ids for found in opened.tokens)):
        own = texts_about(opened.items, [name], split)[0]
        free = texts_about(opened.items, names, split)[1]
        if not own or not free:
            raise BadInput(f"the items hold no texts to tune on with and without {name}; give others, or more text.")
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        known[name] = measures.reference(
            model, opened.tokenizer, ids, concept_texts=own, other_texts=free, longest=longest, token_limit=tokens
        )
    return known


# Settings.


def suggest(trial: Any, prepared: Prepared) -> dict[str, Any]:
    """The settings of one trial by their keys in the recipe, and `target`, the share of the mass it aims to leave."""
    recipe, layers = prepared.opened.recipe, prepared.opened.checkpoint.layers
    settings: dict[str, Any] = {}
    if len(prepared.found) > 1:
        settings["locate.group_distance"] = trial.suggest_categorical("locate.group_distance", list(prepared.found))
    # Both ranges hold the middle layer, so that a concept is never looked for in one end of the model alone.
    first = trial.suggest_int("first layer", 0, layers // 2)
    last = trial.suggest_int("last layer", layers // 2, layers - 1)
    settings["locate.layers"] = list(range(first, last + 1))
    if len(recipe.locate.matrices) > 1:
        choices = ["+".join(recipe.locate.matrices), *recipe.locate.matrices]
        settings["locate.matrices"] = trial.suggest_categorical("locate.matrices", choices).split("+")
    if recipe.edit.method == "lm-head-located":
        settings["select.lm_head_z"] = trial.suggest_float("select.lm_head_z", 0.2, 3.0, log=True)
    else:
        settings["select.share"] = trial.suggest_float("select.share", 0.05, 0.9)
        settings["select.support"] = trial.suggest_float("select.support", 0.5, 4.0)
        settings["select.top"] = trial.suggest_int("select.top", 3, 20)
    settings["edit.direction"] = trial.suggest_categorical("edit.direction", ["least-collateral", "plain"])
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
        "target": target,
    }
    if len(prepared.found) > 1:
        parameters["locate.group_distance"] = next(iter(prepared.found))
    if len(recipe.locate.matrices) > 1:
        parameters["locate.matrices"] = "+".join(recipe.locate.matrices)
    return parameters


def with_settings(recipe: Recipe, settings: dict[str, Any]) -> Recipe:
    """The recipe with other values at dotted keys such as `edit.ridge`; `target` is the search's own and left out."""
    content = recipe.model_dump(mode="json", by_alias=True)
    for key, value in settings.items():
        if key != "target":
            section, name = key.split(".")
            content[section][name] = value
    return parse_recipe(content)


# One trial.


def built(prepared: Prepared, settings: dict[str, Any]) -> Edit:
    """The edit of some settings. Raises Failure when they leave no neuron to change."""
    recipe = with_settings(prepared.opened.recipe, settings)
    distance = settings.get("locate.group_distance", next(iter(prepared.found)))
    inside = None if recipe.locate.layers is None else set(recipe.locate.layers)
    found = []
    for located in prepared.found[distance]:
        channels = [
            channel
            for channel in located.channels
            if (inside is None or channel.layer in inside) and channel.matrix in recipe.locate.matrices
        ]
        found.append(replace(located, chosen=choose_channels(channels, located.tokens, located.ids, recipe)))
    opened = replace(prepared.opened, recipe=recipe)
    return edits_of(opened, found, [recipe.edit.method], prepared.model)[recipe.edit.method]


def try_settings(prepared: Prepared, settings: dict[str, Any]) -> Tried:
    """Build the edit, solve each concept's strength for the trial's target, and measure removal and damage.

    A concept whose strength in the recipe is negative is amplified at that strength times `target / 0.1`. Raises
    Failure when nothing is left to change or no strength reaches the target.
    """
    started = time.monotonic()
    edit = built(prepared, settings)
    strengths = {}
    for concept in prepared.opened.recipe.concepts:
        own = curves.only(edit, concept.name)
        if not own.changes:
            raise Failure(f"no neuron is left to change for {concept.name}.")
        given = concept.strength
        if given != "auto" and float(given) < 0:
            strengths[concept.name] = float(given) * settings["target"] / OWN_TARGETS[0]
        else:
            strengths[concept.name] = _solved(prepared, own, concept.name, settings["target"])
    removal, damage = effect(prepared.model, prepared.known, at_strengths(edit, strengths), strengths)
    return Tried(settings, strengths, removal, damage, time.monotonic() - started)


def at_strengths(edit: Edit, strengths: dict[str, float]) -> Edit:
    """The edit with each concept's changes at its own strength."""
    return replace(edit, changes=tuple(replace(change, strength=strengths[change.concept]) for change in edit.changes))


def effect(
    model: Any, known: dict[str, measures.Reference], edit: Edit, strengths: dict[str, float]
) -> tuple[float, float]:
    """Mean removal over concepts and collateral KL of an edit as it stands."""
    removals = []
    with applied(model, edit):
        for name, reference in known.items():
            left = _left(model, reference)
            removals.append(1 - left if strengths[name] > 0 else 1 - 1 / max(left, 1e-9))
        reference = next(iter(known.values()))
        sums, counts = measures.kl_by_text(model, reference.others, reference.others_base)
    return sum(removals) / len(removals), float(sums.sum() / counts.sum())


def _left(model: Any, reference: measures.Reference) -> float:
    sums, _ = measures.mass_by_text(model, reference.concept, reference.concept_ids)
    return float(sums.sum() / reference.concept_mass[0].sum())


def _solved(prepared: Prepared, edit: Edit, name: str, target: float) -> float:
    def left(strength: float) -> float:
        with applied(prepared.model, edit, strength):
            return _left(prepared.model, prepared.known[name])

    return secant_strength(left, target)


def secant_strength(left: Callable[[float], float], target: float) -> float:
    """A strength that leaves about `target` (within a tenth, usually after three measurements).

    left: the share of the mass that a strength leaves. The logarithm of the share is taken as linear in the strength
    through 0 and the last point, then between the two last points around the target. Raises Failure when no strength
    up to 64 gets there.
    """
    low, high = (0.0, 1.0), None
    strength = 4.0
    for _ in range(SECANTS + 6):
        share = max(left(strength), 1e-9)
        if 1 / NEAR_ENOUGH < share / target < NEAR_ENOUGH:
            return strength
        if share > target:
            low = (strength, share)
        else:
            high = (strength, share)
        if high is None:
            if strength >= curves.STRONGEST:
                raise Failure(f"no strength up to {curves.STRONGEST:g} leaves {target:.0%} of the concept.")
            fall = math.log(1 / share) / strength
            guess = math.log(1 / target) / fall if fall > 0 else 2 * strength
            strength = min(max(guess, 1.5 * strength), 3 * strength, curves.STRONGEST)
        else:
            part = math.log(low[1] / target) / math.log(low[1] / high[1])
            strength = low[0] + min(0.9, max(0.1, part)) * (high[0] - low[0])
    return strength


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
    from optuna.storages.journal import JournalFileBackend

    checked_pick(pick)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    opened = open_recipe(recipe, output)
    _own_folder(output, recipe_text(recipe), tokens)
    started = time.monotonic()
    prepared = prepare(opened, tokens=tokens, report=report)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(output / JOURNAL)))
    study = optuna.create_study(
        study_name=STUDY, storage=storage, directions=["maximize", "minimize"], load_if_exists=True
    )
    done = len(finished(study))
    # Another seed for a search that goes on, or it would try the same settings again.
    study.sampler = optuna.samplers.TPESampler(seed=seed + done, n_startup_trials=STARTUP_TRIALS, multivariate=True)
    if not study.trials:
        for target in OWN_TARGETS:
            study.enqueue_trial(own_parameters(recipe, prepared, target))

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
    front = [tried[place] for place in places]
    chosen = picked([one.point for one in front], pick)
    return {
        "trials": [vars(one) for one in tried],
        "failed": failures,
        "front": places,
        "pick": pick,
        "chosen": chosen,
        "report": held_out(prepared, front[chosen], tokens),
        "seed": seed,
        "tokens": tokens,
    }


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
        generations=0,
        seed=recipe.seed,
    )
    found = evaluate(prepared.model, opened.tokenizer, variants, plan, opened.items, report=report)
    return [found.result["variants"][variant.name]["summary"] for variant in variants]


def held_out(prepared: Prepared, chosen: Tried, tokens: int) -> dict[str, Any] | None:
    """The choice and the recipe's own settings at the same removal on the texts for reporting.

    None when the recipe's own settings find no neuron or never reach that removal."""
    known = references(prepared.opened, prepared.model, "report", tokens)
    there = replace(prepared, known=known)
    removal, damage = effect(
        prepared.model, known, at_strengths(built(there, chosen.settings), chosen.strengths), chosen.strengths
    )
    result: dict[str, Any] = {"removal": removal, "damage": damage, "own_removal": None, "own_damage": None}
    recipe = prepared.opened.recipe
    own = {"target": 1 - removal} | (
        {"locate.group_distance": next(iter(prepared.found))} if len(prepared.found) > 1 else {}
    )
    if removal < 1 and all(strength > 0 for strength in chosen.strengths.values()):
        try:
            default = try_settings(there, own)
        except Failure as failure:
            return result | {"own_failure": str(failure), "method": recipe.edit.method}
        result |= {"own_removal": default.removal, "own_damage": default.damage}
    return result | {"method": recipe.edit.method}


def write_record(recipe: Recipe, record: dict[str, Any], output: Path) -> None:
    """front.json, front.png and the chosen recipe, each whole or not at all."""
    from rotate_edit.tune_figure import front_figure

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
