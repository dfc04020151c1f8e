"""From a concept's tokens to the neurons that carry it: scan, decompose the candidates, choose.

Matrices are read one at a time, so that a model larger than memory can be searched.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rotate_edit.channels.channel_set import ASKED, Channel
from rotate_edit.channels.decompose import decompose_neurons
from rotate_edit.channels.null import Null, draw_neurons, kept_null, largest_p_value, p_values
from rotate_edit.channels.scan import TokenMoments, concept_z, token_moments
from rotate_edit.channels.solver import SolverSettings
from rotate_edit.console import Report, silent
from rotate_edit.errors import BadInput
from rotate_edit.models.architectures import Neuron
from rotate_edit.models.checkpoint import Checkpoint, read_matrix
from rotate_edit.vocabulary.concept import TokenSet, group_tokens
from rotate_edit.vocabulary.projection import Projections, Vocabulary


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
        tilted_start: Whether each candidate is searched from the concept's own direction. Its other channels are then
            looked for only where that one counts. Without, every candidate is decomposed.
        top: How many of a channel's strongest tokens are looked at.
        share: The fraction of them that must be words of the concept.
        fdr: The share of false neurons, in the mean, among those of a group that are chosen.
        draws: How many times as many neurons as the model has are drawn at random, to compare support with.
    """

    solver: SolverSettings
    candidates: int = 300
    tilted_start: bool = True
    top: int = 10
    share: float = 0.5
    fdr: float = 0.05
    draws: int = 2


Population = Callable[[Site], Tensor]
"""From a matrix to its neurons' vectors, float32 [neurons, d_model]: the model's, or drawn ones."""


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


def sites_of(
    checkpoint: Checkpoint, matrices: Sequence[str], layers: Sequence[int] | None = None, *, asked: str = "locate"
) -> list[Site]:
    """The neuron matrices of some kinds in some layers, in order.

    Args:
        checkpoint: Of the model.
        matrices: Kinds of matrices, of "gate", "in" and "out".
        layers: The layers. All when left out.
        asked: What asks for them, for messages: a section of the recipe.

    Raises:
        BadInput: The model has no such layer or matrix.
    """
    missing = [matrix for matrix in matrices if matrix not in checkpoint.matrices]
    if missing:
        raise BadInput(
            f"{asked}.matrices: the model {checkpoint.source} has no {missing[0]!r} matrix, "
            f"only {', '.join(checkpoint.matrices)}."
        )
    chosen = layers if layers is not None else list(range(checkpoint.layers))
    beyond = [layer for layer in chosen if layer >= checkpoint.layers]
    if beyond:
        raise BadInput(
            f"{asked}.layers: layer {beyond[0]} is out of range, the model {checkpoint.source} has layers 0 to "
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


def neurons_of(checkpoint: Checkpoint) -> Population:
    """The model's own neurons.

    Args:
        checkpoint: Of the model.
    """
    return lambda site: read_matrix(checkpoint, site.layer, site.matrix, site.expert_or_none)


def drawn_neurons(checkpoint: Checkpoint, seed: int) -> Population:
    """Neurons drawn at random in place of the model's, with the mean and covariance of each matrix's directions.

    A matrix gives the same neurons whenever it is asked.

    Args:
        checkpoint: Of the model.
        seed: Of the draw.
    """

    def drawn(site: Site) -> Tensor:
        name = f"{seed} {site.layer} {site.expert} {site.matrix}".encode()
        own = int.from_bytes(hashlib.sha256(name).digest()[:7])
        return draw_neurons(neurons_of(checkpoint)(site), torch.Generator().manual_seed(own))

    return drawn


def scan_sites(
    checkpoint: Checkpoint,
    sites: Sequence[Site],
    projections: Projections,
    untrained: Tensor,
    ids: Tensor,
    population: Population | None = None,
) -> dict[Site, Tensor]:
    """Every neuron's mean z-score of some tokens, float32 [neurons] for each matrix.

    Mean and deviation of a projection are taken over the trained tokens. Rows that training never touched say nothing.

    Args:
        checkpoint: Of the model.
        sites: The matrices to scan.
        projections: What vectors are projected on.
        untrained: Tokens that no training text held, bool [V].
        ids: The tokens, int64 [n].
        population: Gives each matrix's neurons. The model's own when left out.
    """
    population = population or neurons_of(checkpoint)
    scores = {}
    moments: dict[str, TokenMoments] = {}
    for site in sites:
        vectors = population(site)
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


def carries(channel: Channel, tokens: TokenSet, ids: Tensor, settings: SearchSettings) -> bool:
    """Whether a channel says the words of a group of tokens.

    Enough of a channel's strongest tokens must be the concept's, and the strongest of those must be the group's. As
    many of the strongest tokens are looked at as the group has, at least two and at most `settings.top`.

    Args:
        channel: The channel.
        tokens: The whole concept's token set.
        ids: The group's tokens, int64 [n].
        settings: With `top` and `share`.
    """
    concept, group = frozenset(tokens.ids.tolist()), frozenset(ids.tolist())
    top = min(settings.top, max(2, len(group)))
    first = next((index for index in channel.token_ids[:top] if index in concept), None)
    return first in group and concept_share(channel, concept, top) >= settings.share


def choose_channels(
    channels: Sequence[Channel], tokens: TokenSet, ids: Tensor, settings: SearchSettings
) -> tuple[Channel, ...]:
    """The channels of a group of tokens that are better supported than chance would have it.

    Neurons are tested, each by the best of its channels that have a p-value and carry the group. One without such a
    channel has p-value 1. The false-discovery rate is over all neurons that were searched, chosen or not. In a chosen
    neuron, channels that were not tested count where they carry the group and have as much support.

    Args:
        channels: All channels of the candidates.
        tokens: The whole concept's token set.
        ids: The group's tokens, int64 [n].
        settings: With `top`, `share` and `fdr`.
    """
    best: dict[tuple[Site, int], float] = {}
    for channel in channels:
        if channel.p_value is not None:
            p = channel.p_value if carries(channel, tokens, ids, settings) else 1.0
            place = site_of(channel), channel.neuron
            best[place] = min(p, best.get(place, 1.0))
    limit = largest_p_value(torch.tensor(list(best.values()), dtype=torch.float64), settings.fdr)
    carrying = [channel for channel in channels if carries(channel, tokens, ids, settings)]
    passed = [channel for channel in carrying if channel.p_value is not None and channel.p_value <= limit]
    neurons = {(site_of(channel), channel.neuron) for channel in passed}
    least = min((channel.support for channel in passed), default=0.0)
    return tuple(
        channel
        for channel in carrying
        if (site_of(channel), channel.neuron) in neurons
        and (channel.support >= least if channel.p_value is None else channel.p_value <= limit)
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

    The candidates of a group are searched from the group's own direction. Support is compared with what the same scan
    and search find in neurons drawn at random (`null.p_values`). Neurons that stand out are decomposed.

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
    return [
        _with_channels(group, checkpoint, projections, vocabulary, settings, ASKED * (place + 1) + group.number, report)
        for group in scanned
    ]


def _with_channels(
    group: ConceptGroup,
    checkpoint: Checkpoint,
    projections: Projections,
    vocabulary: Vocabulary,
    settings: SearchSettings,
    index: int,
    report: Report,
) -> ConceptGroup:
    """The group with its candidates, the channels that were tested, and those that were chosen."""
    candidates = strongest_rows(group.scores, settings.candidates)
    tested = _tested(candidates, group, projections, vocabulary, settings, report)
    null = null_of(group, checkpoint, projections, vocabulary, settings, report)
    p = p_values(null, torch.tensor([channel.support for channel in tested])).tolist()
    tested = [replace(channel, p_value=value) for channel, value in zip(tested, p)]
    if not settings.tilted_start:
        return replace(
            group,
            candidates=candidates,
            channels=tuple(tested),
            chosen=choose_channels(tested, group.tokens, group.ids, settings),
        )
    tested = [replace(channel, index=index) for channel in tested]
    chosen = choose_channels(tested, group.tokens, group.ids, settings)
    # What else is in the neurons that stand out.
    neurons = [(site_of(channel).neuron(channel.neuron), channel.matrix) for channel in chosen]
    others = decompose_neurons(neurons, projections, vocabulary.texts, settings.solver, progress=report)
    every = (*others, *tested)
    return replace(
        group,
        candidates=candidates,
        channels=every,
        chosen=choose_channels(every, group.tokens, group.ids, settings),
    )


def asked_channels(
    neurons: Sequence[tuple[Neuron, str]],
    ids: Tensor,
    projections: Projections,
    vocabulary: Vocabulary,
    settings: SearchSettings,
) -> list[Channel]:
    """The channel of each neuron that a search from the direction of some tokens ends in, under the number `ASKED`.

    Args:
        neurons: The neurons and their matrices.
        ids: The tokens, int64 [n].
        projections: What vectors are projected on.
        vocabulary: The tokens' texts, and which of them training touched.
        settings: How channels are looked for.
    """
    usable = (~vocabulary.untrained).to(projections.ignored.device)
    solver = replace(settings.solver, channels=1, only_tilt=True)
    found = decompose_neurons(neurons, projections, vocabulary.texts, solver, tilt=_towards(projections, ids, usable))
    return [replace(channel, index=ASKED) for channel in found]


def _tested(
    candidates: dict[Site, Tensor],
    group: ConceptGroup,
    projections: Projections,
    vocabulary: Vocabulary,
    settings: SearchSettings,
    report: Report,
    population: Population | None = None,
) -> list[Channel]:
    """The channels by which candidates are tested: the group's own, or with `tilted_start` off their first ones.

    With a population its vectors are searched in place of the model's.
    """
    solver, tilt = settings.solver, None
    if settings.tilted_start:
        usable = (~vocabulary.untrained).to(projections.ignored.device)
        solver, tilt = replace(solver, channels=1, only_tilt=True), _towards(projections, group.ids, usable)
    vectors = None
    if population is not None:
        vectors = torch.cat(
            [population(site)[candidates[site]] for site in sorted(candidates) if len(candidates[site])]
        )
    return decompose_neurons(
        _addresses(candidates), projections, vocabulary.texts, solver, tilt=tilt, vectors=vectors, progress=report
    )


def null_of(
    group: ConceptGroup,
    checkpoint: Checkpoint,
    projections: Projections,
    vocabulary: Vocabulary,
    settings: SearchSettings,
    report: Report = silent,
) -> Null:
    """What the search for a group of tokens finds in neurons drawn at random, from the cache if it is there.

    As many neurons are drawn as the matrices of the scan have. Their strongest scores make the candidates, as many as
    the model's, so that being chosen among so many neurons counts for the null as well. This is done
    `settings.draws` times.

    Args:
        group: After the scan.
        checkpoint: Of the model.
        projections: What vectors are projected on.
        vocabulary: The tokens' texts, and which of them training touched.
        settings: How channels are looked for.
        report: Is told how far the search is.
    """
    sites = list(group.scores)

    def named(_step: str, done: int, total: int) -> None:
        report("compare with neurons drawn at random", done, total)

    def draw() -> Null:
        supports: list[float] = []
        every: list[float] = []
        for draw in range(settings.draws):
            population = drawn_neurons(checkpoint, settings.solver.seed * settings.draws + draw)
            scores = scan_sites(checkpoint, sites, projections, vocabulary.untrained, group.ids, population)
            candidates = strongest_rows(scores, settings.candidates)
            best: dict[tuple[Site, int], float] = {}
            carrying: dict[tuple[Site, int], float] = {}
            for channel in _tested(candidates, group, projections, vocabulary, settings, named, population):
                place = site_of(channel), channel.neuron
                best[place] = max(channel.support, best.get(place, channel.support))
                if carries(channel, group.tokens, group.ids, settings):
                    carrying[place] = max(channel.support, carrying.get(place, channel.support))
            supports += carrying.values()
            every += best.values()
        return Null(settings.draws * count, *(tuple(sorted(values, reverse=True)) for values in (supports, every)))

    count = sum(len(rows) for rows in strongest_rows(group.scores, settings.candidates).values())
    return kept_null(_null_parts(group, projections, settings), settings.draws * count, draw)


def _null_parts(group: ConceptGroup, projections: Projections, settings: SearchSettings) -> dict[str, Any]:
    """What decides a null. The scores tell the weights: every neuron and the whole table are in them."""
    digest = hashlib.sha256()
    for values in (*group.scores.values(), *projections.weights.values()):
        digest.update(values.cpu().contiguous().numpy().tobytes())
    return {
        "weights": digest.hexdigest(),
        "sites": [[site.layer, site.expert, site.matrix] for site in group.scores],
        "concept": group.tokens.ids.tolist(),
        "group": group.ids.tolist(),
        "settings": asdict(replace(settings, fdr=0.0)),
        "rules": asdict(projections.rules),
    }


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
