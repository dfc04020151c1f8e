"""From words to channels: scores are z-scores, the strongest are passed on, and planted channels are chosen."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_checkpoint import LAYERS, NEURONS, VOCABULARY, write_checkpoint
from tiny_edits import channel
from tiny_models import save_tiny
from tiny_words import WORDS, ids

from rotate_edit.channels.locate import (
    ASKED,
    ConceptGroup,
    SearchSettings,
    Site,
    by_concept,
    carries,
    choose_channels,
    concept_share,
    divide_tokens,
    drawn_neurons,
    locate_concept,
    scan_sites,
    site_of,
    sites_of,
    strongest_rows,
)
from rotate_edit.channels.solver import SolverSettings
from rotate_edit.errors import BadInput
from rotate_edit.models.checkpoint import Checkpoint, open_checkpoint, read_matrix, read_unembedding
from rotate_edit.vocabulary.concept import TokenSet
from rotate_edit.vocabulary.projection import Projections, Vocabulary, VocabularyRules, read_projections

# Tokens 20 to 39 share a direction that some of the planted neurons hold (see small_checkpoint).
PLANTED = torch.arange(20, 40)
SEARCH = SearchSettings(SolverSettings(channels=1, rows=32), candidates=8, share=0.5, fdr=1.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(write_checkpoint(tmp_path_factory.mktemp("small") / "model"))


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    nothing = torch.zeros(VOCABULARY, dtype=torch.bool)
    rules = VocabularyRules(projection="unembedding", words_only=False, remove_frequency=False)
    return Vocabulary(rules, tuple(f" t{index}" for index in range(VOCABULARY)), nothing, nothing)


@pytest.fixture(scope="module")
def projections(checkpoint: Checkpoint, vocabulary: Vocabulary) -> Projections:
    return read_projections(checkpoint, vocabulary)


def tokens(ids: torch.Tensor, name: str = "planted") -> TokenSet:
    return TokenSet(name, ids, {}, (), ())


def test_sites_are_every_matrix_in_order(checkpoint: Checkpoint, tmp_path: Path) -> None:
    found = sites_of(checkpoint, ("out", "gate"))
    assert found == [Site(layer, -1, matrix) for layer in range(LAYERS) for matrix in ("gate", "out")]
    assert sites_of(checkpoint, ("out",), [1, 1]) == [Site(1, -1, "out")]
    assert sites_of(checkpoint, ("out",), []) == []
    mixture = open_checkpoint(save_tiny("qwen3_moe-dense-layer", tmp_path / "m", tied=False, dtype=torch.float32))
    assert sites_of(mixture, ("out",)) == [Site(0, -1, "out"), *(Site(1, expert, "out") for expert in range(4))]
    assert [site.expert_or_none for site in sites_of(mixture, ("out",))] == [None, 0, 1, 2, 3]
    assert str(Site(1, 2, "out").neuron(7)) == "L1.E2.N7"
    assert str(Site(1, -1, "out").neuron(7)) == "L1.N7"


def test_what_the_model_does_not_have_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"locate\.layers: layer 2 is out of range, .* layers 0 to 1"):
        sites_of(checkpoint, ("out",), [0, 2])
    plain = open_checkpoint(save_tiny("gpt2", tmp_path / "m", tied=True, dtype=torch.float32))
    with pytest.raises(BadInput, match=r"locate\.matrices: .* no 'gate' matrix, only in, out"):
        sites_of(plain, ("gate",))


def test_scores_are_the_mean_z_scores_of_the_tokens_over_trained_ones(
    checkpoint: Checkpoint, projections: Projections
) -> None:
    untrained = torch.zeros(VOCABULARY, dtype=torch.bool)
    untrained[300:] = True
    sites = sites_of(checkpoint, ("in", "out"))
    scores = scan_sites(checkpoint, sites, projections, untrained, PLANTED)
    assert list(scores) == sites
    table = read_unembedding(checkpoint).double()
    for site in sites:
        projected = read_matrix(checkpoint, site.layer, site.matrix).double() @ table.T
        trained = projected[:, ~untrained]
        z = (projected - trained.mean(1, keepdim=True)) / trained.std(1, correction=0, keepdim=True)
        torch.testing.assert_close(scores[site].double(), z[:, PLANTED].mean(1), rtol=1e-4, atol=1e-4)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(1, 30), st.integers(0, 10**6))
def test_the_strongest_rows_are_those_of_all_layers_together(sizes: list[int], count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = {
        Site(layer, -1, matrix): torch.randn(size, generator=generator)
        for layer, size in enumerate(sizes)
        for matrix in ("in", "out")
    }
    chosen = strongest_rows(scores, count)
    assert chosen.keys() == scores.keys()
    for matrix in ("in", "out"):
        of_kind = [site for site in scores if site.matrix == matrix]
        inside = torch.cat([scores[site][chosen[site]].abs() for site in of_kind])
        every = torch.cat([scores[site].abs() for site in of_kind]).sort(descending=True).values
        assert torch.equal(inside.sort(descending=True).values, every[:count])
        assert all(chosen[site].tolist() == sorted(chosen[site].tolist()) for site in of_kind)


def channel_of(words: str, **changes: Any) -> Any:
    return replace(channel("out", tuple(words.split()), torch.zeros(4), 0), **changes)


def test_a_share_is_of_the_strongest_tokens() -> None:
    concept = frozenset(ids("dog", "cat").tolist())
    seen = channel_of("dog the cat a")
    assert [concept_share(seen, concept, top) for top in (1, 2, 3, 4, 9)] == [1, 1 / 2, 2 / 3, 1 / 2, 1 / 2]
    assert concept_share(channel_of(""), concept, 3) == 0


def test_channels_are_chosen_by_share_group_and_p_value() -> None:
    concept, group = tokens(ids("dog", "cat", "bird")), ids("dog", "cat")
    settings = SearchSettings(SolverSettings(), top=4, share=0.5, fdr=0.1)
    those = {
        "the concept's": channel_of("dog the", neuron=0, p_value=0.001),
        "another group first": channel_of("bird dog", neuron=1, p_value=0.001),
        "the group's first of the concept's": channel_of("the dog", neuron=2, p_value=0.002),
        "too few of its words": channel_of("the a dog", neuron=3, p_value=0.001),
        # Benjamini and Hochberg: three of six may have p-values up to 0.1 * 3 / 6.
        "just enough": channel_of("cat dog", neuron=4, p_value=0.05, support=2.0),
        "too little": channel_of("dog cat", neuron=5, p_value=0.09, support=1.9),
        "not tested, in a chosen neuron": channel_of("dog cat", neuron=0, support=2.0),
        "not tested, with less support": channel_of("dog cat", neuron=0, support=1.9),
        "not tested, in another neuron": channel_of("dog cat", neuron=5, support=9.0),
    }
    chosen = choose_channels(tuple(those.values()), concept, group, settings)
    names = [name for name, seen in those.items() if any(seen is other for other in chosen)]
    # Two tokens are looked at, as many as the group has.
    assert names == [
        "the concept's", "the group's first of the concept's", "just enough", "not tested, in a chosen neuron",
    ]  # fmt: skip
    every = choose_channels(tuple(those.values()), concept, group, replace(settings, share=0.0, fdr=1.0))
    # With no share asked for a channel must still say the group's words first of the concept's, among so many.
    assert [name for name, seen in those.items() if any(seen is other for other in every)] == [
        name for name in those if name not in ("another group first", "too few of its words")
    ]
    # More candidates leave less room for each.
    more = [channel_of("the a", neuron=10 + place, p_value=1e-9) for place in range(80)]
    few = choose_channels((*those.values(), *more), concept, group, settings)
    assert [seen.neuron for seen in few] == [0, 2]
    assert choose_channels((), concept, group, settings) == ()


def test_a_single_token_is_looked_for_among_two_and_many_among_as_many_as_are_wanted() -> None:
    one, settings = tokens(ids("dog")), SearchSettings(SolverSettings(), top=10, share=0.5, fdr=1.0)
    assert carries(channel_of("the dog"), one, one.ids, settings)
    assert not carries(channel_of("the a dog"), one, one.ids, settings)
    many = tokens(torch.arange(2, 22))
    wide = channel_of(" ".join(WORDS[2:14]))
    assert carries(wide, many, many.ids, replace(settings, share=1.0))
    # Only `top` of them are looked at.
    mixed = replace(wide, token_ids=(*wide.token_ids[:3], *([0] * 9)))
    assert not carries(mixed, many, many.ids, replace(settings, share=1.0))
    assert carries(mixed, many, many.ids, replace(settings, share=1.0, top=3))


def test_tokens_are_divided_by_where_they_point(projections: Projections, vocabulary: Vocabulary) -> None:
    both = tokens(torch.cat([torch.arange(20, 40), torch.arange(100, 120)]))
    whole = divide_tokens(projections, vocabulary, both, 2.0)
    assert [group.ids.tolist() for group in whole] == [both.ids.tolist()]
    groups = divide_tokens(projections, vocabulary, both, 0.8)
    assert sorted(token for group in groups for token in group.ids.tolist()) == both.ids.tolist()
    assert [group.number for group in groups] == list(range(len(groups)))
    # No group holds tokens of both planted directions.
    assert all(len({int(token) >= 100 for token in group.ids}) == 1 for group in groups)
    assert all(group.name == "planted" and not group.scores and not group.candidates for group in groups)


def test_a_channel_search_finds_neurons_with_a_planted_direction(
    checkpoint: Checkpoint, projections: Projections, vocabulary: Vocabulary
) -> None:
    groups = divide_tokens(projections, vocabulary, tokens(PLANTED), 2.0)
    sites = sites_of(checkpoint, ("out",))
    (found,) = locate_concept(checkpoint, sites, projections, vocabulary, groups, SEARCH, place=2)
    assert sum(len(rows) for rows in found.candidates.values()) == SEARCH.candidates
    assert found.chosen
    centre = read_unembedding(checkpoint)[PLANTED].mean(0)
    for seen in found.chosen:
        assert set(seen.token_ids[:10]) & set(PLANTED.tolist())
        assert site_of(seen) in sites
        assert seen.neuron in found.candidates[site_of(seen)]
        # What is chosen points where the planted tokens do, on one side or the other.
        cosine = torch.nn.functional.cosine_similarity(seen.vector, centre, dim=0)
        assert float(cosine.abs()) > 0.5
    # Channels of the concept's own direction are numbered by the concept's place.
    asked = [seen for seen in found.channels if seen.index >= ASKED]
    assert {seen.index for seen in asked} == {3 * ASKED}
    assert len(asked) == SEARCH.candidates
    # Neurons that stand out are decomposed as well.
    others = [seen for seen in found.channels if seen.index < ASKED]
    assert {(seen.layer, seen.neuron) for seen in others} == {(seen.layer, seen.neuron) for seen in found.chosen}
    assert all((seen.p_value is None) == (seen.index < ASKED) for seen in found.channels)
    # The neurons that were located hold more of the direction than those that were not.
    vectors = torch.cat([read_matrix(checkpoint, site.layer, "out") for site in sites])
    held = torch.nn.functional.cosine_similarity(vectors, centre[None], dim=1).abs()
    chosen = sorted({seen.layer * NEURONS + seen.neuron for seen in found.chosen})
    assert float(held[chosen].mean()) > 2 * float(held.mean())


def test_without_the_concepts_own_direction_or_a_search_less_is_done(
    checkpoint: Checkpoint, projections: Projections, vocabulary: Vocabulary
) -> None:
    groups = divide_tokens(projections, vocabulary, tokens(PLANTED), 2.0)
    sites = sites_of(checkpoint, ("out",), [1])
    (scanned,) = locate_concept(checkpoint, sites, projections, vocabulary, groups, SEARCH, channels=False)
    assert torch.equal(
        scanned.scores[sites[0]], scan_sites(checkpoint, sites, projections, vocabulary.untrained, PLANTED)[sites[0]]
    )
    assert (scanned.candidates, scanned.channels, scanned.chosen) == ({}, (), ())
    settings = replace(SEARCH, tilted_start=False, candidates=3)
    (common,) = locate_concept(checkpoint, sites, projections, vocabulary, groups, settings)
    assert torch.equal(common.scores[sites[0]], scanned.scores[sites[0]])
    assert [seen.index for seen in common.channels] == [0, 0, 0]
    assert sorted(seen.neuron for seen in common.channels) == common.candidates[sites[0]].tolist()
    assert all(seen.p_value is not None for seen in common.channels)


def test_drawn_neurons_are_the_same_whenever_asked_and_others_in_every_matrix(checkpoint: Checkpoint) -> None:
    first, second = sites_of(checkpoint, ("in",))
    drawn = drawn_neurons(checkpoint, 3)
    assert torch.equal(drawn(first), drawn(first))
    assert drawn(first).shape == read_matrix(checkpoint, 0, "in").shape
    assert not torch.equal(drawn(first), drawn(second))
    assert not torch.equal(drawn(first), drawn_neurons(checkpoint, 4)(first))


def test_a_null_is_of_the_weights_the_words_and_the_settings(
    checkpoint: Checkpoint, projections: Projections, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sites = sites_of(checkpoint, ("out",))

    def kept(ids: torch.Tensor, settings: SearchSettings, layers: list[Site]) -> int:
        groups = divide_tokens(projections, vocabulary, tokens(ids), 2.0)
        locate_concept(checkpoint, layers, projections, vocabulary, groups, settings)
        return len(list((tmp_path / "rotate-edit").iterdir()))

    assert kept(PLANTED, SEARCH, sites) == 1
    # The rate is asked for after the search.
    assert kept(PLANTED, replace(SEARCH, fdr=0.3), sites) == 1
    assert kept(PLANTED[:-1], SEARCH, sites) == 2
    assert kept(PLANTED, replace(SEARCH, share=0.4), sites) == 3
    assert kept(PLANTED, SEARCH, sites[1:]) == 4


def test_groups_are_told_by_their_concept() -> None:
    def group(name: str, number: int) -> ConceptGroup:
        return ConceptGroup(tokens(ids("dog"), name), number, ids("dog"), {}, {})

    found = by_concept([group("dogs", 0), group("cats", 0), group("dogs", 1)])
    assert {name: [part.number for part in parts] for name, parts in found.items()} == {"dogs": [0, 1], "cats": [0]}
    assert list(found) == ["dogs", "cats"]
