"""From methods and their material to edits: one pass over the matrices for all methods together."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rotate_edit.channels.locate import ConceptGroup, Site, scan_sites, site_of
from rotate_edit.channels.locators import MatrixView, find_locator
from rotate_edit.edits.edit import Clamp, Edit, EditedVector, MatrixChange
from rotate_edit.edits.key_moments import fit_keys
from rotate_edit.edits.material import Concept, Material, joined_rows
from rotate_edit.edits.methods.base import EditMethod, Target
from rotate_edit.models.architectures import NEURON_MATRICES
from rotate_edit.models.checkpoint import read_matrix
from rotate_edit.vocabulary.projection import Projections

# By layer the rows that a method takes and their coefficients.
Key = Mapping[int, tuple[Tensor, Tensor]]


def build_edits(material: Material, methods: Sequence[EditMethod]) -> dict[str, Edit]:
    """The edit of every method at strength 1, all concepts together.

    Every matrix is read once for each group of a concept's tokens, whatever the number of methods. An edit has no base
    and no settings yet, and its vectors are not described.

    Args:
        material: The model, the concepts, and what is read off them.
        methods: The methods, each of a name of its own.

    Returns:
        By method, in the order given. An edit may be empty.

    Raises:
        BadInput: A method cannot work on this model, or what is kept spans a concept's direction.
    """
    keys = _fit_keys(material, methods)
    changes: dict[str, list[MatrixChange]] = {method.about.name: [] for method in methods}
    clamps: dict[str, list[Clamp]] = {method.about.name: [] for method in methods}
    notes: dict[str, list[str]] = {method.about.name: [] for method in methods}
    taken: dict[tuple[str, str, Site], set[int]] = {}
    for concept in material.concepts:
        for method in methods:
            changes[method.about.name] += [_weighted(made, material) for made in method.build(material, concept)]
            notes[method.about.name] += method.notes(material, concept)
        for group in concept.groups:
            wanted = [method for method in methods if _takes(method, concept, group)]
            for site, view, plain in _targets(material, concept, group) if wanted else ():
                for method in wanted:
                    if site.matrix not in method.about.writes:
                        continue
                    target = _target_of(material, method, concept, group, site, view, plain)
                    if method.about.whole_vectors:
                        target = _fresh(target, taken.setdefault((method.about.name, concept.name, site), set()))
                    target = _with_key(method, target, keys.get((method.about.name, concept.name, group.number), {}))
                    made = method.change(target)
                    if isinstance(made, Clamp):
                        clamps[method.about.name].append(replace(made, concept=concept.name))
                    elif made is not None and len(made[0]):
                        change = MatrixChange(
                            site.matrix, site.layer, site.expert_or_none, *made, strength=1.0, concept=concept.name
                        )
                        changes[method.about.name].append(_weighted(change, material))
    return {
        name: Edit(
            name,
            tuple(part for part in made if bool(part.left.any())),
            clamps=tuple(clamps[name]),
            notes=tuple(notes[name]),
        )
        for name, made in changes.items()
    }


def _takes(method: EditMethod, concept: Concept, group: ConceptGroup) -> bool:
    return method.changes_matrices_of(concept) and not (group.number and method.about.whole_concept)


def _weighted(change: MatrixChange, material: Material) -> MatrixChange:
    """A change times what the settings give its layer."""
    weight = 1.0 if change.layer is None else material.settings.layer_strengths.get(change.layer, 1.0)
    return change if weight == 1.0 else replace(change, left=weight * change.left)


def _views(material: Material, group: ConceptGroup) -> Iterator[tuple[Site, MatrixView]]:
    """Every matrix as locators see it."""
    for site in material.sites:
        rows = sorted({channel.neuron for channel in group.chosen if site_of(channel) == site})
        yield (
            site,
            MatrixView(
                neurons=material.checkpoint.neurons_in(site.layer),
                is_last=site == material.last_written,
                by_channels=torch.tensor(rows, dtype=torch.int64),
                scores=group.scores.get(site),
                least_score=material.settings.least_score,
                seed=_seed(material, site),
            ),
        )


def _seed(material: Material, site: Site) -> int:
    return material.settings.seed + 1000 * site.layer + max(0, site.expert)


def _targets(material: Material, concept: Concept, group: ConceptGroup) -> Iterator[tuple[Site, MatrixView, Tensor]]:
    """Every matrix as locators see it, with its vectors, one in memory at a time."""
    for site, view in _views(material, group):
        yield site, view, read_matrix(material.checkpoint, site.layer, site.matrix, site.expert_or_none)


def _target_of(
    material: Material,
    method: EditMethod,
    concept: Concept,
    group: ConceptGroup,
    site: Site,
    view: MatrixView,
    vectors: Tensor,
) -> Target:
    by_neuron: dict[int, list[Tensor]] = {}
    for channel in group.chosen:
        if site_of(channel) == site and channel.vector is not None:
            by_neuron.setdefault(channel.neuron, []).append(channel.vector)
    reads_text = "text" in method.about.reads
    return Target(
        layer=site.layer,
        expert=site.expert_or_none,
        matrix=site.matrix,
        layers=material.checkpoint.layers,
        vectors=vectors,
        rows=find_locator(method.about.locator).rows(view),
        direction=material.direction(concept, group, site),
        mean_direction=material.mean_direction(concept, site),
        channels={neuron: torch.stack(found) for neuron, found in by_neuron.items()},
        text=material.activations(concept)[site.layer] if reads_text else None,
        seed=_seed(material, site),
    )


def _fresh(target: Target, before: set[int]) -> Target:
    """The target without the rows that an earlier group of the concept has taken."""
    rows = [row for row in target.rows.tolist() if row not in before]
    before.update(rows)
    return replace(target, rows=torch.tensor(rows, dtype=torch.int64))


def _with_key(method: EditMethod, target: Target, key: Key) -> Target:
    if "activations" not in method.about.reads or target.layer not in key or target.matrix != "out":
        return target
    rows, coefficients = key[target.layer]
    return replace(target, rows=rows, key=coefficients)


def _fit_keys(material: Material, methods: Sequence[EditMethod]) -> dict[tuple[str, str, int], Key]:
    """The keys of the methods that read activations, by method, concept and group, from moments read once for all."""
    reading = [method for method in methods if "activations" in method.about.reads]
    if not reading:
        return {}
    rows: dict[tuple[str, str, int], dict[int, Tensor]] = {}
    for concept in material.concepts:
        for group in concept.groups:
            views = [(site, view) for site, view in _views(material, group) if site.matrix == "out"]
            for method in reading:
                locate = find_locator(method.about.locator).rows
                rows[method.about.name, concept.name, group.number] = {
                    site.layer: chosen for site, view in views if len(chosen := locate(view))
                }
    every = joined_rows(list(rows.values()))
    if not every:
        return {}
    moments = material.moments(every)
    ridges = {method.about.name: float(method.settings.get("key_ridge", 0.03)) for method in reading}
    return {
        (name, concept.name, group.number): fit_keys(
            moments,
            material.group_place(concept, group),
            rows[name, concept.name, group.number],
            ridge=ridges[name],
        )
        for concept in material.concepts
        for group in concept.groups
        for name in ridges
    }


def describe_vectors(material: Material, edit: Edit, projections: Projections) -> tuple[EditedVector, ...]:
    """What an edit does to every neuron's vector that it changes: cosine with the original, norms before and after.

    Args:
        material: The model and what was located.
        edit: The edit, at the strength that is described.
        projections: What vectors are projected on, for the scores of matrices that were not scanned.
    """
    found: list[EditedVector] = []
    concepts = {concept.name: concept for concept in material.concepts}
    changed = [(_site_of(change), change) for change in edit.changes if _describable(change, concepts)]
    scores = _scores(material, changed, concepts, projections)
    for site, change in changed:
        groups, rows = concepts[change.concept].groups, change.rows.tolist()
        names: dict[int, tuple[str, ...]] = {}
        for channel in (channel for group in groups for channel in group.chosen if site_of(channel) == site):
            if channel.name not in names.get(channel.neuron, ()):
                names[channel.neuron] = (*names.get(channel.neuron, ()), channel.name)
        found += edited_vectors(
            change,
            read_matrix(material.checkpoint, site.layer, site.matrix, site.expert_or_none, neurons=change.rows),
            [str(site.neuron(row)) for row in rows],
            [names.get(row, ()) for row in rows],
            scores[change.concept][site][change.rows].tolist(),
        )
    return tuple(found)


def _describable(change: MatrixChange, concepts: Mapping[str, Concept]) -> bool:
    return change.layer is not None and change.matrix in NEURON_MATRICES and change.concept in concepts


def _site_of(change: MatrixChange) -> Site:
    layer = -1 if change.layer is None else change.layer
    return Site(layer, -1 if change.expert is None else change.expert, change.matrix)


def _scores(
    material: Material,
    changed: Sequence[tuple[Site, MatrixChange]],
    concepts: Mapping[str, Concept],
    projections: Projections,
) -> dict[str, dict[Site, Tensor]]:
    """By concept and matrix the scores of all neurons. Matrices that were not scanned are, all together."""
    scores: dict[str, dict[Site, Tensor]] = {}
    for name in dict.fromkeys(change.concept for _, change in changed):
        first = concepts[name].groups[0]
        sites = dict.fromkeys(site for site, change in changed if change.concept == name)
        missing = [site for site in sites if site not in first.scores]
        more = scan_sites(material.checkpoint, missing, projections, material.untrained, first.ids) if missing else {}
        scores[name] = {**first.scores, **more}
    return scores


def edited_vectors(
    change: MatrixChange,
    vectors: Tensor,
    addresses: Sequence[str],
    channels: Sequence[tuple[str, ...]],
    scores: Sequence[float],
) -> tuple[EditedVector, ...]:
    """What a change does to its rows: cosine with the original, and norms before and after.

    Args:
        change: The change.
        vectors: The changed rows before the edit, float32 [n, d_model].
        addresses: Of the neurons, one for each row.
        channels: The channels that located them, one entry for each row.
        scores: The concept's LM-head z-scores, one for each row.
    """
    after = vectors + change.delta()
    cosine = torch.nn.functional.cosine_similarity(vectors, after, dim=1)
    figures = zip(cosine.tolist(), vectors.norm(dim=1).tolist(), after.norm(dim=1).tolist())
    return tuple(
        EditedVector(address, change.matrix, change.concept, names, score, *numbers)
        for address, names, score, numbers in zip(addresses, channels, scores, figures)
    )
