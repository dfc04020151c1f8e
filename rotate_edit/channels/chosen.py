"""Channels that a user chooses: by their names, or by the words that they say.

A named channel is looked up in a channel set, or its neuron is decomposed on the spot. Channels of some words are those
of a set that carry the words, or what a search of the model finds, as for a concept.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.functional import cosine_similarity

from rotate_edit.channels.channel_set import ASKED, Channel, open_channels, parse_channel, search_channels
from rotate_edit.channels.decompose import decompose_neurons
from rotate_edit.channels.locate import (
    ConceptGroup,
    SearchSettings,
    asked_channels,
    carries,
    locate_concept,
    site_of,
    sites_of,
)
from rotate_edit.console import Report, silent
from rotate_edit.errors import BadInput, Failure
from rotate_edit.models.architectures import Neuron
from rotate_edit.models.checkpoint import Checkpoint, identity
from rotate_edit.vocabulary.concept import TokenSet
from rotate_edit.vocabulary.projection import Projections, Vocabulary

# Two channels of a neuron whose |cosine| is above this are one channel that was found twice.
SAME = 0.95
# How many of a searched neuron's other channels are looked for beside a chosen one.
BESIDE = 2


@dataclass(frozen=True)
class Wish:
    """What a user asks for: one channel by its name, or the channels of some words.

    Attributes:
        name: What it is called in tables: the channel's name, or "token:" and the words.
        strength: 1 takes the channel out of its neuron, -1 doubles it.
        channel: The channel's name. None where only words are given.
        tokens: The tokens of the words. None where a channel is named that no search found.
        matrix: The matrix that is searched for the words.
        layers: The layers that are searched. None for all.
    """

    name: str
    strength: float
    channel: str | None = None
    tokens: TokenSet | None = None
    matrix: str = "out"
    layers: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Chosen:
    """The channels that a wish stands for.

    Attributes:
        name: The wish's name.
        strength: As the wish says.
        channels: The channels, with their vectors.
        beside: Other channels of the same neurons, with their vectors.
    """

    name: str
    strength: float
    channels: tuple[Channel, ...]
    beside: tuple[Channel, ...] = ()


@dataclass(frozen=True)
class Source:
    """Where channels are looked for.

    Attributes:
        checkpoint: Of the model.
        projections: What vectors are projected on.
        vocabulary: The tokens' texts, and which of them training touched.
        settings: How channels are looked for.
        folder: A channel set of this model. None decomposes on the spot.
    """

    checkpoint: Checkpoint
    projections: Projections
    vocabulary: Vocabulary
    settings: SearchSettings
    folder: Path | None = None

    @property
    def record(self) -> dict[str, Any]:
        """Where the channels came from and how they were found, as plain JSON: what makes the edit again."""
        if self.folder is None:
            return {"solver": asdict(self.settings.solver), "rules": asdict(self.vocabulary.rules)}
        found = open_channels(self.folder)
        return {"settings": found.settings, "files": found.files}


def choose(wishes: Sequence[Wish], source: Source, report: Report = silent) -> tuple[Chosen, ...]:
    """Find the channels that a user asks for.

    Args:
        wishes: What is asked for, each under a name of its own.
        source: Where it is looked for.
        report: Is told how far the search is.

    Returns:
        One entry for each wish, in order.

    Raises:
        BadInput: A name is not possible, a channel does not exist, two wishes mean the same channel, or the channel set
            has no vectors or is of another model.
        Failure: No channel says some words.
    """
    if source.folder is not None:
        check_set(source.folder, source.checkpoint)
    found = tuple(
        _named(wish, wish.channel, source) if wish.channel is not None else _saying(wish, source, report)
        for wish in wishes
    )
    _check_distinct(found)
    return found


def check_set(folder: Path, checkpoint: Checkpoint) -> None:
    """Refuse a channel set from which no channel of a model can be edited.

    Args:
        folder: The set.
        checkpoint: Of the model.

    Raises:
        BadInput: The set has no vectors, or it was made from another model.
    """
    stored = open_channels(folder)
    if stored.vectors is None:
        raise BadInput(f"the channel set {folder.name} was written without vectors; decompose again and keep them.")
    if stored.base.get("headers") != identity(checkpoint, full=False)["headers"]:
        raise BadInput(f"the channel set {folder.name} was made from another model than {checkpoint.source}.")


def _check_distinct(chosen: Sequence[Chosen]) -> None:
    """Raises BadInput where two wishes mean one channel, whose strength would be told twice."""
    taken: dict[tuple[Any, int], list[tuple[str, Channel]]] = {}
    for wish in chosen:
        for channel in wish.channels:
            others = taken.setdefault((site_of(channel), channel.neuron), [])
            for name, other in others:
                if name != wish.name and same_channel(channel, other):
                    raise BadInput(f"{name} and {wish.name} both mean the channel {channel.name}; leave one of them.")
            others.append((wish.name, channel))


def same_channel(one: Channel, other: Channel) -> bool:
    """Whether two channels of a neuron are one that was found twice: their |cosine| is above `SAME`.

    Args:
        one: A channel with its vector.
        other: Another one.
    """
    return abs(float(cosine_similarity(_vector(one), _vector(other), dim=0))) > SAME


def _vector(channel: Channel) -> Tensor:
    assert channel.vector is not None  # every source of channels keeps them
    return channel.vector.float().cpu()


def _named(wish: Wish, name: str, source: Source) -> Chosen:
    """The channel of that name, and its neuron's others."""
    neuron, matrix, number = parse_channel(name)
    check_neuron(neuron, [matrix], source.checkpoint)
    if source.folder is not None:
        every = search_channels(source.folder, neuron=str(neuron), matrix=matrix, limit=None, vectors=True)
        where = f"The channel set {source.folder.name} holds"
    else:
        every = _decomposed(neuron, matrix, number, wish.tokens, source)
        where = "There are"
    own = [channel for channel in every if channel.index == number]
    if not own:
        names = ", ".join(channel.name for channel in every) or "none of this neuron"
        raise BadInput(f"there is no channel {name}. {where} {names}.")
    return Chosen(wish.name, wish.strength, tuple(own), _others(every, own))


def _decomposed(neuron: Neuron, matrix: str, number: int, tokens: TokenSet | None, source: Source) -> list[Channel]:
    """A neuron's channels, so many that the one of that number is among them."""
    solver = source.settings.solver
    if number < ASKED:
        solver = replace(solver, channels=max(solver.channels, number + 1))
        return decompose_neurons([(neuron, matrix)], source.projections, source.vocabulary.texts, solver)
    if tokens is None:
        raise BadInput(
            f"the channel {neuron}.{matrix}#{number} was found by a search for words; name these (token:...), or the "
            "folder that holds it with --from."
        )
    asked = asked_channels([(neuron, matrix)], tokens.ids, source.projections, source.vocabulary, source.settings)
    others = neuron_channels(neuron, [matrix], source)
    return [*(replace(channel, index=number) for channel in asked), *others]


def check_neuron(neuron: Neuron, matrices: Sequence[str], checkpoint: Checkpoint) -> None:
    """Refuse a neuron that a model does not have.

    Args:
        neuron: The neuron.
        matrices: Kinds of matrices in which it is looked for.
        checkpoint: Of the model.

    Raises:
        BadInput: There is no such layer, matrix, expert or neuron.
    """
    sites_of(checkpoint, matrices, [neuron.layer], asked="channels")
    experts = checkpoint.experts_in(neuron.layer)
    if (experts is None) != (neuron.expert is None) or (experts is not None and (neuron.expert or 0) >= experts):
        wanted = "no experts" if experts is None else f"the experts 0 to {experts - 1}, and a channel names one of them"
        raise BadInput(f"{neuron} is not in the model {checkpoint.source}: layer {neuron.layer} has {wanted}.")
    if neuron.neuron >= checkpoint.neurons_in(neuron.layer):
        raise BadInput(
            f"{neuron} is not in the model {checkpoint.source}: layer {neuron.layer} has the neurons 0 to "
            f"{checkpoint.neurons_in(neuron.layer) - 1}."
        )


def neuron_channels(neuron: Neuron, matrices: Sequence[str], source: Source) -> list[Channel]:
    """Decompose one neuron's vectors.

    Args:
        neuron: The neuron.
        matrices: Which of its vectors.
        source: The model, and how channels are looked for.

    Raises:
        BadInput: There is no such neuron.
    """
    check_neuron(neuron, matrices, source.checkpoint)
    wanted = [(neuron, matrix) for matrix in matrices]
    return decompose_neurons(wanted, source.projections, source.vocabulary.texts, source.settings.solver)


def plainly_named(found: Sequence[Channel], source: Source) -> list[Channel]:
    """Channels that a search found, each under the number that its neuron's decomposition gives it, where it has one.

    Args:
        found: The channels.
        source: The model, and how channels are looked for.
    """
    neurons = [(site_of(channel).neuron(channel.neuron), channel.matrix) for channel in found]
    plain = decompose_neurons(neurons, source.projections, source.vocabulary.texts, source.settings.solver)
    named = []
    for channel in found:
        own = [other for other in plain if _neuron_of(other) == _neuron_of(channel)]
        same = next((other for other in own if same_channel(other, channel)), None)
        named.append(channel if same is None else replace(same, p_value=channel.p_value))
    return named


def _others(every: Sequence[Channel], own: Sequence[Channel]) -> tuple[Channel, ...]:
    """The channels that are none of the chosen ones, each once."""
    found: list[Channel] = []
    for channel in every:
        near = [known for known in (*own, *found) if _neuron_of(known) == _neuron_of(channel)]
        if not any(known.name == channel.name or same_channel(known, channel) for known in near):
            found.append(channel)
    return tuple(found)


def _neuron_of(channel: Channel) -> tuple[Any, int]:
    return site_of(channel), channel.neuron


def _saying(wish: Wish, source: Source, report: Report) -> Chosen:
    """The channels whose strongest tokens are the wish's words, and their neurons' others."""
    assert wish.tokens is not None  # a wish names a channel or gives words
    if source.folder is not None:
        layers = range(source.checkpoint.layers) if wish.layers is None else wish.layers
        every, own = _in_set(wish, wish.tokens, layers, source)
    else:
        every, own = search_model(wish.tokens, wish.matrix, wish.layers, source, report)
    distinct = _others(own, ())
    if not distinct:
        raise Failure(_nothing_says(wish, every, source))
    neurons = {_neuron_of(channel) for channel in distinct}
    return Chosen(
        wish.name,
        wish.strength,
        distinct,
        _others([channel for channel in every if _neuron_of(channel) in neurons], distinct),
    )


def _in_set(wish: Wish, tokens: TokenSet, layers: Sequence[int], source: Source) -> tuple[list[Channel], list[Channel]]:
    """All channels of a set's neurons that say some words, and those among them that do, the best supported first."""
    assert source.folder is not None
    hits: dict[str, Channel] = {}
    for word in tokens.words:
        found = search_channels(source.folder, token=word, matrix=wish.matrix, limit=None, vectors=True)
        hits |= {channel.name: channel for channel in found if channel.layer in layers}
    own = [channel for channel in hits.values() if carries(channel, tokens, tokens.ids, source.settings)]
    every = {channel.name: channel for channel in own}
    for channel in own:
        neuron = str(site_of(channel).neuron(channel.neuron))
        beside = search_channels(source.folder, neuron=neuron, matrix=wish.matrix, limit=None, vectors=True)
        every |= {other.name: other for other in beside}
    return list((every or hits).values()), sorted(own, key=lambda channel: -channel.support)


def search_model(
    tokens: TokenSet, matrix: str, layers: Sequence[int] | None, source: Source, report: Report = silent
) -> tuple[list[Channel], list[Channel]]:
    """Search a model for the channels that say some words, as for a concept.

    Args:
        tokens: The tokens of the words.
        matrix: The kind of matrices that are searched.
        layers: The layers that are searched. None for all.
        source: The model, and how channels are looked for.
        report: Is told how far the search is.

    Returns:
        All channels that were looked at, with their p-values; and those of them that say the words with more support
        than chance gives, the best supported first.
    """
    settings = replace(source.settings, solver=replace(source.settings.solver, channels=BESIDE))
    (group,) = locate_concept(
        source.checkpoint,
        sites_of(source.checkpoint, [matrix], layers, asked="channels"),
        source.projections,
        source.vocabulary,
        [ConceptGroup(tokens, 0, tokens.ids, {}, {})],
        settings,
        report=report,
    )
    return list(group.channels), sorted(group.chosen, key=lambda channel: -channel.support)


def _nothing_says(wish: Wish, looked_at: Sequence[Channel], source: Source) -> str:
    """Why a wish finds nothing, with the channels that come nearest."""
    assert wish.tokens is not None
    ids = frozenset(wish.tokens.ids.tolist())
    near = sorted(
        (channel for channel in looked_at if ids & set(channel.token_ids[: source.settings.top])),
        key=lambda channel: -channel.support,
    )[:3]
    shown = "; ".join(f"{channel.name} ({' '.join(token.strip() for token in channel.tokens[:5])})" for channel in near)
    nearest = f" The nearest are {shown}." if near else ""
    where = "layers" if wish.layers is None else f"layers {wish.layers[0]} to {wish.layers[-1]}"
    advice = "Raise select.fdr or lower select.share, look in other layers or matrices, or name a channel."
    return f"no channel of the {wish.matrix} matrices of the {where} says {wish.name.removeprefix('token:')}." + (
        f"{nearest} {advice}"
    )
