"""What an edit of chosen channels does to the running model, channel by channel, on some text.

A `gate` or `in` channel is looked at where its tokens stand in the text: how active is its neuron there, and elsewhere?
An `out` channel is looked at where its neuron is most active: how probable are its tokens there, and elsewhere? Every
figure is taken of the base and of the edited model, whose other channels are turned as well. The divergence of the two
models' predictions says what happened elsewhere.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rotate_edit.channels.channel_set import Channel
from rotate_edit.channels.chosen import Chosen
from rotate_edit.edits.apply import applied
from rotate_edit.edits.edit import Edit
from rotate_edit.evaluation.faithfulness import Activity, activations, read_activity
from rotate_edit.models.batches import Passages, next_logits, real_positions

# Of the text's positions: those at which a neuron counts as most active.
MOST_ACTIVE = 0.01
FEWEST = 5


@dataclass(frozen=True)
class Effect:
    """One channel in the base and in the edited model.

    Attributes:
        name: The channel.
        sign: The side of the projection on which its tokens stand.
        tokens: Its strongest tokens.
        strength: How far it was turned.
        measure: "activation" (mean absolute activation of the neuron) for `gate` and `in`; "probability" (mean
            probability of the tokens together) for `out`.
        places: At how many positions: where the tokens stand, or where the neuron is most active.
        before: The measure there in the base.
        after: The measure there in the edited model.
        before_elsewhere: The measure at all other positions in the base.
        after_elsewhere: The measure at all other positions in the edited model.
        divergence: Mean KL divergence of the edited model's predictions from the base's there, in nats.
        divergence_elsewhere: The same at all other positions.
    """

    name: str
    sign: int
    tokens: tuple[str, ...]
    strength: float
    measure: str
    places: int
    before: float
    after: float
    before_elsewhere: float
    after_elsewhere: float
    divergence: float
    divergence_elsewhere: float


def channel_effects(model: Any, passages: Passages, chosen: Sequence[Chosen], edit: Edit) -> tuple[list[Effect], float]:
    """Measure an edit of chosen channels on a text.

    A channel of an expert is left out, since which expert reads a token depends on the router. So is one that the text
    says nothing about: fewer than `FEWEST` positions.

    Args:
        model: The loaded base model.
        passages: The text.
        chosen: The channels.
        edit: The edit that turns them.

    Returns:
        One effect for each channel, and the mean KL divergence over all positions in nats.
    """
    wanted = [(wish.strength, channel) for wish in chosen for channel in wish.channels]
    divergence, masses = _both(model, passages, [channel for _, channel in wanted], edit)
    dense = [(strength, channel) for strength, channel in wanted if channel.expert is None]
    layers = sorted({channel.layer for _, channel in dense})
    seen = read_activity(model, passages, layers) if dense else None
    found = []
    if seen is not None:
        base = {channel.name: _active(model, channel, seen) for _, channel in dense}
        with applied(model, edit):
            # What the layers read may itself be changed by edited layers below them.
            now = read_activity(model, passages, layers)
            edited = {channel.name: _active(model, channel, now) for _, channel in dense}
        for strength, channel in dense:
            places = _places(channel, seen, base[channel.name])
            if int(places.sum()) < FEWEST or bool(places.all()):
                continue
            if channel.matrix == "out":
                measure, before, after = "probability", *masses[channel.name]
            else:
                measure, before, after = "activation", base[channel.name].abs(), edited[channel.name].abs()
            found.append(
                Effect(
                    channel.name,
                    channel.sign,
                    channel.tokens,
                    strength,
                    measure,
                    int(places.sum()),
                    *(_mean(values[there]) for there in (places, ~places) for values in (before, after)),
                    *(_mean(divergence[there]) for there in (places, ~places)),
                )
            )
    return found, _mean(divergence)


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def _active(model: Any, channel: Channel, seen: Activity) -> Tensor:
    return activations(model, channel.layer, channel.neuron, seen.inputs[channel.layer])


def _places(channel: Channel, seen: Activity, active: Tensor) -> Tensor:
    """Where a channel is looked at, bool [P]: where the neuron is most active, or at or before its tokens.

    A neuron may respond to a token or foresee it. The one at which it is more active counts.
    """
    if channel.matrix == "out":
        count = max(FEWEST, math.ceil(MOST_ACTIVE * len(active)))
        places = torch.zeros(len(active), dtype=torch.bool)
        places[active.abs().topk(min(count, len(active))).indices] = True
        return places
    ids = torch.tensor(channel.token_ids)
    at, before = torch.isin(seen.tokens, ids), torch.isin(seen.following, ids)
    if min(int(at.sum()), int(before.sum())) < FEWEST:
        return at if int(at.sum()) >= FEWEST else before
    return at if _mean(active[at].abs()) >= _mean(active[before].abs()) else before


def _both(
    model: Any, passages: Passages, channels: Sequence[Channel], edit: Edit
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """The divergence at every position, [P] in nats, and by channel its tokens' mass before and after, [P] each."""
    divergences: list[Tensor] = []
    masses: dict[str, tuple[list[Tensor], list[Tensor]]] = {channel.name: ([], []) for channel in channels}
    ids = {channel.name: torch.tensor(channel.token_ids) for channel in channels}
    for single in _one_batch_each(passages):
        base = _predicted(model, single)
        with applied(model, edit):
            edited = _predicted(model, single)
        divergences.append((base.exp() * (base - edited)).sum(-1).cpu())
        for name, lists in masses.items():
            for predicted, listed in zip((base, edited), lists, strict=True):
                listed.append(predicted[:, ids[name].to(predicted.device)].exp().sum(-1).cpu())
    return torch.cat(divergences), {name: (torch.cat(one), torch.cat(two)) for name, (one, two) in masses.items()}


def _one_batch_each(passages: Passages) -> Iterator[Passages]:
    for batch, lengths, order in zip(passages.batches, passages.lengths, passages.order, strict=True):
        yield Passages((batch,), (lengths,), (order,), len(batch))


def _predicted(model: Any, single: Passages) -> Tensor:
    """Log-probabilities at the real positions of one batch, float32 [P, V]."""
    (logits,) = next_logits(model, single)
    real = real_positions(single.batches[0], single.lengths[0]).to(logits.device)
    return torch.log_softmax(logits[real].float(), dim=-1)
