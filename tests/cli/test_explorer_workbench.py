"""What the explorer's page does, without the page: on the demo model."""

from pathlib import Path

import pytest
import torch
from demo_session import session_of

from rotate_edit import pipeline
from rotate_edit.channels.channel_set import load_channels, save_channels
from rotate_edit.cli.explorer import workbench
from rotate_edit.cli.explorer.workbench import Turned, Workbench
from rotate_edit.edits.apply import applied
from rotate_edit.errors import BadInput
from rotate_edit.models.checkpoint import identity, open_checkpoint
from rotate_edit.models.generation import generate
from rotate_edit.recipe import parse_recipe, read_recipe

WORDS = ["dog", "hound", "terrier"]
PROMPT = "The collie barked at the gate. Greta looked at the"


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return Workbench(session_of(parse_recipe({"model": "demo", "channels": [{"channel": "L0.N0.out#0"}]})))


@pytest.fixture(scope="module")
def cart(bench: Workbench) -> list[Turned]:
    hit = workbench.find(bench, WORDS, "out")[0]
    own = workbench.neuron_page(bench, "L4.N374")["out"][1]
    return [Turned(hit.channel.name, 2.0, hit.channel.tokens, hit.words), Turned(own.name, -1.0, own.tokens)]


def test_a_recipe_of_the_cart_gives_the_edit_of_the_sliders(
    bench: Workbench, cart: list[Turned], tmp_path: Path
) -> None:
    edit = workbench.edit_of(bench, cart)
    path = workbench.write_recipe(bench, cart, tmp_path / "runs" / "recipe.yaml")
    again = pipeline.edit_only(read_recipe(path), tmp_path / "edit", checkpoint=False, measured=False).edit
    assert again.concepts == edit.concepts
    for one, other in zip(edit.changes, again.changes, strict=True):
        torch.testing.assert_close(one.delta(), other.delta(), rtol=1e-5, atol=1e-6)
    folder = workbench.write_edit(bench, cart, tmp_path / "written")
    assert (folder / "model" / "config.json").is_file()


def test_a_channel_at_nothing_is_not_in_the_edit_and_an_empty_cart_is_not_written(
    bench: Workbench, cart: list[Turned], tmp_path: Path
) -> None:
    still = workbench.with_strengths(cart, {one.name: 0.0 for one in cart})
    assert not workbench.edit_of(bench, still).changes
    with pytest.raises(BadInput, match="the cart holds no channel that is turned"):
        workbench.write_recipe(bench, still, tmp_path / "recipe.yaml")
    assert workbench.with_strengths(cart, {cart[0].name: 3.0})[0].strength == 3.0


def test_texts_grow_and_end_as_what_both_models_write(bench: Workbench, cart: list[Turned]) -> None:
    strong = workbench.with_strengths(cart, {cart[0].name: 30.0})
    grown = list(workbench.texts(bench, strong, PROMPT, new_tokens=12))
    model, tokenizer = bench.session.model, bench.session.tokenizer
    base = generate(model, tokenizer, [PROMPT], new_tokens=12)[0][0]
    with applied(model, workbench.edit_of(bench, strong)):
        edited = generate(model, tokenizer, [PROMPT], new_tokens=12)[0][0]
    assert grown[-1] == (base, edited)
    assert base != edited
    assert len(grown) > 12
    assert generate(model, tokenizer, [PROMPT], new_tokens=12)[0][0] == base


def test_the_probability_of_a_word_falls_when_its_channel_is_taken_out(bench: Workbench, cart: list[Turned]) -> None:
    before, after = workbench.probabilities(bench, cart[:1], PROMPT, "spaniel")
    assert 0 < after < before < 1
    assert workbench.probabilities(bench, [], PROMPT, "spaniel") == (before, before)
    with pytest.raises(BadInput, match="is one token"):
        workbench.probabilities(bench, cart, PROMPT, "qqzzxx")


def test_texts_that_fire_a_neuron_are_those_with_its_strongest_activations(bench: Workbench) -> None:
    found = workbench.firing_texts(bench, "L4.N393")
    assert len(found) == workbench.TEXTS
    sizes = [abs(firing.activation) for firing in found]
    assert sizes == sorted(sizes, reverse=True)
    assert all(firing.token for firing in found)


def test_an_atlas_is_searched_in_place_of_the_model(bench: Workbench, cart: list[Turned], tmp_path: Path) -> None:
    kept = [bench.known[one.name] for one in cart]
    save_channels(kept, tmp_path / "atlas", base=identity(open_checkpoint("demo")), settings={})
    other = workbench.open_workbench("demo", str(tmp_path / "atlas"))
    hits = workbench.find(other, ["terrier"], "out")
    assert [hit.channel.name for hit in hits] == [cart[0].name]
    assert load_channels(tmp_path / "atlas")[0].name == cart[0].name
    # What a neuron's page shows is in the set, so that a recipe finds it there again.
    own = workbench.neuron_page(other, "L4.N393")
    assert [channel.name for found in own.values() for channel in found] == [cart[0].name]
    save_channels(kept, tmp_path / "bare", base=identity(open_checkpoint("demo")), settings={}, vectors=None)
    with pytest.raises(BadInput, match="was written without vectors"):
        workbench.open_workbench("demo", str(tmp_path / "bare"))
    with pytest.raises(BadInput, match="give a word"):
        workbench.find(other, [], "out")


def test_a_page_that_was_left_leaves_the_weights_as_they_were(bench: Workbench, cart: list[Turned]) -> None:
    model, tokenizer = bench.session.model, bench.session.tokenizer
    base = generate(model, tokenizer, [PROMPT], new_tokens=12)[0][0]
    grown = workbench.texts(bench, workbench.with_strengths(cart, {cart[0].name: 30.0}), PROMPT, new_tokens=200)
    while not next(grown)[1]:
        pass
    grown.close()
    assert generate(model, tokenizer, [PROMPT], new_tokens=12)[0][0] == base


def test_a_neuron_that_is_not_there_is_said(bench: Workbench) -> None:
    for address in ("L4.N999999", "L9.N1"):
        for look in (workbench.neuron_page, workbench.firing_texts):
            with pytest.raises(BadInput, match=r"is not in the model|is out of range"):
                look(bench, address)
