"""From methods to edits: each is its own closed form on every matrix, whatever is built beside it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_edits import channel
from tiny_material import group_of, material, token_set, word_checkpoint
from tiny_targets import change_of, edited, target_of
from tiny_words import WORDS

from rotate_edit.channels.locate import ConceptGroup, Site, scan_sites, sites_of
from rotate_edit.edits.build import build_edits, describe_vectors, edited_vectors
from rotate_edit.edits.directions import subtract_direction
from rotate_edit.edits.edit import Edit
from rotate_edit.edits.key_moments import fit_keys
from rotate_edit.edits.material import Concept, Material
from rotate_edit.edits.methods import declaration, make_method, method_names
from rotate_edit.models.checkpoint import Checkpoint, read_matrix
from rotate_edit.vocabulary.projection import Projections, Vocabulary, VocabularyRules, read_projections

TOKENS = token_set("dogs", "dog", "cat")
NAMES = [name for name in method_names() if name != "silence-words"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return word_checkpoint(tmp_path_factory.mktemp("words") / "model")


@pytest.fixture(scope="module")
def projections(checkpoint: Checkpoint) -> Projections:
    rules = VocabularyRules(projection="unembedding", remove_frequency=False)
    nothing = torch.zeros(len(WORDS), dtype=torch.bool)
    return read_projections(checkpoint, Vocabulary(rules, tuple(WORDS), nothing, nothing))


def located(
    checkpoint: Checkpoint, number: int = 0, words: Sequence[str] | None = None, first: int = 3
) -> ConceptGroup:
    """A group with a channel in two neurons of every matrix, and scores of all neurons."""
    generator = torch.Generator().manual_seed(number)
    chosen = [
        channel(matrix, ("dog", "cat"), torch.randn(16, generator=generator), number, layer=layer, neuron=neuron)
        for layer in (0, 1)
        for matrix in ("gate", "in", "out")
        for neuron in (first, first + 5)
    ]
    sites = sites_of(checkpoint, ("gate", "in", "out"))
    scores = {site: 2 * torch.randn(24, generator=generator) for site in sites}
    return group_of(TOKENS, number, words, scores=scores, chosen=chosen)


def seen_of(checkpoint: Checkpoint, *groups: ConceptGroup, **settings: Any) -> Material:
    return material(checkpoint, [Concept(groups)], matrices=("gate", "in", "out"), **settings)


@pytest.fixture(scope="module")
def seen(checkpoint: Checkpoint) -> Material:
    return seen_of(checkpoint, located(checkpoint))


@pytest.fixture(scope="module")
def built(seen: Material) -> dict[str, Edit]:
    return build_edits(seen, [make_method(name, _few(name)) for name in NAMES])


def _few(name: str) -> dict[str, Any]:
    return {"features": 3} if name == "snmf-features" else {}


def same(one: Edit, other: Edit) -> bool:
    pairs = zip(one.changes, other.changes, strict=True)
    return len(one.clamps) == len(other.clamps) and all(
        (first.matrix, first.layer) == (second.matrix, second.layer)
        and torch.equal(first.rows, second.rows)
        and torch.allclose(first.delta(), second.delta(), rtol=1e-5, atol=1e-6)
        for first, second in pairs
    )


@pytest.mark.parametrize("name", NAMES)
def test_an_edit_is_the_same_whatever_is_built_beside_it(
    checkpoint: Checkpoint, built: dict[str, Edit], name: str
) -> None:
    alone = build_edits(seen_of(checkpoint, located(checkpoint)), [make_method(name, _few(name))])
    assert list(alone) == [name]
    assert alone[name].method == name
    assert alone[name].does_something
    assert same(alone[name], built[name])


@pytest.mark.parametrize("name", NAMES)
def test_an_edit_writes_what_its_method_declares(built: dict[str, Edit], name: str) -> None:
    edit = built[name]
    assert edit.concepts == ("dogs",)
    assert {change.matrix for change in edit.changes} <= declaration(name).writes
    assert all(change.strength == 1 for change in edit.changes)
    assert bool(edit.clamps) == declaration(name).live
    assert (edit.base, edit.settings, edit.vectors) == ({}, {}, ())


@pytest.mark.parametrize("name", ["channel-located", "direction-everywhere", "lm-head-located", "random-neurons"])
def test_a_direction_is_taken_out_of_what_the_locator_chose_in_every_matrix(
    seen: Material, built: dict[str, Edit], name: str
) -> None:
    concept, group = seen.concepts[0], seen.concepts[0].groups[0]
    changes = {Site(change.layer or 0, -1, change.matrix): change for change in built[name].changes}
    assert set(changes) == set(seen.sites)
    for site, change in changes.items():
        vectors = read_matrix(seen.checkpoint, site.layer, site.matrix)
        rows = {
            "channel-located": [3, 8],
            "lm-head-located": (group.scores[site].abs() >= 1).nonzero()[:, 0].tolist(),
            "direction-everywhere": list(range(24)),
            "random-neurons": change.rows.tolist(),
        }[name]
        assert change.rows.tolist() == rows
        assert len(rows) == 2 or name != "random-neurons"
        direction = seen.direction(concept, group, site)
        if name == "direction-everywhere":
            direction = seen.mean_direction(concept, site)
        left, right = subtract_direction(vectors[rows], direction)
        torch.testing.assert_close(change.delta(), left @ right)


def test_random_neurons_are_drawn_for_each_matrix_and_seed(checkpoint: Checkpoint, built: dict[str, Edit]) -> None:
    rows = [tuple(change.rows.tolist()) for change in built["random-neurons"].changes]
    assert len(set(rows)) > 1
    other = build_edits(seen_of(checkpoint, located(checkpoint), seed=1), [make_method("random-neurons")])
    assert rows != [tuple(change.rows.tolist()) for change in other["random-neurons"].changes]


@pytest.mark.parametrize("name", ["rank-one", "rank-one-channels", "rank-one-lm-head", "rank-one-random"])
def test_rank_one_edits_write_by_the_key_of_their_neurons(seen: Material, built: dict[str, Edit], name: str) -> None:
    changes = built[name].changes
    assert [change.layer for change in changes] == ([1] if name == "rank-one" else [0, 1])
    rows = {change.layer or 0: change.rows for change in changes}
    moments = seen.moments(rows)
    keys = fit_keys(moments, 0, rows, ridge=0.03)
    for change in changes:
        site = Site(change.layer or 0, -1, "out")
        write = seen.direction(seen.concepts[0], seen.concepts[0].groups[0], site).write
        torch.testing.assert_close(
            change.delta(), -torch.outer(keys[change.layer or 0][1], write), rtol=1e-4, atol=1e-6
        )


def test_methods_with_other_ridges_get_keys_of_their_own(seen: Material) -> None:
    soft, hard = (make_method("rank-one", {"key_ridge": ridge}) for ridge in (0.001, 1.0))
    loose, firm = (build_edits(seen, [method])["rank-one"].changes[0] for method in (soft, hard))
    assert not torch.allclose(loose.left, firm.left, rtol=1e-2)
    assert float(firm.left.norm()) < float(loose.left.norm())


def test_single_layers_are_weighted(checkpoint: Checkpoint, built: dict[str, Edit]) -> None:
    weighted = seen_of(checkpoint, located(checkpoint), layer_strengths={1: 0.25})
    names = ["channel-located", "rank-one", "token-embeddings"]
    edits = build_edits(weighted, [make_method(name) for name in names])
    for name in names:
        for change, plain in zip(edits[name].changes, built[name].changes, strict=True):
            factor = 0.25 if change.layer == 1 else 1.0
            torch.testing.assert_close(change.delta(), factor * plain.delta())


def test_methods_of_a_whole_concept_do_not_see_its_groups(checkpoint: Checkpoint, built: dict[str, Edit]) -> None:
    groups = [located(checkpoint, 0, ["dog"]), located(checkpoint, 1, ["cat"], first=4)]
    whole = sorted(name for name in NAMES if declaration(name).whole_concept and not declaration(name).live)
    edits = build_edits(seen_of(checkpoint, *groups), [make_method(name, _few(name)) for name in whole])
    assert all(same(edits[name], built[name]) for name in whole)


def test_each_group_has_its_own_direction_and_neurons(checkpoint: Checkpoint) -> None:
    groups = [located(checkpoint, 0, ["dog"]), located(checkpoint, 1, ["cat"], first=4)]
    seen = seen_of(checkpoint, *groups)
    changes = build_edits(seen, [make_method("channel-located")])["channel-located"].changes
    last = [change for change in changes if (change.layer, change.matrix) == (1, "out")]
    assert [change.rows.tolist() for change in last] == [[3, 8], [4, 9]]
    for change, group in zip(last, groups, strict=True):
        assert torch.equal(change.right[0], seen.direction(seen.concepts[0], group, Site(1, -1, "out")).write)


@pytest.mark.parametrize("name", ["zero-neurons", "project-channel", "random-neurons"])
def test_a_neuron_of_two_groups_is_taken_away_once(checkpoint: Checkpoint, name: str) -> None:
    groups = [located(checkpoint, 0, ["dog"]), located(checkpoint, 1, ["cat"], first=3)]
    edit = build_edits(seen_of(checkpoint, *groups), [make_method(name)])[name]
    rows = [(change.layer, change.matrix, row) for change in edit.changes for row in change.rows.tolist()]
    assert len(rows) == len(set(rows))
    if name == "zero-neurons":
        after = read_matrix(checkpoint, 1, "out")
        for change in edit.changes:
            if (change.layer, change.matrix) == (1, "out"):
                after[change.rows] += change.delta()
        assert torch.equal(after[[3, 8]], torch.zeros(2, 16))


def test_what_locates_nothing_changes_nothing(checkpoint: Checkpoint) -> None:
    nothing = group_of(TOKENS, scores={site: torch.zeros(24) for site in sites_of(checkpoint, ("gate", "in", "out"))})
    names = ["channel-located", "zero-neurons", "random-neurons", "rank-one-channels", "lm-head-located"]
    names += ["rank-one-lm-head", "clamp-neurons"]
    edits = build_edits(seen_of(checkpoint, nothing), [make_method(name) for name in names])
    assert list(edits) == names
    assert not any(edit.does_something for edit in edits.values())


def test_every_concept_has_its_own_part(checkpoint: Checkpoint) -> None:
    others = Concept((group_of(token_set("birds", "bird", "fish"), scores=located(checkpoint).scores),))
    both = material(checkpoint, [Concept((located(checkpoint),)), others])
    names = ["least-collateral-everywhere", "rank-one", "lm-head-located", "token-logits"]
    edits = build_edits(both, [make_method(name) for name in names])
    for name in names:
        assert edits[name].concepts == ("dogs", "birds")
        alone = build_edits(material(checkpoint, [others]), [make_method(name)])[name]
        assert same(edits[name].only("birds"), alone)


def test_edited_vectors_report_what_happened() -> None:
    seen = target_of("channel-located")
    made = change_of("channel-located", seen)
    (first, *_) = edited_vectors(made, seen.vectors[made.rows], ["L2.N1", "L2.N4", "L2.N7"], [("x",)] * 3, [1.0] * 3)
    after = edited("channel-located", seen)[1]
    assert first.address == "L2.N1"
    assert first.norm_before == pytest.approx(float(seen.vectors[1].norm()), rel=1e-6)
    assert first.norm_after == pytest.approx(float(after.norm()), rel=1e-6)
    cosine = torch.nn.functional.cosine_similarity(after, seen.vectors[1], dim=0)
    assert first.cosine == pytest.approx(float(cosine), rel=1e-5)


def test_vectors_are_described_with_their_channels_and_scores(
    seen: Material, built: dict[str, Edit], projections: Projections
) -> None:
    edit = Edit("mixed", (*built["channel-located"].changes, *built["token-embeddings"].changes)).at(2.0)
    vectors = describe_vectors(seen, edit, projections)
    # Rows of the vocabulary are no neurons.
    assert len(vectors) == sum(len(change.rows) for change in built["channel-located"].changes)
    for vector in vectors:
        layer, neuron = (int(part[1:]) for part in vector.address.split("."))
        site = Site(layer, -1, vector.matrix)
        change = next(part for part in edit.changes if (part.layer, part.matrix) == (layer, vector.matrix))
        before = read_matrix(seen.checkpoint, layer, vector.matrix)[neuron]
        after = before + change.delta()[change.rows.tolist().index(neuron)]
        assert vector.norm_after == pytest.approx(float(after.norm()), rel=1e-5)
        assert vector.channels == (f"{vector.address}.{vector.matrix}#0",)
        assert vector.score == pytest.approx(float(seen.concepts[0].groups[0].scores[site][neuron]), rel=1e-6)


def test_scores_that_were_not_scanned_are_read_when_vectors_are_described(
    seen: Material, checkpoint: Checkpoint, projections: Projections
) -> None:
    unscanned = seen_of(checkpoint, group_of(TOKENS))
    edit = build_edits(unscanned, [make_method("direction-everywhere")])["direction-everywhere"]
    vectors = describe_vectors(unscanned, edit, projections)
    scores = scan_sites(checkpoint, unscanned.sites, projections, unscanned.untrained, TOKENS.ids)
    found = {(vector.address, vector.matrix): vector for vector in vectors}
    for site, values in scores.items():
        for row, value in enumerate(values.tolist()):
            vector = found[str(site.neuron(row)), site.matrix]
            assert vector.score == pytest.approx(value, rel=1e-6)
            assert vector.channels == ()
    assert replace(edit, vectors=vectors).only("dogs").vectors == vectors


def test_the_checkpoint_is_only_read(checkpoint: Checkpoint, built: dict[str, Edit], tmp_path: Path) -> None:
    again = word_checkpoint(tmp_path / "again")
    for file in sorted(Path(str(checkpoint.folder)).glob("*.safetensors")):
        assert file.read_bytes() == (Path(str(again.folder)) / file.name).read_bytes()
