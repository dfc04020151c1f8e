"""The recipe: defaults, round trip, and every error at once."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from places import ROOT

from rotate_edit.edits.methods import default_controls, method_names
from rotate_edit.edits.strength import Goal
from rotate_edit.errors import BadInput
from rotate_edit.recipe import (
    RENAMED,
    RENAMED_METHODS,
    bundled_recipes,
    find_recipe,
    parse_recipe,
    read_recipe,
    recipe_text,
    reference,
)

GOOD: dict[str, Any] = {"model": "demo", "concepts": [{"name": "dogs", "words": ["dog"], "strength": 4}]}


def test_a_filled_in_recipe_reads_back_as_itself() -> None:
    recipe = parse_recipe(GOOD)
    assert parse_recipe(yaml.safe_load(recipe_text(recipe))) == recipe


def test_every_bundled_recipe_is_valid() -> None:
    assert "demo.yaml" in bundled_recipes()
    for name in bundled_recipes():
        recipe = read_recipe(name)
        assert recipe.edit.method in method_names(live=False)
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
        "edit": {"metod": "mean", "direction": "sideways"},
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
        "edit.direction: input should be 'least-collateral', 'least-divergence' or 'mean'",
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
        ({"concepts": [{"name": "a", "words": ["b"], "strength": "auto"}]}, "auto is written as `remaining: 0.1` now"),
        (
            {"concepts": [{"name": "a", "words": ["b"]}], "evaluate": {"written_texts": 0}},
            "remaining needs evaluate.items, evaluate.text or evaluate.written_texts",
        ),
        (
            {"concepts": [{"name": "a", "words": ["b"], "odds": 5}], "evaluate": {"written_texts": 0}},
            "odds needs evaluate.items, evaluate.text or evaluate.written_texts",
        ),
        ({"concepts": [{"name": "a", "words": ["b"], "remaining": 1}]}, "concepts.0.remaining"),
        ({"concepts": [{"name": "a", "words": ["b"], "budget": 0}]}, "concepts.0.budget"),
        ({"concepts": [{"name": "a", "words": ["b"], "odds": 1}]}, "concepts.0.odds"),
        ({"locate": {"layers": [-1]}}, "locate.layers.0"),
        ({"locate": {"matrices": ["down"]}}, "locate.matrices.0"),
        ({"select": {"share": 1.5}}, "select.share"),
        ({"edit": {"method": "magic"}}, "edit.method: unknown method 'magic'"),
        ({"edit": {"method": "clamp-neurons"}}, "edit.method: clamp-neurons works while the model runs"),
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


def test_knowledge_is_removed_unless_the_recipe_speaks_of_words() -> None:
    plain: dict[str, Any] = {"model": "demo", "concepts": [{"name": "dogs", "words": ["dog"]}]}
    found = parse_recipe(plain)
    assert found.edit.method == "remove-concept"
    assert found.locate.matrices is None
    assert "random-neurons" not in (found.evaluate.controls or [])
    assert parse_recipe(plain | {"remove": "words"}).edit.method == "silence-words"
    assert parse_recipe(plain | {"protect": ["cat"]}).edit.method == "silence-words"
    for goal, method in (("remaining", "silence-words"), ("strength", "silence-words"), ("budget", "remove-concept")):
        told = {"name": "dogs", "words": ["dog"], goal: 0.5}
        assert parse_recipe(plain | {"concepts": [told]}).edit.method == method
    again = parse_recipe(yaml.safe_load(recipe_text(found)))
    assert again == found


def test_auto_is_silence_words_unless_that_is_not_what_the_recipe_needs() -> None:
    dogs = {"name": "dogs", "words": ["dog"], "strength": 1.0}
    plain = {"model": "demo", "concepts": [dogs]}
    assert parse_recipe(plain).edit.method == "silence-words"
    assert parse_recipe(plain | {"edit": {"embeddings": True}}).edit.method == "rank-one"
    assert parse_recipe(plain | {"locate": {"layers": [1, 2]}}).edit.method == "rank-one"
    louder = parse_recipe({"model": "demo", "concepts": [dogs, dogs | {"name": "hounds", "strength": -1.0}]})
    assert louder.edit.method == "silence-words"
    lasting = parse_recipe(louder.model_dump() | {"edit": {"embeddings": True}})
    assert lasting.edit.method == "silence-words"
    loud = {"model": "demo", "concepts": [dogs | {"strength": -1.0}]}
    with pytest.raises(BadInput, match=r"edit\.embeddings takes a concept out"):
        parse_recipe(loud | {"edit": {"embeddings": True}})
    assert parse_recipe(loud).edit.method == "token-logits"
    assert parse_recipe(loud | {"locate": {"layers": [1, 2]}}).edit.method == "rank-one"
    reading = {"model": "demo", "concepts": [dogs], "locate": {"matrices": ["gate", "in"]}}
    assert parse_recipe(reading).edit.method == "channel-located"
    with pytest.raises(BadInput, match=r"edit\.method: rank-one rewrites out matrices only"):
        parse_recipe(reading | {"edit": {"method": "rank-one"}})


def with_concept(**entry: Any) -> dict[str, Any]:
    concept = {"name": "dogs", "words": ["dog"]}
    return {"model": "demo", "concepts": [concept | entry], "evaluate": {"items": "demo"}}


@pytest.mark.parametrize("key", RENAMED)
def test_a_renamed_key_is_told_by_its_new_name(key: str) -> None:
    section, name = key.split(".")
    with pytest.raises(BadInput) as caught:
        parse_recipe(GOOD | {section: {name: 1}}, "old.yaml")
    assert str(caught.value) == f"old.yaml has an error: {key}: it is called {RENAMED[key]} now."


@pytest.mark.parametrize("method", RENAMED_METHODS)
def test_a_renamed_method_is_told_by_its_new_name(method: str) -> None:
    now = RENAMED_METHODS[method]
    assert now in method_names()
    with pytest.raises(BadInput) as caught:
        parse_recipe(GOOD | {"edit": {"method": method}, "evaluate": {"controls": [method]}}, "old.yaml")
    told = f"the method {method} is called {now} now."
    assert str(caught.value) == f"old.yaml has 2 errors: edit.method: {told} evaluate.controls: {told}"


def test_a_concept_has_one_goal() -> None:
    # What is removed decides the method, and the method the goal that nobody gives.
    assert parse_recipe(with_concept()).concepts[0].goal == Goal("budget", 0.02)
    assert parse_recipe(with_concept() | {"remove": "words"}).concepts[0].goal == Goal("remaining", 0.1)
    values = {"remaining": 0.2, "budget": 0.02, "odds": 5.0, "strength": -2.0}
    for kind, value in values.items():
        recipe = parse_recipe(with_concept(**{kind: value}))
        assert recipe.concepts[0].goal == Goal(kind, value)
        assert recipe.concepts[0].goal.amplifies == (kind in ("odds", "strength"))
        assert parse_recipe(yaml.safe_load(recipe_text(recipe))) == recipe
    assert not parse_recipe(with_concept(strength=2.0)).concepts[0].goal.amplifies


@pytest.mark.parametrize("other", ["budget", "odds", "strength"])
def test_two_goals_are_refused(other: str) -> None:
    with pytest.raises(BadInput, match=f"concepts.0: remaining and {other} are given, and each of them decides"):
        parse_recipe(with_concept(**{"remaining": 0.2, other: 2.0}))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"settings": {"rnk": 3}}, "the method silence-words has no setting 'rnk'; its settings are: key_ridge, rank,"),
        (
            {"method": "rank-one", "settings": {"rank": 3}},
            "rank-one has no setting 'rank'; its settings are: key_ridge",
        ),
        ({"method": "zero-neurons", "settings": {"rank": 3}}, "no setting 'rank'; its settings are: none"),
        ({"settings": {"rank": 0}}, "the setting rank of silence-words: input should be greater than 0"),
        ({"settings": {"key_ridge": math.inf}}, "the setting key_ridge of silence-words"),
        ({"settings": {"rounds": 9}}, "the setting rounds of silence-words"),
    ],
)
def test_a_methods_own_settings_are_checked_by_the_method(edit: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=f"edit.settings: .*{message}"):
        parse_recipe(GOOD | {"edit": edit})


def test_a_methods_own_settings_are_kept() -> None:
    settings = {"rank": 3, "steps": 5}
    recipe = parse_recipe(GOOD | {"edit": {"settings": settings}})
    assert recipe.edit.settings == settings
    assert parse_recipe(yaml.safe_load(recipe_text(recipe))) == recipe


def test_controls_are_those_made_for_it_without_the_method_itself() -> None:
    assert parse_recipe(GOOD).evaluate.controls == list(default_controls())
    every = parse_recipe(GOOD | {"evaluate": GOOD.get("evaluate", {}) | {"controls": "all"}})
    assert every.evaluate.controls == [name for name in method_names() if name != every.method]
    own = parse_recipe(GOOD | {"edit": {"method": "rank-one"}})
    assert own.evaluate.controls == [name for name in default_controls() if name != "rank-one"]
    assert parse_recipe(GOOD | {"evaluate": {"controls": []}}).evaluate.controls == []


def test_importing_the_recipe_loads_no_torch() -> None:
    program = (
        "import sys, rotate_edit.recipe; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    here = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=here, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"
