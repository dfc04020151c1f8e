"""From a concept's tokens to the neurons that carry it: scan, decompose the candidates, choose.

Matrices are read one at a time, so that a model larger than memory can be searched.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from rotate_edit.channels.channel_set import Channel
from rotate_edit.channels.decompose import decompose_neurons
from rotate_edit.channels.scan import TokenMoments, concept_z, token_moments
from rotate_edit.channels.solver import SolverSettings
from rotate_edit.console import Report, silent
from rotate_edit.errors import BadInput
from rotate_edit.models.architectures import Neuron
from rotate_edit.models.checkpoint import Checkpoint, read_matrix
from rotate_edit.vocabulary.concept import TokenSet, group_tokens
from rotate_edit.vocabulary.projection import Projections, Vocabulary

# The index of the channel that a search finds from the first concept's first group; its groups count on, and every
# further concept begins with the next multiple.
ASKED = 1000


@dataclass(frozen=True, order=True)
class Site:
    """One neuron matrix of a checkpoint.

    Attributes:
        layer: Its layer.
        expert: Its expert, -1 in dense layers.
        matrix: "gate", "in" or "out".
    """

    layer: int
    expert: int
    matrix: str

    @property
    def expert_or_none(self) -> int | None:
        """The expert as the rest of the package writes it."""
        return None if self.expert < 0 else self.expert

    def neuron(self, row: int) -> Neuron:
        """The address of one of its neurons."""
        return Neuron(self.layer, row, self.expert_or_none)


@dataclass(frozen=True)
class SearchSettings:
    """How the channels of a concept are looked for.

    Attributes:
        solver: How candidates are decomposed.
        candidates: How many neurons of each matrix kind the scan passes on, for each group of tokens.
        tilted_start: Whether each candidate is also searched from the concept's own direction.
        top: How many of a channel's strongest tokens are looked at.
        share: The fraction of them that must be words of the concept.
        support: Channels with less support are never chosen.
    """

    solver: SolverSettings
    candidates: int = 300
    tilted_start: bool = True
    top: int = 10
    share: float = 0.5
    support: float = 2.0


@dataclass(frozen=True)
class ConceptGroup:
    """One group of a concept's tokens, and the channels that carry it.

    Attributes:
        tokens: The whole concept's token set.
        number: Which of the concept's groups this is.
        ids: The group's tokens, int64 [n].
        scores: Each matrix's mean LM-head z-score of the group's tokens, float32 [neurons]. Empty without a scan.
        candidates: The rows of each matrix that the scan passed on. Empty without a channel search.
        channels: Every channel of the candidates.
        chosen: Those that carry the group.
    """

    tokens: TokenSet
    number: int
    ids: Tensor
    scores: dict[Site, Tensor]
    candidates: dict[Site, Tensor]
    channels: tuple[Channel, ...] = ()
    chosen: tuple[Channel, ...] = ()

    @property
    def name(self) -> str:
        """The concept's name."""
        return self.tokens.name


def sites_of(checkpoint: Checkpoint, matrices: Sequence[str], layers: Sequence[int] | None = None) -> list[Site]:
    """The neuron matrices of some kinds in some layers, in order.

    Args:
        checkpoint: Of the model.
        matrices: Kinds of matrices, of "gate", "in" and "out".
        layers: The layers. All when left out.

    Raises:
        BadInput: The model has no such layer or matrix.
    """
    missing = [matrix for matrix in matrices if matrix not in checkpoint.matrices]
    if missing:
        raise BadInput(
            f"locate.matrices: the model {checkpoint.source} has no {missing[0]!r} matrix, "
            f"only {', '.join(checkpoint.matrices)}."
        )
    chosen = layers if layers is not None else list(range(checkpoint.layers))
    beyond = [layer for layer in chosen if layer >= checkpoint.layers]
    if beyond:
        raise BadInput(
            f"locate.layers: layer {beyond[0]} is out of range, the model {checkpoint.source} has layers 0 to "
            f"{checkpoint.layers - 1}."
        )
    return sorted(
        Site(layer, expert, matrix)
        for layer in set(chosen)
        for expert in _experts(checkpoint, layer)
        for matrix in matrices
    )


def _experts(checkpoint: Checkpoint, layer: int) -> Sequence[int]:
    count = checkpoint.experts_in(layer)
    return [-1] if count is None else range(count)


def site_of(channel: Channel) -> Site:
    """The matrix that a channel is in."""
    return Site(channel.layer, -1 if channel.expert is None else channel.expert, channel.matrix)


def scan_sites(
    checkpoint: Checkpoint, sites: Sequence[Site], projections: Projections, untrained: Tensor, ids: Tensor
) -> dict[Site, Tensor]:
    """Every neuron's mean z-score of some tokens, float32 [neurons] for each matrix.

    Mean and deviation of a projection are taken over the trained tokens. Rows that training never touched say nothing.

    Args:
        checkpoint: Of the model.
        sites: The matrices to scan.
        projections: What vectors are projected on.
        untrained: Tokens that no training text held, bool [V].
        ids: The tokens, int64 [n].
    """
    scores = {}
    moments: dict[str, TokenMoments] = {}
    for site in sites:
        vectors = read_matrix(checkpoint, site.layer, site.matrix, site.expert_or_none)
        name = projections.names[site.layer]
        table = projections.tables[name].cpu()
        if name not in moments:
            moments[name] = token_moments(table[~untrained])
        scores[site] = concept_z(vectors, table, ids, moments=moments[name])
    return scores


def strongest_rows(scores: dict[Site, Tensor], count: int) -> dict[Site, Tensor]:
    """The rows with the highest |score| over all layers, `count` of each matrix kind: int64, ascending, by matrix."""
    chosen = {}
    for matrix in dict.fromkeys(site.matrix for site in scores):
        of_kind = [site for site in scores if site.matrix == matrix]
        strongest = torch.cat([scores[site].abs() for site in of_kind])
        places = strongest.topk(min(count, len(strongest))).indices
        start = 0
        for site in of_kind:
            inside = places[(places >= start) & (places < start + len(scores[site]))] - start
            chosen[site] = inside.sort().values
            start += len(scores[site])
    return chosen


def concept_share(channel: Channel, token_ids: frozenset[int], top: int) -> float:
    """The fraction of a channel's `top` strongest tokens that belong to the concept."""
    strongest = channel.token_ids[:top]
    return sum(index in token_ids for index in strongest) / max(1, len(strongest))


def choose_channels(
    channels: Sequence[Channel], tokens: TokenSet, ids: Tensor, settings: SearchSettings
) -> tuple[Channel, ...]:
    """The supported channels of a group of tokens.

    Enough of a channel's strongest tokens must be the concept's, and the strongest of those must be the group's. As
    many of the strongest tokens are looked at as the group has, at least two and at most `settings.top`.

    Args:
        channels: The channels to choose from.
        tokens: The whole concept's token set.
        ids: The group's tokens, int64 [n].
        settings: With `top`, `share` and `support`.
    """
    concept, group = frozenset(tokens.ids.tolist()), frozenset(ids.tolist())
    top = min(settings.top, max(2, len(group)))
    return tuple(
        channel
        for channel in channels
        if channel.support >= settings.support
        and next((index for index in channel.token_ids[:top] if index in concept), None) in group
        and concept_share(channel, concept, top) >= settings.share
    )


def divide_tokens(
    projections: Projections, vocabulary: Vocabulary, tokens: TokenSet, distance: float
) -> list[ConceptGroup]:
    """A concept's tokens in groups that point the same way. Nothing is scanned or searched.

    Args:
        projections: What vectors are projected on.
        vocabulary: With the tokens that training touched.
        tokens: The concept's token set.
        distance: The cosine distance at which tokens fall into groups. 2 keeps them together.
    """
    usable = (~vocabulary.untrained).to(projections.ignored.device)
    main = projections.tables[projections.names[-1]]
    rows = (main[tokens.ids.to(main.device)] - main[usable].mean(0)).cpu()
    groups = group_tokens(rows, tokens.ids, distance)
    return [ConceptGroup(tokens, number, ids, {}, {}) for number, ids in enumerate(groups)]


def locate_concept(
    checkpoint: Checkpoint,
    sites: Sequence[Site],
    projections: Projections,
    vocabulary: Vocabulary,
    groups: Sequence[ConceptGroup],
    settings: SearchSettings,
    *,
    place: int = 0,
    channels: bool = True,
    report: Report = silent,
) -> list[ConceptGroup]:
    """Scan the matrices for each group of a concept's tokens, and choose the channels that carry it.

    Every candidate is decomposed once. The candidates of a group are searched once more from the group's own
    direction.

    Args:
        checkpoint: Of the model.
        sites: The matrices to look at.
        projections: What vectors are projected on.
        vocabulary: The tokens' texts, and which of them training touched.
        groups: From `divide_tokens`.
        settings: How channels are looked for.
        place: The concept's place among all concepts, which numbers the channels it asks for.
        channels: Whether channels are searched. Without, only the scan's scores are found.
        report: Is told how far the search is.
    """
    scanned = []
    for group in groups:
        scores = scan_sites(checkpoint, sites, projections, vocabulary.untrained, group.ids)
        scanned.append(replace(group, scores=scores))
    if not channels:
        return scanned
    with_candidates = [
        replace(group, candidates=strongest_rows(group.scores, settings.candidates)) for group in scanned
    ]
    usable = (~vocabulary.untrained).to(projections.ignored.device)
    search = partial(decompose_neurons, projections=projections, texts=vocabulary.texts, progress=report)
    everyone = sorted({neuron for group in with_candidates for neuron in _addresses(group.candidates)}, key=str)
    common = search(everyone, settings=settings.solver)
    found = []
    for group in with_candidates:
        own = list(common)
        if settings.tilted_start:
            asked = search(
                _addresses(group.candidates),
                settings=replace(settings.solver, channels=1, only_tilt=True),
                tilt=_towards(projections, group.ids, usable),
            )
            own += [replace(channel, index=ASKED * (place + 1) + group.number) for channel in asked]
        chosen = choose_channels(own, group.tokens, group.ids, settings)
        found.append(replace(group, channels=tuple(own), chosen=chosen))
    return found


def _towards(projections: Projections, ids: Tensor, usable: Tensor) -> Callable[[int, str], Tensor]:
    """By layer and matrix the direction of some tokens: their mean less the vocabulary's."""
    means = {
        name: table[ids.to(table.device)].mean(0) - table[usable].mean(0) for name, table in projections.tables.items()
    }
    return lambda layer, _matrix: means[projections.names[layer]]


def _addresses(candidates: dict[Site, Tensor]) -> list[tuple[Neuron, str]]:
    return [(site.neuron(row), site.matrix) for site in sorted(candidates) for row in candidates[site].tolist()]


def by_concept(groups: Sequence[ConceptGroup]) -> dict[str, list[ConceptGroup]]:
    """Groups of tokens by the name of their concept."""
    found: dict[str, list[ConceptGroup]] = {}
    for group in groups:
        found.setdefault(group.name, []).append(group)
    return found
