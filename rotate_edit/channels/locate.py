"""From a concept's tokens to the neurons that carry it, and from those to edits: scan, decompose, select, build.

Matrices are read one at a time, so that a model larger than memory can be edited.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from rotate_edit.channels.channel_set import Channel
from rotate_edit.channels.decompose import claim_threshold, decompose_neurons
from rotate_edit.channels.scan import TokenMoments, concept_z, token_moments
from rotate_edit.channels.solver import SolverSettings
from rotate_edit.console import Report, silent
from rotate_edit.edits import edit as edits
from rotate_edit.edits.edit import Direction, Edit, Target
from rotate_edit.errors import BadInput, Failure
from rotate_edit.models.architectures import Neuron
from rotate_edit.models.checkpoint import Checkpoint, identity, read_embedding, read_matrix, read_norm, read_unembedding
from rotate_edit.recipe import ConceptRecipe, Recipe
from rotate_edit.vocabulary.concept import TokenSet, group_tokens
from rotate_edit.vocabulary.projection import Projections, Vocabulary

# The index of the channel that a search finds from the first concept's first group; its groups count on, and every
# further concept begins with the next multiple.
ASKED = 1000

# By keyed method and layer: rows and coefficients.
Keys = Mapping[str, Mapping[int, tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class Fitted:
    """What was read off the model's own text: keys by concept and group; the metric of its predictions,
    float64 [d_model, d_model], where the direction asks for it (see `keys.KeyMoments`); by concept the factors of
    the last layer's whole change, and what raises a logit alike everywhere, float32 [d_model], where a method asks for
    it (see `fitting` and `keys.even_reading`)."""

    keys: Mapping[tuple[str, int], Keys]
    metric: Tensor | None = None
    changes: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    reading: Tensor | None = None


@dataclass(frozen=True, order=True)
class Site:
    """One neuron matrix of a checkpoint: `matrix` is gate, in or out; `expert` is -1 in dense layers."""

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
class Located:
    """Where one group of a concept's tokens was found.

    tokens: the concept's token set; group and ids: which of its groups this is, and that group's tokens; scores: each
    site's mean z-score of the concept's tokens, float32 [neurons]; candidates: the rows the scan passed on; channels:
    every channel of the candidates; chosen: those that carry the concept.
    """

    concept: ConceptRecipe
    tokens: TokenSet
    group: int
    ids: Tensor
    scores: dict[Site, Tensor]
    candidates: dict[Site, Tensor]
    channels: tuple[Channel, ...]
    chosen: tuple[Channel, ...]


def by_concept(found: Sequence[Located]) -> dict[str, list[Located]]:
    """What was located, by concept."""
    groups: dict[str, list[Located]] = {}
    for located in found:
        groups.setdefault(located.concept.name, []).append(located)
    return groups


def sites(checkpoint: Checkpoint, recipe: Recipe) -> list[Site]:
    """The matrices that a recipe looks at. Raises BadInput for a layer or matrix that the model does not have."""
    missing = [matrix for matrix in recipe.locate.matrices if matrix not in checkpoint.matrices]
    if missing:
        raise BadInput(
            f"locate.matrices: the model {checkpoint.source} has no {missing[0]!r} matrix, "
            f"only {', '.join(checkpoint.matrices)}."
        )
    layers = recipe.locate.layers if recipe.locate.layers is not None else list(range(checkpoint.layers))
    beyond = [layer for layer in layers if layer >= checkpoint.layers]
    if beyond:
        raise BadInput(
            f"locate.layers: layer {beyond[0]} is out of range, the model {checkpoint.source} has layers 0 to "
            f"{checkpoint.layers - 1}."
        )
    return sorted(
        Site(layer, expert, matrix)
        for layer in set(layers)
        for expert in _experts(checkpoint, layer)
        for matrix in recipe.locate.matrices
    )


def _experts(checkpoint: Checkpoint, layer: int) -> Sequence[int]:
    count = checkpoint.experts_in(layer)
    return [-1] if count is None else range(count)


def scan_concept(
    checkpoint: Checkpoint, recipe: Recipe, projections: Projections, untrained: Tensor, ids: Tensor
) -> tuple[dict[Site, Tensor], dict[Site, Tensor]]:
    """Every neuron's mean z-score of the concept's tokens, and the rows of the strongest candidates.

    `locate.candidates` neurons of each matrix kind, by |score| over all layers, are candidates. Mean and deviation of
    a projection are taken over the trained tokens, since rows that training never touched say nothing.
    """
    scores = {}
    moments: dict[str, TokenMoments] = {}
    for site in sites(checkpoint, recipe):
        vectors = read_matrix(checkpoint, site.layer, site.matrix, site.expert_or_none)
        name = projections.names[site.layer]
        table = projections.tables[name].cpu()
        if name not in moments:
            moments[name] = token_moments(table[~untrained])
        scores[site] = concept_z(vectors, table, ids, moments=moments[name])
    candidates = {}
    for matrix in recipe.locate.matrices:
        of_kind = [site for site in scores if site.matrix == matrix]
        strongest = torch.cat([scores[site].abs() for site in of_kind])
        count = min(recipe.locate.candidates, len(strongest))
        places = strongest.topk(count).indices
        start = 0
        for site in of_kind:
            inside = places[(places >= start) & (places < start + len(scores[site]))] - start
            candidates[site] = inside.sort().values
            start += len(scores[site])
    return scores, candidates


def choose_channels(channels: Sequence[Channel], tokens: TokenSet, ids: Tensor, recipe: Recipe) -> tuple[Channel, ...]:
    """The supported channels of a group of tokens: enough of their strongest tokens are the concept's, and the
    strongest of those is the group's.

    As many of the strongest tokens are looked at as the group has, at least two and at most `select.top`.
    """
    concept, group, select = frozenset(tokens.ids.tolist()), frozenset(ids.tolist()), recipe.select
    top = min(select.top, max(2, len(group)))
    return tuple(
        channel
        for channel in channels
        if channel.support >= select.support
        and next((index for index in channel.token_ids[:top] if index in concept), None) in group
        and concept_share(channel, concept, top) >= select.share
    )


def locate_concept(
    checkpoint: Checkpoint,
    recipe: Recipe,
    projections: Projections,
    vocabulary: Vocabulary,
    concept: ConceptRecipe,
    tokens: TokenSet,
    distance: float,
    place: int = 0,
    report: Report = silent,
) -> list[Located]:
    """Scan, decompose the candidates, and choose the channels that carry the concept, for each group of its tokens.

    distance: the cosine distance at which the concept's tokens fall into groups (`concept.group_tokens`); place: the
    concept's place in the recipe.

    Every candidate is decomposed once; the candidates of a group are searched once more from the group's own direction.
    """
    usable = (~vocabulary.untrained).to(projections.ignored.device)
    main = projections.tables[projections.names[-1]]
    rows = (main[tokens.ids.to(main.device)] - main[usable].mean(0)).cpu()
    groups = group_tokens(rows, tokens.ids, distance)
    scans = [scan_concept(checkpoint, recipe, projections, vocabulary.untrained, ids) for ids in groups]
    settings = solver_settings(checkpoint, recipe)
    search = partial(decompose_neurons, projections=projections, texts=vocabulary.texts, progress=report)
    everyone = sorted({address for _, candidates in scans for address in _addresses(candidates)}, key=str)
    channels = search(everyone, settings=settings)
    found = []
    for number, (ids, (scores, candidates)) in enumerate(zip(groups, scans)):
        own = list(channels)
        if recipe.decompose.tilted_start:
            means = {name: edits.concept_mean(table, ids, usable) for name, table in projections.tables.items()}
            asked = search(
                _addresses(candidates),
                settings=replace(settings, channels=1, only_tilt=True),
                tilt=partial(_tilt, means, projections.names),
            )
            own += [replace(channel, index=ASKED * (place + 1) + number) for channel in asked]
        chosen = choose_channels(own, tokens, ids, recipe)
        found.append(Located(concept, tokens, number, ids, scores, candidates, tuple(own), chosen))
    return found


def _tilt(means: dict[str, Tensor], names: tuple[str, ...], layer: int, _matrix: str) -> Tensor:
    return means[names[layer]]


def _addresses(candidates: dict[Site, Tensor]) -> list[tuple[Neuron, str]]:
    return [(site.neuron(row), site.matrix) for site in sorted(candidates) for row in candidates[site].tolist()]


def solver_settings(checkpoint: Checkpoint, recipe: Recipe) -> SolverSettings:
    """The solver's settings as a recipe gives them, with the family's claim threshold where it says nothing."""
    wanted = recipe.decompose
    return SolverSettings(
        solver=wanted.solver,
        channels=wanted.channels,
        moments=wanted.moments,
        claim_threshold=wanted.claim_threshold or claim_threshold(checkpoint),
        top_tokens=recipe.select.top,
        support_threshold=recipe.select.support,
        unsupported_limit=wanted.unsupported_limit,
        seed=recipe.seed,
    )


def key_rows(checkpoint: Checkpoint, recipe: Recipe, located: Located, method: str) -> dict[int, Tensor]:
    """The neurons a keyed method looks at, by layer: int64, ascending. Empty where no `out` matrix is looked at."""
    writing = [site for site in sites(checkpoint, recipe) if site.matrix == "out"]
    if method in edits.WHOLE_LAYER:
        return {site.layer: torch.arange(checkpoint.neurons_in(site.layer)) for site in writing[-1:]}
    if method == "lm-head-keyed":
        scored = {site.layer: located.scores[site].abs() >= recipe.select.lm_head_z for site in writing}
        return {layer: chosen.nonzero()[:, 0] for layer, chosen in scored.items()}
    own = {site: sorted({c.neuron for c in located.chosen if _site_of(c) == site}) for site in writing}
    if method == "channel-keyed":
        return {site.layer: torch.tensor(rows, dtype=torch.int64) for site, rows in own.items()}
    generator = torch.Generator().manual_seed(recipe.seed)
    everyone = torch.randperm(len(writing) * checkpoint.neurons, generator=generator)
    drawn = everyone[: sum(map(len, own.values()))].sort().values
    return {
        site.layer: drawn[drawn // checkpoint.neurons == place] % checkpoint.neurons
        for place, site in enumerate(writing)
    }


def directions(
    checkpoint: Checkpoint,
    recipe: Recipe,
    untrained: Tensor,
    located: Located,
    kept: Sequence[Tensor],
    metric: Tensor | None = None,
) -> Callable[[Site], tuple[Direction, Direction]]:
    """How each site's (wanted, plain) directions are formed: of the group as the recipe wants it, of the whole concept.

    The write side (`out`) looks at the unembedding through the final norm, the read side (`gate`, `in`) at the
    embedding through the norm before the block's MLP. Means and covariance leave `untrained` tokens out. kept: token
    ids, one tensor for each word or concept whose mean logit must not move; metric: what the writing direction costs
    in place of the covariance, where the recipe's direction is least-divergence.
    """
    moments: dict[bool, tuple[Tensor, Tensor, Tensor, list[Tensor]]] = {}

    def moments_of(writes: bool) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        if writes not in moments:
            projection = read_unembedding(checkpoint) if writes else read_embedding(checkpoint)
            moments[writes] = (
                edits.concept_mean(projection, located.ids, ~untrained),
                edits.concept_mean(projection, located.tokens.ids, ~untrained),
                edits.token_covariance(projection[~untrained]),
                [edits.concept_mean(projection, ids, ~untrained) for ids in kept],
            )
        return moments[writes]

    known: dict[tuple[bool, int], tuple[Direction, Direction]] = {}

    def of(site: Site) -> tuple[Direction, Direction]:
        writes = site.matrix == "out"
        key = (writes, -1 if writes else site.layer)
        if key not in known:
            mean, whole, covariance, keep = moments_of(writes)
            norm = read_norm(checkpoint, "final" if writes else ("mlp", site.layer)) if recipe.edit.fold_norm else None
            gain = torch.ones_like(mean) if norm is None else norm
            plain = edits.plain_direction(gain * whole)
            wanted = edits.plain_direction(gain * mean)
            rows = torch.stack([gain * row for row in keep]) if keep else None
            try:
                if recipe.edit.direction != "plain":
                    cost = metric if metric is not None and writes else covariance
                    wanted = edits.least_collateral_direction(
                        gain * mean, gain[:, None] * cost * gain, ridge=recipe.edit.ridge, keep=rows
                    )
                elif rows is not None:
                    wanted = edits.keeping(wanted, rows)
            except ValueError as error:
                raise BadInput(
                    f"concepts.{located.concept.name}: {error}; leave some words out of its keep and neighbour_words, "
                    "out of protect, or out of the concepts beside it."
                ) from error
            known[key] = (wanted, plain)
        return known[key]

    return of


def targets(
    checkpoint: Checkpoint,
    recipe: Recipe,
    located: Located,
    directions_of: Callable[[Site], tuple[Direction, Direction]],
) -> Iterator[tuple[Site, Target]]:
    """Every site as the edit methods see it, one matrix in memory at a time."""
    for site in sites(checkpoint, recipe):
        own = [channel for channel in located.chosen if _site_of(channel) == site]
        vectors = read_matrix(checkpoint, site.layer, site.matrix, site.expert_or_none)
        rows = sorted({channel.neuron for channel in own})
        wanted, plain = directions_of(site)
        yield (
            site,
            Target(
                layer=site.layer,
                expert=site.expert_or_none,
                matrix=site.matrix,
                layers=checkpoint.layers,
                vectors=vectors,
                located=torch.tensor(rows, dtype=torch.int64),
                scored=(located.scores[site].abs() >= recipe.select.lm_head_z).nonzero()[:, 0],
                channel_vectors={
                    row: torch.stack([c.vector for c in own if c.neuron == row and c.vector is not None])
                    for row in rows
                },
                direction=wanted,
                plain=plain,
                seed=recipe.seed + 1000 * site.layer + max(0, site.expert),
            ),
        )


def build_edits(
    checkpoint: Checkpoint,
    recipe: Recipe,
    untrained: Tensor,
    found: Sequence[Located],
    methods: Sequence[str],
    kept: dict[str, list[Tensor]],
    evidence: Mapping[str, Mapping[int, edits.Evidence]] | None = None,
    fitted: Fitted | None = None,
) -> dict[str, Edit]:
    """The edit of every wanted method, all concepts together, in one pass over the matrices of each concept.

    untrained: bool [V]; kept: for each concept the token sets that its direction must leave alone; evidence: by concept
    and layer, for methods that need text; fitted: for keyed methods. Strengths are the recipe's, 1
    where it says auto. Raises Failure when the recipe's own method would change nothing.
    """
    changes: dict[str, list[edits.MatrixChange]] = {method: [] for method in methods}
    vectors: dict[str, list[edits.EditedVector]] = {method: [] for method in methods}
    clamps: list[edits.Clamp] = []
    taken: dict[tuple[str, Site], set[int]] = {}
    for located in found:
        name = located.concept.name
        strength = 1.0 if located.concept.strength == "auto" else float(located.concept.strength)
        metric = fitted.metric if fitted else None
        directions_of = directions(checkpoint, recipe, untrained, located, kept.get(name, []), metric)
        seen_in = (evidence or {}).get(name, {})
        on_logits = [method for method in methods if edits.through_logits(method, strength)]
        if not located.group:
            reading = fitted.reading if fitted else None
            for method, moved in _on_rows(checkpoint, recipe, untrained, located, strength, methods, reading):
                changes[method].append(moved)
        for site, plain_target in targets(checkpoint, recipe, located, directions_of):
            keyed = _at(site, fitted.keys.get((name, located.group), {}) if fitted else {})
            whole = fitted.changes.get(name) if fitted and not located.group and _ends(site, checkpoint) else None
            target = replace(plain_target, evidence=seen_in.get(site.layer), keyed=keyed, fitted=whole)
            weight = recipe.edit.layer_strengths.get(site.layer, 1.0)
            before = taken.setdefault((name, site), set())
            fresh = [row for row in target.located.tolist() if row not in before]
            once = replace(target, located=torch.tensor(fresh, dtype=torch.int64))
            before.update(fresh)
            for method in methods:
                if method in (*on_logits, edits.TOKEN_METHOD) or (located.group and method in edits.WHOLE_CONCEPT):
                    continue
                if method in edits.LIVE_METHODS:
                    clamp = edits.clamp_neurons(target, strength=strength, concept=name)
                    clamps += [clamp] if clamp else []
                    continue
                seen = once if method in edits.WHOLE_VECTORS else target
                made = edits.change(method, seen, strength=strength, concept=name)
                if made is None or weight == 0:
                    continue
                made = replace(made, left=weight * made.left)
                changes[method].append(made)
                if method == recipe.edit.method:
                    vectors[method] += _describe(made, site, target, located)
    return _as_edits(checkpoint, recipe, changes, vectors, clamps)


def _at(site: Site, keys: Keys) -> dict[str, tuple[Tensor, Tensor]]:
    """What each keyed method takes at a site."""
    if site.matrix != "out":
        return {}
    return {method: layers[site.layer] for method, layers in keys.items() if site.layer in layers}


def _ends(site: Site, checkpoint: Checkpoint) -> bool:
    """Whether a site is what the last layer writes."""
    return site.matrix == "out" and site.layer == checkpoint.layers - 1


def _as_edits(
    checkpoint: Checkpoint,
    recipe: Recipe,
    changes: Mapping[str, Sequence[edits.MatrixChange]],
    vectors: Mapping[str, Sequence[edits.EditedVector]],
    clamps: Sequence[edits.Clamp],
) -> dict[str, Edit]:
    if not changes[recipe.edit.method]:
        raise Failure(
            f"the method {recipe.edit.method} found no neuron to change; lower select.share, select.support or "
            "select.lm_head_z, raise locate.candidates, or set edit.method to keyed, which needs none located."
        )
    settings = recipe.edit.model_dump() | {"select": recipe.select.model_dump(), "seed": recipe.seed}
    own = {checkpoint.place(made.matrix, made.layer, made.expert).name for made in changes[recipe.edit.method]}
    base = identity(checkpoint, own, full=recipe.save.full_hash or None)
    return {
        method: Edit(
            method,
            tuple(changes[method]),
            tuple(vectors[method]),
            base,
            settings,
            tuple(clamps) if method in edits.LIVE_METHODS else (),
        )
        for method in changes
    }


def _on_rows(
    checkpoint: Checkpoint,
    recipe: Recipe,
    untrained: Tensor,
    located: Located,
    strength: float,
    methods: Sequence[str],
    reading: Tensor | None,
) -> Iterator[tuple[str, edits.MatrixChange]]:
    """What each method changes in the rows of the concept's own tokens."""
    name, ids = located.concept.name, located.tokens.ids
    for method in methods:
        if reading is not None and edits.through_logits(method, strength):
            head = "embedding" if checkpoint.tied else "unembedding"
            yield method, edits.logit_change(head, ids, reading, strength=strength, concept=name)
        # A concept that is raised keeps its rows: what they say without its direction is no step upwards.
        beside = recipe.edit.embeddings and method == recipe.edit.method and strength > 0
        if method == edits.TOKEN_METHOD or beside:
            most = math.inf if method == edits.TOKEN_METHOD else edits.ROWS_AT_MOST
            for made in token_changes(checkpoint, untrained, located, strength):
                yield method, replace(made, most=most).at(strength)


def token_changes(
    checkpoint: Checkpoint, untrained: Tensor, located: Located, strength: float
) -> list[edits.MatrixChange]:
    """What is changed in the concept's own rows of the embedding and, where it is a matrix of its own, of the head."""
    tables = {"embedding": read_embedding(checkpoint)}
    if not checkpoint.tied:
        tables["unembedding"] = read_unembedding(checkpoint)
    return [
        edits.token_change(
            matrix, table, located.tokens.ids, ~untrained, strength=strength, concept=located.concept.name
        )
        for matrix, table in tables.items()
    ]


def _describe(made: edits.MatrixChange, site: Site, target: Target, located: Located) -> tuple[edits.EditedVector, ...]:
    rows = made.rows.tolist()
    names: dict[int, tuple[str, ...]] = {}
    for channel in located.chosen:
        if _site_of(channel) == site:
            names[channel.neuron] = (*names.get(channel.neuron, ()), channel.name)
    return edits.edited_vectors(
        made,
        target.vectors[made.rows],
        [str(site.neuron(row)) for row in rows],
        [names.get(row, ()) for row in rows],
        located.scores[site][made.rows].tolist(),
    )


def _site_of(channel: Channel) -> Site:
    return Site(channel.layer, -1 if channel.expert is None else channel.expert, channel.matrix)


def concept_share(channel: Channel, token_ids: frozenset[int], top: int) -> float:
    """The fraction of a channel's `top` strongest tokens that belong to the concept."""
    strongest = channel.token_ids[:top]
    return sum(index in token_ids for index in strongest) / max(1, len(strongest))
