"""An edit of chosen channels: each neuron's vector less the part of it that lies along its chosen channels.

A neuron's vector w is written as `w = sum_i a_i c_i + rest`. The c_i are the unit vectors of its chosen channels, and
the coefficients a are those of least squares in their span. Turning channel i by the strength s_i gives
`w - sum_i s_i a_i c_i`. With one channel this is a projection: strength 1 takes the channel out, -1 doubles it. With
several, strength 1 for all of them takes their whole span out, and nothing is taken twice.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rotate_edit.channels.channel_set import Channel
from rotate_edit.channels.chosen import Chosen
from rotate_edit.channels.locate import Site, site_of
from rotate_edit.edits.edit import Edit, EditedVector, MatrixChange

METHOD = "chosen-channels"
# Directions of a span that are weaker than this share of its strongest one are taken for one channel found twice.
NEARLY_SAME = 1e-3

# From a matrix and some of its neurons, int64 [n], to their vectors, float32 [n, d_model].
ReadVectors = Callable[[Site, Tensor], Tensor]


@dataclass(frozen=True)
class TurnedChannel:
    """What became of one channel of an edited neuron.

    Attributes:
        name: The channel.
        sign: The side of the projection on which its tokens stand.
        tokens: Its strongest tokens.
        strength: How far it was turned. 0 for a channel that was not chosen.
        before: The vector's component along the channel, over the vector's norm before the edit.
        after: The same after the edit, over the same norm.
    """

    name: str
    sign: int
    tokens: tuple[str, ...]
    strength: float
    before: float
    after: float


@dataclass(frozen=True)
class TurnedNeuron:
    """What became of one neuron's vector.

    Attributes:
        address: The neuron.
        matrix: "gate", "in" or "out".
        cosine: Of the vector after the edit with the vector before it.
        norm_before: Of the vector.
        norm_after: Of the vector.
        channels: Its chosen channels, and the others that are known of it.
    """

    address: str
    matrix: str
    cosine: float
    norm_before: float
    norm_after: float
    channels: tuple[TurnedChannel, ...]


def coefficients(vector: Tensor, channels: Tensor) -> Tensor:
    """The coefficients of a vector in the span of some channels, by least squares.

    Directions of the span that are weaker than `NEARLY_SAME` of its strongest one do not count: nearly equal channels
    share their part evenly.

    Args:
        vector: Float [d_model].
        channels: Unit vectors, float [k, d_model].

    Returns:
        float32 [k].
    """
    inverse = torch.linalg.pinv(channels.double().T, rtol=NEARLY_SAME)
    return (inverse @ vector.double()).float()


def channel_edit(chosen: Sequence[Chosen], read: ReadVectors) -> Edit:
    """The edit that turns chosen channels by their strengths. It has no base and no settings yet.

    Args:
        chosen: The channels. No channel may be chosen twice.
        read: Reads neurons' vectors.
    """
    parts: dict[tuple[str, Site], list[tuple[int, Tensor, Tensor]]] = {}
    for site, neuron, own in _by_neuron(chosen):
        vector = read(site, torch.tensor([neuron]))[0].float()
        units = torch.stack([_unit(channel) for _, channel in own])
        for (wish, _), unit, coefficient in zip(own, units, coefficients(vector, units)):
            parts.setdefault((wish.name, site), []).append((neuron, unit, coefficient))
    strengths = {wish.name: wish.strength for wish in chosen}
    changes = tuple(
        _change(site, name, found, strengths[name]) for (name, site), found in sorted(parts.items(), key=_place)
    )
    edit = Edit(METHOD, changes, notes=tuple(sentence for wish in chosen for sentence in told(wish)))
    return replace(edit, vectors=_edited_vectors(chosen, turned_neurons(chosen, read)))


def _place(part: tuple[tuple[str, Site], object]) -> tuple[Site, str]:
    (name, site), _ = part
    return site, name


def _change(site: Site, name: str, found: list[tuple[int, Tensor, Tensor]], strength: float) -> MatrixChange:
    rows = torch.tensor(sorted({neuron for neuron, _, _ in found}), dtype=torch.int64)
    left = torch.zeros(len(rows), len(found))
    for column, (neuron, _, coefficient) in enumerate(found):
        left[int(torch.searchsorted(rows, neuron)), column] = -coefficient
    right = torch.stack([unit for _, unit, _ in found])
    return MatrixChange(site.matrix, site.layer, site.expert_or_none, rows, left, right, strength, name)


def told(wish: Chosen) -> list[str]:
    """One sentence for each channel of a wish: its name, its sign, its tokens and how far it is turned.

    Args:
        wish: With its channels.
    """
    turned = "suppressed" if wish.strength > 0 else "amplified"
    asked = "" if wish.channels[0].name == wish.name else f"{wish.name}: "
    return [
        f"{asked}{channel.name} ({'+' if channel.sign > 0 else '-'}: "
        f"{' '.join(token.strip() for token in channel.tokens[:6])}) is {turned} at strength {wish.strength:g}."
        for channel in wish.channels
    ]


def _unit(channel: Channel) -> Tensor:
    assert channel.vector is not None  # chosen channels have their vectors
    vector = channel.vector.float().cpu()
    return vector / vector.norm()


def _by_neuron(chosen: Sequence[Chosen]) -> Iterator[tuple[Site, int, list[tuple[Chosen, Channel]]]]:
    """Every neuron with its chosen channels and their wishes, in order."""
    found: dict[tuple[Site, int], list[tuple[Chosen, Channel]]] = {}
    for wish in chosen:
        for channel in wish.channels:
            found.setdefault((site_of(channel), channel.neuron), []).append((wish, channel))
    for (site, neuron), own in sorted(found.items(), key=lambda entry: entry[0]):
        yield site, neuron, own


def turned_neurons(chosen: Sequence[Chosen], read: ReadVectors) -> tuple[TurnedNeuron, ...]:
    """What an edit of chosen channels makes of every neuron, and of the neuron's other channels.

    Args:
        chosen: The channels.
        read: Reads neurons' vectors.
    """
    found = []
    for site, neuron, own in _by_neuron(chosen):
        vector = read(site, torch.tensor([neuron]))[0].float()
        units = torch.stack([_unit(channel) for _, channel in own])
        strengths = torch.tensor([wish.strength for wish, _ in own])
        after = vector - (strengths * coefficients(vector, units)) @ units
        names = {channel.name for _, channel in own}
        beside = [
            channel
            for wish in chosen
            for channel in wish.beside
            if (site_of(channel), channel.neuron) == (site, neuron) and channel.name not in names
        ]
        every = [(wish.strength, channel) for wish, channel in own]
        every += [(0.0, channel) for channel in {channel.name: channel for channel in beside}.values()]
        norm = float(vector.norm().clamp(min=1e-30))
        channels = tuple(
            TurnedChannel(
                channel.name,
                channel.sign,
                channel.tokens,
                strength,
                float(vector @ _unit(channel)) / norm,
                float(after @ _unit(channel)) / norm,
            )
            for strength, channel in every
        )
        cosine = float(torch.nn.functional.cosine_similarity(vector, after, dim=0))
        address = str(site.neuron(neuron))
        found.append(TurnedNeuron(address, site.matrix, cosine, float(vector.norm()), float(after.norm()), channels))
    return tuple(found)


def _edited_vectors(chosen: Sequence[Chosen], turned: Sequence[TurnedNeuron]) -> tuple[EditedVector, ...]:
    """The same in the form that an edit keeps, one entry for each neuron and wish. The score is the support."""
    neurons = {(neuron.address, neuron.matrix): neuron for neuron in turned}
    vectors = []
    for site, row, own in _by_neuron(chosen):
        neuron = neurons[str(site.neuron(row)), site.matrix]
        for wish in dict.fromkeys(wish.name for wish, _ in own):
            channels = [channel for other, channel in own if other.name == wish]
            vectors.append(
                EditedVector(
                    neuron.address,
                    neuron.matrix,
                    wish,
                    tuple(channel.name for channel in channels),
                    max(channel.support for channel in channels),
                    neuron.cosine,
                    neuron.norm_before,
                    neuron.norm_after,
                )
            )
    return tuple(vectors)
