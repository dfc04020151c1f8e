"""One trial of a search: settings in, the edit built on one loaded model, removal and damage out.

Nothing is written. Channels are searched once for each division of the concept into groups; a trial only chooses among
them, and solves for the strength that leaves the share of the concept it aims at.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rotate_edit.channels.locate import Fitted, Located, choose_channels
from rotate_edit.console import Report, silent
from rotate_edit.edits.apply import applied
from rotate_edit.edits.build import edits_of, fit_changes
from rotate_edit.edits.edit import KEYED, TOKEN_METHODS, WHOLE_LAYER, Edit
from rotate_edit.edits.key_moments import KeyMoments, even_reading, fit_keys, key_moments, last_moments
from rotate_edit.errors import BadInput, Failure
from rotate_edit.evaluation import curves, measures, statistics
from rotate_edit.evaluation.evaluate import texts_about
from rotate_edit.models import batches
from rotate_edit.models.checkpoint import read_unembedding
from rotate_edit.models.output_head import Positions, OutputHead, positions, output_head_of
from rotate_edit.models.self_text import self_text
from rotate_edit.pipeline import GROUP_DISTANCES, Opened, locate
from rotate_edit.recipe import Recipe, parse_recipe
from rotate_edit.search import pareto

TOKENS = 1200
# What an amplified concept's strength is multiplied by is its target over this.
USUAL_TARGET = 0.1
# Rounds of steps of a search's fit and its rank over the recipe's; a trial takes as much of both as it says.
SEARCHED_ROUNDS, SEARCHED_RANKS = 3, 4
SECANTS = 10
NEAR_ENOUGH = 1.1
# The recipe's own damage is interpolated between these multiples of the strength that was solved for.
AROUND = (0.85, 1.0, 1.15)


@dataclass(frozen=True)
class Prepared:
    """What all trials share: the opened recipe, the loaded base, what was located for each division into groups,
    and the base's answers for each concept on a split of the texts; for the methods that take a whole layer also its
    moments on text of its own, in the layers that may be the last one edited, and if it is fitted by concept the
    factors of the fit after each round of its steps, what raises a logit alike everywhere where a concept is
    amplified, and what the last layer holds on the texts."""

    opened: Opened
    model: Any
    found: dict[float, tuple[Located, ...]]
    known: dict[str, measures.Reference]
    moments: KeyMoments | None = None
    changes: Mapping[str, Sequence[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    reading: Tensor | None = None
    ends: "Ends | None" = None


@dataclass(frozen=True)
class Ends:
    """What the last layer holds on the texts of some references, for edits that change nothing before it: by concept
    the positions where the text goes on with it and its mass there, those of the texts without a concept and the
    base's log-probabilities there [n, V], and the end of the model. The base's answers are the end's own, in float32,
    which a model in bfloat16 does not repeat exactly."""

    tail: OutputHead
    concept: Mapping[str, Positions]
    mass: Mapping[str, float]
    others: Positions
    base: Tensor


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
    """Load the model, search the channels and measure the base. Raises BadInput without texts to measure on and for a
    method without settings."""
    if opened.items is None:
        raise BadInput("tune needs texts to measure on; give evaluate.items or evaluate.text in the recipe.")
    recipe = opened.recipe
    if recipe.edit.method in TOKEN_METHODS:
        raise BadInput(
            f"edit.method: {recipe.edit.method} has nothing to search but the strength; try some with run, or name "
            "another method."
        )
    model = opened.load_base()
    wanted = recipe.locate.group_distance
    distances = GROUP_DISTANCES if wanted == "auto" else (wanted,)
    found = {}
    # A keyed edit fits every place where the concept comes next, so there is nothing for groups to add.
    for distance in distances[:1] if recipe.edit.method in KEYED else distances:
        settings: dict[str, Any] = {"locate.group_distance": distance}
        if recipe.edit.method in WHOLE_LAYER:
            # No channel enters the edit, so hardly any is searched.
            settings |= {"locate.candidates": 1, "decompose.channels": 1}
        found[distance] = locate(replace(opened, recipe=with_settings(opened.recipe, settings)), report=report)
    moments, changes, reading = None, {}, None
    if recipe.edit.method in WHOLE_LAYER:
        groups = [located.ids for located in next(iter(found.values()))]
        rows = {layer: torch.arange(opened.checkpoint.neurons_in(layer)) for layer in last_layers(opened)}
        samples = self_text(model, opened.tokenizer, tokens=recipe.edit.key_tokens, seed=recipe.seed)
        if recipe.edit.method == "fitted":
            (located,) = found.values()
            report("fit", 0, 1)
            tail, seen = output_head_of(model), positions(model, samples)
            head = read_unembedding(opened.checkpoint) if recipe.edit.direction == "least-divergence" else None
            moments = last_moments(seen, tail, next(iter(rows)), groups, head)
            rounds, rank = finest_fit(opened)
            fine = replace(opened, recipe=with_settings(recipe, {"edit.fit_rank": rank}))
            if any(concept.amplified for concept in recipe.concepts):
                reading = even_reading(model, samples)
            changes = fit_changes(fine, located, _keys(moments, recipe, located), tail, seen, rounds)
        else:
            moments = key_moments(model, samples, rows, groups, read_unembedding(opened.checkpoint))
    prepared = Prepared(opened, model, found, {}, moments, changes, reading)
    return measured_on(prepared, references(opened, model, "validation", tokens))


def measured_on(prepared: Prepared, known: dict[str, measures.Reference]) -> Prepared:
    """The same on other texts. An edit of the last layer alone needs one pass over them for all trials."""
    recipe = prepared.opened.recipe
    on_rows = recipe.edit.embeddings or any(concept.amplified for concept in recipe.concepts)
    if recipe.edit.method != "fitted" or on_rows:
        return replace(prepared, known=known)
    tail = output_head_of(prepared.model)
    concept, mass = {}, {}
    for name, reference in known.items():
        seen, says = positions(prepared.model, reference.concept), []
        for batch, lengths in zip(reference.concept.batches, reference.concept.lengths):
            next_is = torch.zeros_like(batch, dtype=torch.bool)
            next_is[:, :-1] = torch.isin(batch, reference.concept_ids)[:, 1:]
            real = batches.real_positions(batch, lengths)
            next_is[:, :-1] &= real[:, 1:]
            says.append(next_is[real])
        concept[name] = seen.at(torch.cat(says).to(seen.residual.device))
        mass[name] = _mass(tail.log_probabilities(concept[name].residual), reference.concept_ids)
    others = positions(prepared.model, next(iter(known.values())).others)
    base = tail.log_probabilities(others.residual)
    return replace(prepared, known=known, ends=Ends(tail, concept, mass, others, base))


def _mass(predicted: Tensor, token_ids: Tensor) -> float:
    return float(predicted[:, token_ids.to(predicted.device)].exp().cpu().double().sum())


def last_layers(opened: Opened) -> list[int]:
    """The layers that may be the last one edited: of those the recipe looks at, the upper half, for keyed edits two,
    for a fitted one the last."""
    layers = sorted(opened.recipe.locate.layers or range(opened.checkpoint.layers))
    if opened.recipe.edit.method == "fitted":
        return layers[-1:]
    return layers[-2:] if opened.recipe.edit.method in KEYED else layers[len(layers) // 2 :]


def finest_fit(opened: Opened) -> tuple[int, int]:
    """Rounds and rank of a search's fit: the recipe's own, or as many rounds as a search has time for and as many
    directions as still make a small adapter."""
    own = opened.recipe.edit
    return max(own.fit_rounds, SEARCHED_ROUNDS), min(SEARCHED_RANKS * own.fit_rank, opened.checkpoint.hidden_size)


def references(
    opened: Opened, model: Any, split: str, tokens: int, *, from_the_end: bool = False
) -> dict[str, measures.Reference]:
    """The base's answers for each concept; the texts without a concept hold none of the recipe's.

    from_the_end: take the split's last texts instead of its first, for a second look at other texts. Raises BadInput
    when a concept has no texts in the split.
    """
    assert opened.items is not None  # prepare refuses items that are missing
    names = [concept.name for concept in opened.recipe.concepts]
    known = {}
    for name, ids in zip(names, (found.ids for found in opened.tokens)):
        own = texts_about(opened.items, [name], split)[0]
        free = texts_about(opened.items, names, split)[1]
        if not own or not free:
            raise BadInput(f"the items hold no texts to tune on with and without {name}; give others, or more text.")
        if from_the_end:
            own, free = own[::-1], free[::-1]
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        known[name] = measures.reference(
            model, opened.tokenizer, ids, concept_texts=own, other_texts=free, longest=longest, token_limit=tokens
        )
    return known


def with_settings(recipe: Recipe, settings: dict[str, Any]) -> Recipe:
    """The recipe with other values at dotted keys such as `edit.ridge`; `target` is the search's own and left out."""
    content = recipe.model_dump(mode="json", by_alias=True)
    for key, value in settings.items():
        if key != "target":
            section, name = key.split(".")
            content[section][name] = value
    return parse_recipe(content)


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
    opened, method = replace(prepared.opened, recipe=recipe), recipe.edit.method
    return edits_of(opened, found, [method], prepared.model, _fitted(prepared, recipe, found))[method]


def _fitted(prepared: Prepared, recipe: Recipe, found: Sequence[Located]) -> Fitted | None:
    """The fit of a trial from the moments that all trials share; None for other methods (none, or their own)."""
    if prepared.moments is None:
        return None
    # The directions of a fit come by their weight, so fewer of them are the fit of a smaller rank.
    rank, rounds = recipe.edit.fit_rank, recipe.edit.fit_rounds
    fits = {name: after[rounds - 1] for name, after in prepared.changes.items()}
    changes = {name: (left[:, :rank], right[:rank]) for name, (left, right) in fits.items()}
    return replace(_keys(prepared.moments, recipe, found), changes=changes, reading=prepared.reading)


def _keys(moments: KeyMoments, recipe: Recipe, found: Sequence[Located]) -> Fitted:
    last = max(recipe.locate.layers or moments.rows)
    keys = {
        (located.concept.name, located.group): dict.fromkeys(
            WHOLE_LAYER, fit_keys(moments, place, {last: moments.rows[last]}, ridge=recipe.edit.key_ridge)
        )
        for place, located in enumerate(found)
    }
    return Fitted(keys, moments.metric if recipe.edit.direction == "least-divergence" else None)


def try_settings(prepared: Prepared, settings: dict[str, Any]) -> Tried:
    """Build the edit, solve each concept's strength for the trial's target, and measure removal and damage.

    An amplified concept keeps the recipe's strength, times `target / 0.1` where nothing is lowered, so that the search
    has something to vary. Raises Failure when nothing is left to change or no strength reaches the target.
    """
    started = time.monotonic()
    edit = built(prepared, settings)
    concepts, strengths = prepared.opened.recipe.concepts, {}
    raising = settings["target"] / USUAL_TARGET if all(concept.amplified for concept in concepts) else 1.0
    for concept in concepts:
        own = curves.only(edit, concept.name)
        if not own.changes:
            raise Failure(f"no neuron is left to change for {concept.name}.")
        if concept.amplified:
            strengths[concept.name] = raising * float(concept.strength)
        else:
            strengths[concept.name] = _solved(prepared, own, concept.name, settings["target"])
    removal, damage = effect(prepared, at_strengths(edit, strengths), strengths)
    return Tried(settings, strengths, removal, damage, time.monotonic() - started)


def at_strengths(edit: Edit, strengths: dict[str, float]) -> Edit:
    """The edit with each concept's changes at its own strength."""
    return replace(edit, changes=tuple(change.at(strengths[change.concept]) for change in edit.changes))


def effect(prepared: Prepared, edit: Edit, strengths: dict[str, float]) -> tuple[float, float]:
    """Mean removal over concepts and collateral KL of an edit as it stands, on the texts that are prepared."""
    removals = []
    for name, left in _left(prepared, edit, tuple(prepared.known)).items():
        removals.append(1 - left if strengths[name] > 0 else 1 - 1 / max(left, 1e-9))
    return sum(removals) / len(removals), _damage(prepared, edit)


def _left(prepared: Prepared, edit: Edit, names: Sequence[str]) -> dict[str, float]:
    """The share of each concept's mass that an edit leaves."""
    known, ends, left = prepared.known, prepared.ends, {}
    with applied(prepared.model, edit) if ends is None else nullcontext():
        for name in names:
            reference = known[name]
            if ends is None:
                after = measures.mass_by_text(prepared.model, reference.concept, reference.concept_ids)[0]
                left[name] = float(after.sum() / reference.concept_mass[0].sum())
                continue
            left[name] = _mass(_predicted(ends, ends.concept[name], edit), reference.concept_ids) / ends.mass[name]
    return left


def _damage(prepared: Prepared, edit: Edit) -> float:
    """Mean divergence from the base's predictions over all positions of the texts without a concept."""
    reference, ends = next(iter(prepared.known.values())), prepared.ends
    if ends is not None:
        divergence = torch.nn.functional.kl_div(
            _predicted(ends, ends.others, edit), ends.base, log_target=True, reduction="none"
        )
        return float(divergence.sum(1).cpu().double().mean())
    with applied(prepared.model, edit):
        sums, counts = measures.kl_by_text(prepared.model, reference.others, reference.others_base)
    return float(sums.sum() / counts.sum())


def _predicted(ends: Ends, seen: Positions, edit: Edit) -> Tensor:
    """Log-probabilities [n, V] after an edit of the last layer's `out` matrix."""
    device = seen.neurons.device
    change = torch.zeros_like(seen.residual)
    for made in edit.changes:
        vectors = made.strength * made.right.to(device)
        change += seen.neurons[:, made.rows.to(device)] @ made.left.to(device) @ vectors
    return ends.tail.log_probabilities(ends.tail.moved(seen, change))


def _solved(prepared: Prepared, edit: Edit, name: str, target: float) -> float:
    return secant_strength(lambda strength: _left(prepared, edit.with_strength(strength), [name])[name], target)


def secant_strength(left: Callable[[float], float], target: float) -> float:
    """A strength that leaves about `target` (within a tenth, usually after three measurements).

    left: the share of the mass that a strength leaves. The logarithm of the share is taken as linear in the strength
    through 0 and the last point, then between the two last points around the target. Raises Failure when no strength
    up to 64 gets there.
    """
    low, high = (0.0, 1.0), None
    strength = 4.0
    for _ in range(SECANTS):
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


# Against the recipe as it was.


def own_settings(prepared: Prepared) -> dict[str, Any]:
    """The settings that leave the recipe as it is."""
    return {"locate.group_distance": next(iter(prepared.found))} if len(prepared.found) > 1 else {}


def compared(there: Prepared, tried: Tried) -> dict[str, Any]:
    """A trial's edit on other texts, and the recipe's own settings at the same removal there.

    there: measured on those texts. Returns removal, damage and own_damage (None where concepts are amplified, or when
    the recipe's own settings find no neuron or never remove as much; `why` then says which). The own damage is
    interpolated to exactly the same removal, its logarithm linear in that of the mass.
    """
    edit = at_strengths(built(there, tried.settings), tried.strengths)
    removal, damage = effect(there, edit, tried.strengths)
    result: dict[str, Any] = {"removal": removal, "damage": damage, "own_damage": None, "why": ""}
    if any(strength < 0 for strength in tried.strengths.values()):
        return result | {"why": "amplified concepts are not compared"}
    own = own_settings(there)
    try:
        solved = try_settings(there, own | {"target": max(1e-4, 1 - removal)})
    except Failure as failure:
        return result | {"why": str(failure)}
    unscaled = built(there, own)
    masses, damages = [], []
    for factor in AROUND:
        strengths = {name: factor * strength for name, strength in solved.strengths.items()}
        reached, cost = effect(there, at_strengths(unscaled, strengths), strengths)
        masses.append(1 - reached)
        damages.append(cost)
    crossing = statistics.matched_removal(AROUND, masses, damages, target=1 - removal)
    return result | {"own_damage": crossing.damage if crossing else solved.damage}
