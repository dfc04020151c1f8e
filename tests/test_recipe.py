"""The recipe: defaults, round trip, and every error at once."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from places import ROOT

from rotate_edit.edits.edit import METHODS, TOKEN_METHODS
from rotate_edit.errors import BadInput
from rotate_edit.recipe import bundled_recipes, find_recipe, parse_recipe, read_recipe, recipe_text, reference

GOOD: dict[str, Any] = {"model": "demo", "concepts": [{"name": "dogs", "words": ["dog"], "strength": 4}]}


def test_a_filled_in_recipe_reads_back_as_itself() -> None:
    recipe = parse_recipe(GOOD)
    assert parse_recipe(yaml.safe_load(recipe_text(recipe))) == recipe


def test_every_bundled_recipe_is_valid() -> None:
    assert "demo.yaml" in bundled_recipes()
    for name in bundled_recipes():
        recipe = read_recipe(name)
        assert recipe.edit.method in (*METHODS, *TOKEN_METHODS)
        assert parse_recipe(yaml.safe_load(recipe_text(recipe))) == recipe


@pytest.mark.parametrize("method", ["channel-located", "token-logits"])
def test_a_direction_that_no_text_is_read_for_is_refused(method: str) -> None:
    concept = {"name": "dogs", "words": ["dog"], "strength": 2.0}
    content = {"model": "demo", "concepts": [concept], "edit": {"method": method, "direction": "least-divergence"}}
    with pytest.raises(BadInput, match=f"the method here is {method}; take least-collateral"):
        parse_recipe(content)


def test_all_errors_are_reported_together_with_their_keys() -> None:
    bad = {
        "model": "demo",
        "modle": "demo",
        "concepts": [{"name": "dogs", "words": [], "strength": math.nan}],
        "edit": {"metod": "plain", "direction": "sideways"},
    }
    with pytest.raises(BadInput) as caught:
        parse_recipe(bad, "bad.yaml")
    message = str(caught.value)
    assert message.startswith("bad.yaml has 5 errors: ")
    for part in (
        "modle: unknown key, did you mean 'model'",
        "concepts.0.words:",
        "concepts.0.strength: nan is not a finite number",
        "edit.metod: unknown key, did you mean 'method'",
        "edit.direction: input should be 'least-collateral', 'least-divergence' or 'plain'",
    ):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"concepts": [{"name": "a", "words": ["b"], "strength": math.inf}]}, "strength"),
        ({"concepts": [{"name": "a", "words": ["b"], "strength": 0}]}, "strength"),
        ({"concepts": [{"name": "../a", "words": ["b"], "strength": 1}]}, "name"),
        ({"concepts": [{"name": "a", "words": [" "], "strength": 1}]}, "words"),
        ({"concepts": [GOOD["concepts"][0], GOOD["concepts"][0]]}, "same name"),
        ({"concepts": [{"name": "a", "words": ["b"], "strength": "auto"}]}, "strength: auto needs"),
        ({"locate": {"layers": [-1]}}, "locate.layers.0"),
        ({"locate": {"matrices": ["down"]}}, "locate.matrices.0"),
        ({"select": {"share": 1.5}}, "select.share"),
        ({"edit": {"method": "magic"}}, "edit.method: unknown method 'magic'"),
        ({"evaluate": {"controls": ["magic"]}}, "evaluate.controls"),
        ({"edit": {"ridge": 0}}, "edit.ridge"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_its_key(change: dict[str, Any], key: str) -> None:
    with pytest.raises(BadInput, match=key):
        parse_recipe(GOOD | change)


@pytest.mark.parametrize("text", ["a: [", "- only\n- a list", "", "!!python/object/apply:os.system ['true']"])
def test_files_that_are_not_recipes(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(BadInput, match=r"recipe r\.yaml"):
        read_recipe(path)


def test_a_missing_recipe_names_the_bundled_ones(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"demo\.yaml"):
        find_recipe(tmp_path / "none.yaml")


def test_the_reference_in_the_docs_is_the_schema() -> None:
    assert (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8") == reference()


def test_a_filled_recipe_does_not_tell_the_home_folder_and_reads_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    concept = {"name": "dogs", "words": ["dog", "/home/ada"]}
    content = {"model": "/home/ada/models/x", "concepts": [concept], "evaluate": {"text": "/home/ada"}}
    recipe = parse_recipe(content)
    text = recipe_text(recipe)
    assert "model: ~/models/x" in text
    assert yaml.safe_load(text)["evaluate"]["text"] == "~"
    assert parse_recipe(yaml.safe_load(text)) == recipe
    assert parse_recipe(content | {"model": "/home/adam/x"}).model in recipe_text(
        parse_recipe(content | {"model": "/home/adam/x"})
    )


def test_auto_is_fitted_unless_that_is_not_what_the_recipe_needs() -> None:
    dogs = {"name": "dogs", "words": ["dog"], "strength": 1.0}
    plain = {"model": "demo", "concepts": [dogs]}
    assert parse_recipe(plain).edit.method == "fitted"
    assert parse_recipe(plain | {"edit": {"embeddings": True}}).edit.method == "keyed"
    assert parse_recipe(plain | {"locate": {"layers": [1, 2]}}).edit.method == "keyed"
    louder = parse_recipe({"model": "demo", "concepts": [dogs, dogs | {"name": "hounds", "strength": -1.0}]})
    assert louder.edit.method == "fitted"
    lasting = parse_recipe(louder.model_dump() | {"edit": {"embeddings": True}})
    assert lasting.edit.method == "fitted"
    loud = {"model": "demo", "concepts": [dogs | {"strength": -1.0}]}
    with pytest.raises(BadInput, match=r"edit\.embeddings takes a concept out"):
        parse_recipe(loud | {"edit": {"embeddings": True}})
    assert parse_recipe(loud).edit.method == "token-logits"
    assert parse_recipe(loud | {"locate": {"layers": [1, 2]}}).edit.method == "keyed"
    reading = {"model": "demo", "concepts": [dogs], "locate": {"matrices": ["gate", "in"]}}
    assert parse_recipe(reading).edit.method == "channel-located"
    with pytest.raises(BadInput, match=r"edit\.method: keyed rewrites out matrices only"):
        parse_recipe(reading | {"edit": {"method": "keyed"}})
