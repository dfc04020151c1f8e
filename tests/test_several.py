"""Several concepts in one recipe, protected words, and methods that need text: on the demo model, with numbers."""

from functools import cache
from typing import Any

import pytest
import torch
from demo_session import session_of, words_of

from rotate_edit.channels.locate import ConceptGroup
from rotate_edit.edits.apply import applied
from rotate_edit.edits.edit import Edit
from rotate_edit.edits.methods import declaration, make_method, method_names
from rotate_edit.edits.methods.defaults import ROWS_AT_MOST, ROWS_METHOD
from rotate_edit.errors import BadInput
from rotate_edit.evaluation import measures
from rotate_edit.evaluation.items import texts_about
from rotate_edit.models import batches
from rotate_edit.models.demo.world import concepts
from rotate_edit.recipe import Recipe, parse_recipe
from rotate_edit.session import Session
from rotate_edit.vocabulary.concept import find_tokens

SUPPRESSED, AMPLIFIED = ("dogs", 6.0), ("cats", -3.0)
# The baselines that read what texts activate. Methods that take knowledge have tests of their own.
NEEDS_TEXT = ("difference-of-means", "snmf-features", "clamp-neurons")


def recipe(*wanted: tuple[str, float], items: str | None = "demo", **changes: Any) -> Recipe:
    small = {
        "model": "demo",
        "concepts": [words_of(name, strength=strength) for name, strength in wanted],
        "locate": {"group_distance": 2.0, "candidates": 120},
        "decompose": {"channels": 1},
        "select": {"fdr": 0.5},
        "edit": {"method": "channel-located", "self_text": 2000} | changes.pop("edit", {}),
        "evaluate": {"items": items, "tokens": 1000},
    }
    return parse_recipe(small | changes)


def demo() -> Any:
    return dogs().model


@cache
def dogs() -> Session:
    """One concept by the channels that carry it."""
    return session_of(recipe(("dogs", 1.0)))


@cache
def located() -> tuple[ConceptGroup, ...]:
    """What carries it. Neither strengths nor the settings of an edit nor other concepts change that."""
    return tuple(group for group in dogs_and_cats() if group.name == "dogs")


@cache
def dogs_and_cats() -> tuple[ConceptGroup, ...]:
    return session_of(recipe(SUPPRESSED, AMPLIFIED)).locate()


@cache
def edit(*wanted: tuple[str, float], method: str = "channel-located") -> Edit:
    settings = {"steps": 40} if method == "silence-words" else {}
    session = session_of(recipe(*wanted, edit={"method": method, "settings": settings}))
    if "channels" in session.method.about.reads:
        names = [name for name, _ in wanted]
        groups = tuple(group for group in dogs_and_cats() if group.name in names)
    else:
        groups = session.locate()
    (made,) = unit(session, groups).values()
    return made.at(session.strengths(made))


def unit(session: Session, groups: tuple[ConceptGroup, ...], *methods: str) -> dict[str, Edit]:
    """Edits at strength 1 by their methods: the recipe's own when none is named."""
    return session.build([make_method(name) for name in methods] or [session.method], groups)


def weights() -> torch.Tensor:
    """The output head with the gain of the norm before it."""
    return demo().lm_head.weight.detach() * demo().model.norm.weight.detach()


def kept(name: str, made: Edit) -> float:
    """What an edit leaves of a concept's probability mass."""
    passages, ids, before = asked(name)
    with applied(demo(), made):
        after, _ = measures.mass_by_text(demo(), passages, ids)
    return float(after.sum() / before)


@cache
def asked(name: str) -> tuple[batches.Passages, torch.Tensor, float]:
    """Test texts about a concept, its tokens, and the mass that the base gives them."""
    session = session_of(recipe((name, 1.0)))
    assert session.items is not None
    passages = batches.tokenise(
        session.tokenizer,
        texts_about(session.items, [name])[0],
        vocabulary_size=session.checkpoint.vocabulary_size,
        token_limit=800,
    )
    ids = session.tokens[0].ids
    return passages, ids, float(measures.mass_by_text(demo(), passages, ids)[0].sum())


def test_suppressing_and_amplifying_together_undo_nothing() -> None:
    both = edit(SUPPRESSED, AMPLIFIED)
    gone = kept("dogs", edit(SUPPRESSED))
    raised = kept("cats", edit(AMPLIFIED))
    assert gone < 0.2
    assert raised > 1.05
    assert kept("dogs", both) < gone + 0.02
    assert kept("cats", both) > raised - 0.02


def test_two_rank_one_concepts_are_both_removed() -> None:
    dogs, ships = ("dogs", 6.0), ("ships", 6.0)
    both = edit(dogs, ships, method="rank-one")
    for name, alone in (("dogs", edit(dogs, method="rank-one")), ("ships", edit(ships, method="rank-one"))):
        gone = kept(name, alone)
        assert gone < 0.3
        assert kept(name, both) < gone + 0.05


def test_two_concepts_by_silence_words_are_both_removed() -> None:
    both = edit(("dogs", 6.0), ("ships", 6.0), method="silence-words")
    assert kept("dogs", both) < 0.3
    assert kept("ships", both) < 0.3


def test_silence_words_suppresses_one_concept_and_amplifies_another() -> None:
    both = edit(("dogs", 6.0), ("cats", -2.0), method="silence-words")
    assert [(change.matrix, change.concept) for change in both.changes] == [("out", "dogs"), ("embedding", "cats")]
    (alone,) = edit(("cats", -2.0), method="token-logits").changes
    assert torch.equal(both.changes[1].delta(), alone.delta())
    assert kept("dogs", both) < 0.3
    assert kept("cats", both) > 1.0


def test_a_protected_concept_and_word_are_not_moved_to_first_order() -> None:
    cats = list(concepts()["cats"].words)
    session = session_of(recipe(("dogs", 6.0), protect=["violin", cats]))
    (made,) = unit(session, located()).values()
    (free,) = unit(dogs(), located()).values()
    head = weights()
    text_of = {text: index for index, text in enumerate(session.vocabulary.texts)}
    trained = head[~session.vocabulary.untrained].mean(0)

    def moved(change: Any, words: list[str]) -> float:
        ids = [text_of[f" {word}"] for word in words if f" {word}" in text_of]
        return float(((head[ids].mean(0) - trained) @ change.right[0]).abs() / change.right[0].norm())

    assert moved(made.changes[0], ["violin"]) < 1e-4
    assert moved(free.changes[0], ["violin"]) > 1e-3
    assert kept("dogs", made.at(6.0)) < 0.3


def test_no_direction_of_a_fit_moves_what_is_protected() -> None:
    fit = {"method": "silence-words", "settings": {"steps": 3}}
    session = session_of(recipe(("dogs", 6.0), protect=["violin"], edit=fit))
    (change,) = session.edit().changes
    head = weights()
    violin = next(index for index, text in enumerate(session.vocabulary.texts) if text == " violin")
    mean = head[violin] - head[~session.vocabulary.untrained].mean(0)
    assert len(change.right) > 10
    moved = change.delta() @ mean
    assert float(moved.norm()) < 1e-6 * float(change.delta().norm() * mean.norm())


@pytest.mark.parametrize("words", [["kitten", "tabby"], sorted(concepts()["cats"].words)])
def test_neighbour_words_are_left_alone_each_or_together_when_they_are_many(words: list[str]) -> None:
    content = recipe(("dogs", 6.0)).model_dump()
    content["concepts"][0]["neighbour_words"] = words
    session = session_of(parse_recipe(content))
    (made,) = unit(session, located()).values()
    head = weights()
    ids = find_tokens("cats", words, session.tokenizer, list(session.vocabulary.texts), plurals=True).ids
    ids = ids[~torch.isin(ids, session.tokens[0].ids)]
    write = made.changes[0].right[0]
    mean = head[ids].mean(0) - head[~session.vocabulary.untrained].mean(0)
    assert abs(float(mean @ write)) < 1e-4 * float(mean.norm() * write.norm())


@pytest.mark.parametrize("direction", ["mean", "least-collateral"])
def test_other_concepts_of_the_recipe_are_kept_by_every_direction(direction: str) -> None:
    session = session_of(recipe(SUPPRESSED, AMPLIFIED, edit={"direction": direction}))
    (made,) = unit(session, dogs_and_cats()).values()
    head = weights()
    cats = head[session.tokens[1].ids].mean(0) - head[~session.vocabulary.untrained].mean(0)
    write = next(change.right[0] for change in made.changes if change.concept == "dogs")
    assert abs(float(cats @ write)) < 1e-4 * float(cats.norm() * write.norm())


def test_methods_that_need_text_remove_the_concept_or_say_what_they_need() -> None:
    session = dogs()
    assert set(NEEDS_TEXT) < {name for name in method_names() if "text" in declaration(name).reads}
    made = unit(session, located(), "channel-located", *NEEDS_TEXT)
    assert {len(made[method].changes) for method in NEEDS_TEXT} == {0, session.checkpoint.layers}
    assert len(made["clamp-neurons"].clamps) > 0
    left = {
        "difference-of-means": kept("dogs", made["difference-of-means"].at(2.0)),
        "snmf-features": kept("dogs", made["snmf-features"].at(8.0)),
        "clamp-neurons": kept("dogs", made["clamp-neurons"].at(2.0)),
    }
    assert max(left.values()) < 0.9
    without = session_of(recipe(("dogs", 1.0), evaluate={"written_texts": 0}))
    with pytest.raises(BadInput, match=r"some methods need text about the concept; give evaluate\.items"):
        without.build([make_method("channel-located"), make_method("snmf-features")], located(), {})


def test_layer_strengths_multiply_the_layers_own() -> None:
    session = session_of(recipe(("dogs", 2.0), edit={"layer_strengths": {0: 0.0, 2: 0.5}}))
    (plain,) = unit(dogs(), located()).values()
    (made,) = unit(session, located()).values()
    before = {change.layer: change.delta() for change in plain.changes}
    after = {change.layer: change.delta() for change in made.changes}
    assert set(after) == set(before) - {0}
    torch.testing.assert_close(after[2], 0.5 * before[2])
    assert all(torch.equal(after[layer], before[layer]) for layer in after if layer != 2)


def test_embeddings_are_edited_when_asked_and_once_where_the_head_is_tied() -> None:
    session = session_of(recipe(("dogs", 1.0), edit={"embeddings": True}))
    made = unit(session, located(), "channel-located", ROWS_METHOD, "direction-everywhere")
    ids = session.tokens[0].ids
    (change,) = [change for change in made["channel-located"].changes if change.matrix == "embedding"]
    # Beside neurons the rows go three quarters of the way and no further; alone they go as far as they are told.
    assert change.strength == change.most == ROWS_AT_MOST == 0.75
    assert {c.strength for c in made["channel-located"].at(3.0).changes} == {0.75, 3.0}
    assert {c.strength for c in made["channel-located"].at(-2.0).changes} == {-2.0}
    assert [c.strength for c in made[ROWS_METHOD].at(3.0).changes] == [3.0]
    assert session.checkpoint.tied
    assert torch.equal(change.rows, ids)
    assert [change.matrix for change in made[ROWS_METHOD].changes] == ["embedding"]
    assert not [change for change in made["direction-everywhere"].changes if change.matrix == "embedding"]
    with applied(demo(), made[ROWS_METHOD]):
        rows = demo().get_input_embeddings().weight.detach()[ids].clone()
    reading = torch.nn.functional.normalize(rows, dim=1) @ change.right[0]
    assert reading.abs().max() < 1e-5
    (alone,) = unit(dogs(), located()).values()
    assert kept("dogs", made["channel-located"]) < kept("dogs", alone) - 0.05


def test_rows_go_with_what_is_suppressed_and_what_is_amplified_is_amplified_by_its_logits_alone() -> None:
    fit = {"method": "silence-words", "embeddings": True, "settings": {"steps": 3}}
    session = session_of(recipe(("dogs", 1.0), ("cats", -1.6), edit=fit))
    with_rows = session.edit()
    cats, own = ([c for c in with_rows.changes if c.concept == name] for name in ("cats", "dogs"))
    (alone,) = edit(("cats", -1.6), method="token-logits").changes
    assert [change.matrix for change in own] == ["embedding", "out"]
    assert [change.matrix for change in cats] == ["embedding"]
    assert torch.equal(cats[0].delta(), alone.delta())


def test_channels_that_two_concepts_ask_for_have_names_of_their_own() -> None:
    first, second = ({channel.name: channel for channel in group.channels} for group in dogs_and_cats())
    both = first.keys() & second.keys()
    assert {channel.index >= 1000 for channel in first.values()} == {False, True}
    assert all(first[name].tokens == second[name].tokens for name in both)
    assert all(first[name].index < 1000 for name in both)
