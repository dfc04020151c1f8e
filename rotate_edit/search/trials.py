"""One trial of a search: settings in, the edit built on one loaded model, removal and damage out.

Nothing is written. Channels are searched once for each division of the concept into groups. A trial only chooses among
them, and solves for the strength that leaves the share of the concept that it aims at.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rotate_edit.channels.locate import ConceptGroup, choose_channels, site_of
from rotate_edit.console import Report, silent
from rotate_edit.edits.apply import applied
from rotate_edit.edits.edit import Edit
from rotate_edit.edits.strength import STRONGEST, cross
from rotate_edit.errors import BadInput, Failure
from rotate_edit.evaluation import measures, statistics
from rotate_edit.evaluation.items import texts_about
from rotate_edit.evaluation.measures import Reference
from rotate_edit.models.batches import Passages, real_positions
from rotate_edit.models.cost import size_of
from rotate_edit.models.output_head import OutputHead, Positions, output_head_of, positions
from rotate_edit.search.pareto import Point
from rotate_edit.session import Session

TOKENS = 1200
# What an amplified concept's strength is multiplied by is its target over this.
USUAL_TARGET = 0.1
NEAR_ENOUGH = 1.1
# The recipe's own damage is interpolated between these multiples of the strength that was solved for.
AROUND = (0.85, 1.0, 1.15)


@dataclass(frozen=True)
class LastLayer:
    """What the last layer holds on the texts of some references, for edits that change nothing before it.

    The base's answers are the output head's own, in float32, which a model in bfloat16 does not repeat exactly.

    Attributes:
        head: What follows the last MLP.
        concept: By concept the positions where the text goes on with it.
        mass: By concept its probability mass there.
        others: The positions of the texts without a concept.
        base: The base's log-probabilities there, [n, V].
    """

    head: OutputHead
    concept: Mapping[str, Positions]
    mass: Mapping[str, float]
    others: Positions
    base: Tensor


@dataclass(frozen=True)
class SearchContext:
    """What all trials share.

    Attributes:
        session: The opened recipe, with its model.
        groups: What was located, by the distance at which a concept's tokens fall into groups.
        known: The base's answers for each concept on some texts.
        last: What the last layer holds on these texts, where the edits change nothing before it.
        shared: What edit methods computed and may use again.
    """

    session: Session
    groups: Mapping[float, tuple[ConceptGroup, ...]]
    known: Mapping[str, Reference]
    last: LastLayer | None = None
    shared: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """One trial: its settings, each concept's strength, and what they do.

    Attributes:
        settings: By the keys of `Session.with_settings`, and `target`.
        strengths: By concept.
        removal: 1 - the share of the concept's mass that is left (for an amplified concept 1 - before / after), mean
            over concepts.
        damage: Collateral KL in nats.
        seconds: How long it took.
    """

    settings: dict[str, Any]
    strengths: dict[str, float]
    removal: float
    damage: float
    seconds: float

    @property
    def point(self) -> Point:
        """(removal, damage)."""
        return self.removal, self.damage


def prepare(session: Session, *, tokens: int = TOKENS, report: Report = silent) -> SearchContext:
    """Search the channels that the methods need, do the work that trials share, and measure the base.

    Args:
        session: The opened recipe.
        tokens: Of text for each trial.
        report: Is told how far it is.

    Raises:
        BadInput: There are no texts to measure on, or the method has no settings to search.
    """
    if session.items is None:
        raise BadInput("tune needs texts to measure on; give evaluate.items or evaluate.text in the recipe.")
    methods = session.search_methods
    if not methods[0].about.writes & {"gate", "in", "out"}:
        raise BadInput(
            f"edit.method: {methods[0].about.name} has nothing to search but the strength; try some with run, or name "
            "another method."
        )
    reads = frozenset(need for method in methods for need in method.about.reads)
    distances = session.distances
    # A method that reads activations fits every place where the concept comes next: there is nothing for groups to add.
    if "activations" in reads:
        distances = distances[:1]
    groups = {distance: session.divided(distance, reads, report) for distance in distances}
    context = SearchContext(session, groups, {})
    finest = methods[0].finest(size_of(session.checkpoint))
    if finest != methods[0]:
        report("fit", 0, 1)
        session.build([finest], groups[distances[0]], context.shared)
        report("fit", 1, 1)
    return measured_on(context, references(session, "validation", tokens))


def measured_on(context: SearchContext, known: Mapping[str, Reference]) -> SearchContext:
    """The same on other texts. An edit of the last layer alone needs one pass over them for all trials."""
    session = context.session
    if not session.method.about.last_layer_alone or session.edits_token_rows:
        return replace(context, known=known, last=None)
    head = output_head_of(session.model)
    concept, mass = {}, {}
    for name, reference in known.items():
        seen = positions(session.model, reference.concept)
        goes_on = _goes_on_with(reference.concept, reference.concept_ids)
        concept[name] = seen.at(goes_on.to(seen.residual.device))
        mass[name] = _mass(head.log_probabilities(concept[name].residual), reference.concept_ids)
    others = positions(session.model, next(iter(known.values())).others)
    base = head.log_probabilities(others.residual)
    return replace(context, known=known, last=LastLayer(head, concept, mass, others, base))


def _goes_on_with(texts: Passages, ids: Tensor) -> Tensor:
    """Which of all real positions the text goes on with one of the tokens at, bool."""
    found = []
    for batch, lengths in zip(texts.batches, texts.lengths):
        real = real_positions(batch, lengths)
        next_is = torch.zeros_like(batch, dtype=torch.bool)
        next_is[:, :-1] = torch.isin(batch, ids)[:, 1:] & real[:, 1:]
        found.append(next_is[real])
    return torch.cat(found)


def _mass(predicted: Tensor, token_ids: Tensor) -> float:
    return float(predicted[:, token_ids.to(predicted.device)].exp().cpu().double().sum())


def references(session: Session, split: str, tokens: int, *, from_the_end: bool = False) -> dict[str, Reference]:
    """The base's answers for each concept. The texts without a concept hold none of the recipe's.

    Args:
        session: The opened recipe.
        split: "validation" or "test".
        tokens: Of text.
        from_the_end: Take the split's last texts instead of its first, for a second look at other texts.

    Raises:
        BadInput: A concept has no texts in the split.
    """
    assert session.items is not None  # prepare refuses items that are missing
    names = [tokens_of.name for tokens_of in session.tokens]
    longest = getattr(session.model.config.get_text_config(), "max_position_embeddings", None)
    known = {}
    for tokens_of in session.tokens:
        own = texts_about(session.items, [tokens_of.name], split)[0]
        free = texts_about(session.items, names, split)[1]
        if not own or not free:
            raise BadInput(
                f"the items hold no texts to tune on with and without {tokens_of.name}; give others, or more text."
            )
        if from_the_end:
            own, free = own[::-1], free[::-1]
        known[tokens_of.name] = measures.reference(
            session.model, session.tokenizer, tokens_of.ids, concept_texts=own, other_texts=free, longest=longest,
            token_limit=tokens,
        )  # fmt: skip
    return known


def built(context: SearchContext, settings: Mapping[str, Any]) -> Edit:
    """The edit of some settings, at strength 1.

    Raises:
        Failure: The settings leave no neuron to change.
    """
    session = context.session.with_settings(settings)
    distance = settings.get("locate.group_distance", next(iter(context.groups)))
    groups, inside, search = [], set(session.sites), session.search_settings
    for group in context.groups[distance]:
        channels = [channel for channel in group.channels if site_of(channel) in inside]
        groups.append(replace(group, chosen=choose_channels(channels, group.tokens, group.ids, search)))
    method = session.method
    return session.build([method], groups, context.shared)[method.about.name]


def try_settings(context: SearchContext, settings: dict[str, Any]) -> Trial:
    """Build the edit, solve each concept's strength for the trial's target, and measure removal and damage.

    An amplified concept keeps the recipe's strength, times `target / 0.1` where nothing is suppressed, so that the
    search has something to vary.

    Raises:
        Failure: Nothing is left to change, or no strength reaches the target.
    """
    started = time.monotonic()
    edit, strengths = built(context, settings), {}
    plan = context.session.plan
    times = settings["target"] / USUAL_TARGET if plan.only_amplifies else 1.0
    for name in plan.concepts:
        own = edit.only(name)
        if not own.changes:
            raise Failure(f"no neuron is left to change for {name}.")
        if plan.amplifies(name):
            strengths[name] = times * _amplified_strength(context, own, name)
        else:
            strengths[name] = _solved(context, own, name, settings["target"])
    removal, damage = effect(context, edit.at(strengths), strengths)
    return Trial(settings, strengths, removal, damage, time.monotonic() - started)


def _amplified_strength(context: SearchContext, edit: Edit, name: str) -> float:
    """The recipe's strength of an amplified concept, solved for once where it gives another goal."""
    known = context.shared.setdefault("amplified strengths", {})
    if name not in known:
        known[name] = context.session.solve_one(name, edit).strength
    return float(known[name])


def effect(context: SearchContext, edit: Edit, strengths: Mapping[str, float]) -> tuple[float, float]:
    """Mean removal over concepts and collateral KL of an edit as it stands, on the texts that are prepared."""
    removals = []
    for name, left in _left(context, edit, tuple(context.known)).items():
        removals.append(1 - left if strengths[name] > 0 else 1 - 1 / max(left, 1e-9))
    return sum(removals) / len(removals), _damage(context, edit)


def _left(context: SearchContext, edit: Edit, names: Sequence[str]) -> dict[str, float]:
    """The share of each concept's mass that an edit leaves."""
    model, last, left = context.session.model, _last_of(context, edit), {}
    with applied(model, edit) if last is None else nullcontext():
        for name in names:
            reference = context.known[name]
            if last is None:
                after = measures.mass_by_text(model, reference.concept, reference.concept_ids)[0]
                left[name] = float(after.sum() / reference.concept_mass[0].sum())
            else:
                left[name] = _mass(_predicted(last, last.concept[name], edit), reference.concept_ids) / last.mass[name]
    return left


def _damage(context: SearchContext, edit: Edit) -> float:
    """Mean divergence from the base's predictions over all positions of the texts without a concept."""
    reference, last = next(iter(context.known.values())), _last_of(context, edit)
    if last is not None:
        divergence = torch.nn.functional.kl_div(
            _predicted(last, last.others, edit), last.base, log_target=True, reduction="none"
        )
        return float(divergence.sum(1).cpu().double().mean())
    model = context.session.model
    with applied(model, edit):
        sums, counts = measures.kl_by_text(model, reference.others, reference.others_base)
    return float(sums.sum() / counts.sum())


def _last_of(context: SearchContext, edit: Edit) -> LastLayer | None:
    """What the last layer holds, where the edit changes nothing but its `out` matrix."""
    layer = context.session.checkpoint.layers - 1
    alone = all((change.matrix, change.layer) == ("out", layer) for change in edit.changes)
    return context.last if alone and not edit.clamps else None


def _predicted(last: LastLayer, seen: Positions, edit: Edit) -> Tensor:
    """Log-probabilities [n, V] after an edit of the last layer's `out` matrix."""
    device = seen.neurons.device
    change = torch.zeros_like(seen.residual)
    for made in edit.changes:
        vectors = made.strength * made.right.to(device)
        change += seen.neurons[:, made.rows.to(device)] @ made.left.to(device) @ vectors
    return last.head.log_probabilities(last.head.moved(seen, change))


def _solved(context: SearchContext, edit: Edit, name: str, target: float) -> float:
    """A strength that leaves about `target`, within a tenth. Raises Failure when none does."""
    found = cross(
        lambda strength: max(_left(context, edit.at(strength), [name])[name], 1e-9),
        target, start=2.0, near=NEAR_ENOUGH,
    )  # fmt: skip
    if not found.reached:
        raise Failure(f"no strength up to {STRONGEST:g} leaves {target:.0%} of the concept.")
    return found.high


# Against the recipe as it was.


def own_settings(context: SearchContext) -> dict[str, Any]:
    """The settings that leave the recipe as it is."""
    return {"locate.group_distance": next(iter(context.groups))} if len(context.groups) > 1 else {}


def compared(there: SearchContext, tried: Trial) -> dict[str, Any]:
    """A trial's edit on other texts, and the recipe's own settings at the same removal there.

    The own damage is interpolated to exactly the same removal, its logarithm linear in that of the mass.

    Args:
        there: Measured on those texts.
        tried: The trial.

    Returns:
        removal, damage and own_damage. The last is None where concepts are amplified, or where the recipe's own
        settings find no neuron or never remove as much; `why` then says which.
    """
    edit = built(there, tried.settings).at(tried.strengths)
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
        reached, cost = effect(there, unscaled.at(strengths), strengths)
        masses.append(1 - reached)
        damages.append(cost)
    crossing = statistics.matched_removal(AROUND, masses, damages, target=1 - removal)
    return result | {"own_damage": crossing.damage if crossing else solved.damage}
