"""Several concepts in one recipe, protected words, and methods that need text: on the demo model, with numbers."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_tiny

from rotate_edit import pipeline
from rotate_edit.channels.locate import Located, token_changes
from rotate_edit.edits.apply import applied
from rotate_edit.edits.build import edits_of
from rotate_edit.edits.edit import NEEDS_TEXT, ROWS_AT_MOST, TOKEN_METHOD, Edit
from rotate_edit.errors import BadInput
from rotate_edit.evaluation import measures
from rotate_edit.evaluation.evaluate import texts_about
from rotate_edit.models import batches
from rotate_edit.models.checkpoint import load_model, open_checkpoint, read_unembedding
from rotate_edit.models.demo.world import concepts
from rotate_edit.recipe import Recipe, parse_recipe
from rotate_edit.vocabulary.concept import TokenSet, find_tokens

SUPPRESSED, AMPLIFIED = ("dogs", 6.0), ("cats", -3.0)


def recipe(*wanted: tuple[str, float], items: str | None = "demo", **changes: Any) -> Recipe:
    entries = [
        {"name": name, "words": list(concepts()[name].words), "plurals": True, "strength": strength}
        for name, strength in wanted
    ]
    small = {
        "model": "demo",
        "concepts": entries,
        "locate": {"group_distance": 2.0, "candidates": 120},
        "decompose": {"channels": 1},
        "edit": {"method": "channel-located", "key_tokens": 2000} | changes.pop("edit", {}),
        "evaluate": {"items": items, "tokens": 1000},
    }
    return parse_recipe(small | changes)


@cache
def demo() -> Any:
    return load_model(open_checkpoint("demo"))


@cache
def edit(*wanted: tuple[str, float], method: str = "channel-located") -> Edit:
    opened = pipeline.open_recipe(recipe(*wanted, edit={"method": method}))
    return edits_of(opened, pipeline.locate(opened), [method], demo())[method]


def kept(name: str, made: Edit) -> float:
    """What an edit leaves of a concept's probability mass."""
    opened = pipeline.open_recipe(recipe((name, 1.0)))
    assert opened.items is not None
    passages = batches.tokenise(
        opened.tokenizer,
        texts_about(opened.items, [name])[0],
        vocabulary_size=opened.checkpoint.vocabulary_size,
        token_limit=800,
    )
    ids = opened.tokens[0].ids
    before, _ = measures.mass_by_text(demo(), passages, ids)
    with applied(demo(), made):
        after, _ = measures.mass_by_text(demo(), passages, ids)
    return float(after.sum() / before.sum())


def test_suppressing_and_amplifying_together_undo_nothing() -> None:
    both = edit(SUPPRESSED, AMPLIFIED)
    gone = kept("dogs", edit(SUPPRESSED))
    raised = kept("cats", edit(AMPLIFIED))
    assert gone < 0.2
    assert raised > 1.05
    assert kept("dogs", both) < gone + 0.02
    assert kept("cats", both) > raised - 0.02


def test_two_keyed_concepts_are_both_removed() -> None:
    dogs, ships = ("dogs", 6.0), ("ships", 6.0)
    both = edit(dogs, ships, method="keyed")
    for name, alone in (("dogs", edit(dogs, method="keyed")), ("ships", edit(ships, method="keyed"))):
        gone = kept(name, alone)
        assert gone < 0.3
        assert kept(name, both) < gone + 0.05


def test_two_fitted_concepts_are_both_removed() -> None:
    both = edit(("dogs", 6.0), ("ships", 6.0), method="fitted")
    assert kept("dogs", both) < 0.3
    assert kept("ships", both) < 0.3


def test_a_fitted_recipe_lowers_one_concept_and_raises_another() -> None:
    both = edit(("dogs", 6.0), ("cats", -2.0), method="fitted")
    assert [(change.matrix, change.concept) for change in both.changes] == [("out", "dogs"), ("embedding", "cats")]
    (alone,) = edit(("cats", -2.0), method="token-logits").changes
    assert torch.equal(both.changes[1].delta(), alone.delta())
    assert kept("dogs", both) < 0.3
    assert kept("cats", both) > 1.0


def test_a_protected_concept_and_word_are_not_moved_to_first_order() -> None:
    cats = list(concepts()["cats"].words)
    opened = pipeline.open_recipe(recipe(("dogs", 6.0), protect=["violin", cats]))
    found = pipeline.locate(opened)
    made = edits_of(opened, found, ["channel-located"])["channel-located"]
    free = edits_of(pipeline.open_recipe(recipe(("dogs", 6.0))), found, ["channel-located"])["channel-located"]
    head = demo().lm_head.weight.detach() * demo().model.norm.weight.detach()
    text_of = {text: index for index, text in enumerate(opened.vocabulary.texts)}
    trained = head[~opened.vocabulary.untrained].mean(0)

    def moved(change: Any, words: list[str]) -> float:
        ids = [text_of[f" {word}"] for word in words if f" {word}" in text_of]
        return float(((head[ids].mean(0) - trained) @ change.right[0]).abs() / change.right[0].norm())

    assert moved(made.changes[0], ["violin"]) < 1e-4
    assert moved(free.changes[0], ["violin"]) > 1e-3
    assert kept("dogs", made) < 0.3


def test_no_direction_of_a_fit_moves_what_is_protected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rotate_edit.edits.low_rank.STEPS", 3)
    opened = pipeline.open_recipe(recipe(("dogs", 6.0), protect=["violin"], edit={"method": "fitted"}))
    (change,) = edits_of(opened, pipeline.locate(opened), ["fitted"], demo())["fitted"].changes
    head = demo().lm_head.weight.detach() * demo().model.norm.weight.detach()
    violin = next(index for index, text in enumerate(opened.vocabulary.texts) if text == " violin")
    mean = head[violin] - head[~opened.vocabulary.untrained].mean(0)
    assert len(change.right) > 10
    moved = change.delta() @ mean
    assert float(moved.norm()) < 1e-6 * float(change.delta().norm() * mean.norm())


@pytest.mark.parametrize("words", [["kitten", "tabby"], sorted(concepts()["cats"].words)])
def test_neighbour_words_are_left_alone_each_or_together_when_they_are_many(words: list[str]) -> None:
    content = recipe(("dogs", 6.0)).model_dump()
    content["concepts"][0]["neighbour_words"] = words
    opened = pipeline.open_recipe(parse_recipe(content))
    made = edits_of(opened, pipeline.locate(opened), ["channel-located"])["channel-located"]
    head = demo().lm_head.weight.detach() * demo().model.norm.weight.detach()
    ids = find_tokens("cats", words, opened.tokenizer, list(opened.vocabulary.texts), plurals=True).ids
    ids = ids[~torch.isin(ids, opened.tokens[0].ids)]
    write = made.changes[0].right[0]
    mean = head[ids].mean(0) - head[~opened.vocabulary.untrained].mean(0)
    assert abs(float(mean @ write)) < 1e-4 * float(mean.norm() * write.norm())


@pytest.mark.parametrize("direction", ["plain", "least-collateral"])
def test_other_concepts_of_the_recipe_are_kept_by_every_direction(direction: str) -> None:
    opened = pipeline.open_recipe(recipe(SUPPRESSED, AMPLIFIED, edit={"direction": direction}))
    made = edits_of(opened, pipeline.locate(opened), ["channel-located"])["channel-located"]
    head = demo().lm_head.weight.detach() * demo().model.norm.weight.detach()
    cats = head[opened.tokens[1].ids].mean(0) - head[~opened.vocabulary.untrained].mean(0)
    write = next(change.right[0] for change in made.changes if change.concept == "dogs")
    assert abs(float(cats @ write)) < 1e-4 * float(cats.norm() * write.norm())


def test_methods_that_need_text_remove_the_concept_or_say_what_they_need() -> None:
    opened = pipeline.open_recipe(recipe(("dogs", 1.0)))
    found = pipeline.locate(opened)
    made = edits_of(opened, found, ["channel-located", *NEEDS_TEXT], demo())
    assert {len(made[method].changes) for method in NEEDS_TEXT} == {0, opened.checkpoint.layers}
    assert len(made["clamp-neurons"].clamps) > 0
    left = {
        "difference-of-means": kept("dogs", made["difference-of-means"].with_strength(2.0)),
        "snmf-features": kept("dogs", made["snmf-features"].with_strength(8.0)),
        "clamp-neurons": kept("dogs", made["clamp-neurons"].with_strength(2.0)),
    }
    assert max(left.values()) < 0.9
    without = pipeline.open_recipe(recipe(("dogs", 1.0), items=None))
    with pytest.raises(BadInput, match="the method snmf-features needs text about the concept"):
        edits_of(without, found, ["channel-located", "snmf-features"], demo())


def test_layer_strengths_multiply_the_layers_own() -> None:
    opened = pipeline.open_recipe(recipe(("dogs", 2.0), edit={"layer_strengths": {0: 0.0, 2: 0.5}}))
    found = pipeline.locate(pipeline.open_recipe(recipe(("dogs", 2.0))))
    plain = edit(("dogs", 2.0))
    made = edits_of(opened, found, ["channel-located"])["channel-located"]
    before = {change.layer: change.delta() for change in plain.changes}
    after = {change.layer: change.delta() for change in made.changes}
    assert set(after) == set(before) - {0}
    torch.testing.assert_close(after[2], 0.5 * before[2])
    assert all(torch.equal(after[layer], before[layer]) for layer in after if layer != 2)


def test_embeddings_are_edited_when_asked_and_once_where_the_head_is_tied() -> None:
    opened = pipeline.open_recipe(recipe(("dogs", 1.0), edit={"embeddings": True}))
    found = pipeline.locate(pipeline.open_recipe(recipe(("dogs", 1.0))))
    made = edits_of(opened, found, ["channel-located", TOKEN_METHOD, "direction-everywhere"])
    ids = opened.tokens[0].ids
    (change,) = [change for change in made["channel-located"].changes if change.matrix == "embedding"]
    # Beside neurons the rows go three quarters of the way and no further; alone they go as far as they are told.
    assert change.strength == change.most == ROWS_AT_MOST == 0.75
    assert {c.strength for c in made["channel-located"].with_strength(3.0).changes} == {0.75, 3.0}
    assert {c.strength for c in made["channel-located"].scaled(-2.0).changes} == {-1.5, -2.0}
    assert [c.strength for c in made[TOKEN_METHOD].with_strength(3.0).changes] == [3.0]
    assert opened.checkpoint.tied
    assert torch.equal(change.rows, ids)
    assert [change.matrix for change in made[TOKEN_METHOD].changes] == ["embedding"]
    assert not [change for change in made["direction-everywhere"].changes if change.matrix == "embedding"]
    with applied(demo(), made[TOKEN_METHOD]):
        rows = demo().get_input_embeddings().weight.detach()[ids].clone()
    reading = torch.nn.functional.normalize(rows, dim=1) @ change.right[0]
    assert reading.abs().max() < 1e-5
    assert kept("dogs", made["channel-located"]) < kept("dogs", edit(("dogs", 1.0))) - 0.05


def test_rows_go_with_what_is_lowered_and_what_is_raised_is_raised_by_its_logits_alone() -> None:
    embeddings = {"method": "fitted", "embeddings": True}
    opened = pipeline.open_recipe(recipe(("dogs", 1.0), ("cats", -1.6), edit=embeddings))
    found = pipeline.locate(opened)
    with_rows = edits_of(opened, found, ["fitted"], demo())["fitted"]
    cats, dogs = ([c for c in with_rows.changes if c.concept == name] for name in ("cats", "dogs"))
    (alone,) = edit(("cats", -1.6), method="token-logits").changes
    assert [change.matrix for change in dogs] == ["embedding", "out"]
    assert [change.matrix for change in cats] == ["embedding"]
    assert torch.equal(cats[0].delta(), alone.delta())


def test_an_untied_model_has_both_tables_edited(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_tiny("llama", tmp_path / "m", tied=False, dtype=torch.float32))
    tokens = TokenSet("dogs", torch.tensor([3, 5]), {}, (), ())
    concept = recipe(("dogs", 1.0)).concepts[0]
    located = Located(concept, tokens, 0, tokens.ids, {}, {}, (), ())
    untrained = torch.zeros(checkpoint.vocabulary_size, dtype=torch.bool)
    made = token_changes(checkpoint, untrained, located, 1.0)
    assert [change.matrix for change in made] == ["embedding", "unembedding"]
    head = read_unembedding(checkpoint)
    left = head[tokens.ids] + made[1].delta()
    mean = head[tokens.ids].mean(0) - head.mean(0)
    assert (left @ mean).abs().max() < 1e-5 * mean.norm() * head.norm(dim=1).max()


def test_channels_that_two_concepts_ask_for_have_names_of_their_own() -> None:
    found = pipeline.locate(pipeline.open_recipe(recipe(("dogs", 1.0), ("cats", 1.0))))
    first, second = ({channel.name: channel for channel in located.channels} for located in found)
    both = first.keys() & second.keys()
    assert {channel.index >= 1000 for channel in first.values()} == {False, True}
    assert all(first[name].tokens == second[name].tokens for name in both)
    assert all(first[name].index < 1000 for name in both)
