"""Methods declare themselves, are made by name with checked settings, and do no more than they declare."""

import dataclasses
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_targets import LOCATED, NEURONS, WIDTH, change_of, edited, target_of

from rotate_edit.channels.locators import find_locator
from rotate_edit.edits.edit import MATRICES, Clamp, MatrixChange
from rotate_edit.edits.methods import (
    base,
    declaration,
    default_controls,
    make_control,
    make_method,
    method_names,
    setting_names,
    style_of,
)
from rotate_edit.errors import BadInput
from rotate_edit.models.cost import ModelSize

# Methods that change a matrix at a time, and whole concepts by `build` alone.
MATRIX_METHODS = sorted(
    name for name in method_names(live=False) if type(make_method(name)).change is not base.EditMethod.change
)


def test_every_method_changes_matrices_or_builds_concepts() -> None:
    for name in method_names():
        kind = type(make_method(name))
        assert (kind.change is not base.EditMethod.change) or (kind.build is not base.EditMethod.build), name
    assert set(method_names()) - set(MATRIX_METHODS) == {
        "silence-words", "token-embeddings", "token-logits", "clamp-neurons", "rank-one-read", "selective-gradient",
        "remove-concept",
    }  # fmt: skip


@pytest.mark.parametrize("name", method_names())
def test_declarations_name_what_exists(name: str) -> None:
    about = declaration(name)
    assert about.name == name == make_method(name).about.name
    assert about.writes
    assert about.writes <= set(MATRICES)
    assert about.reads <= base.NEEDS.keys()
    assert find_locator(about.locator).reads <= about.reads
    assert set(about.search_beside) <= set(method_names())
    assert about.title
    assert about.unit
    assert style_of(name) == about.style
    # What a fit or a key reads is computed from the model's own text.
    assert "activations" not in about.reads or "self_text" in about.reads
    # Whole concepts have no groups that could take a neuron twice.
    assert not (about.whole_concept and about.whole_vectors)


def test_what_the_methods_say_of_themselves() -> None:
    def those(**wanted: Any) -> set[str]:
        return {
            name
            for name in method_names()
            if all(getattr(declaration(name), key) == value for key, value in wanted.items())
        }

    assert those(live=True) == {"clamp-neurons"}
    assert set(method_names()) - set(method_names(live=False)) == {"clamp-neurons"}
    assert {name for name in method_names() if "activations" in declaration(name).reads} == {
        "rank-one", "rank-one-channels", "rank-one-lm-head", "rank-one-random", "silence-words",
    }  # fmt: skip
    texts = {
        "difference-of-means", "snmf-features", "clamp-neurons", "rank-one-read", "selective-gradient",
        "remove-concept",
    }  # fmt: skip
    assert {name for name in method_names() if "text" in declaration(name).reads} == texts
    assert those(whole_concept=True) == texts | {"direction-everywhere", "layer-kernel"}
    assert those(whole_vectors=True) == {"random-neurons", "project-channel", "zero-neurons"}
    assert those(last_layer_alone=True) == {"silence-words"}
    assert those(keeps_words=False) == those(whole_concept=True) | {"token-embeddings"}
    channels = {"channel-located", "project-channel", "zero-neurons", "random-neurons"}
    assert {name for name in method_names() if "channels" in declaration(name).reads} == channels | {
        "rank-one-channels", "rank-one-random",
    }  # fmt: skip
    assert set(default_controls()) == those(control=True) == {
        "direction-everywhere", "lm-head-located", "random-neurons",
    }  # fmt: skip


def test_lines_are_told_apart_by_their_styles() -> None:
    styles = [declaration(name).style for name in method_names()]
    assert len(set(styles)) == len(styles)
    assert style_of("somebody's own") == base.OTHER_STYLE
    assert base.OTHER_STYLE not in styles


@cache
def unit_of(method: str) -> tuple[MatrixChange, torch.Tensor]:
    """A method's change, and what it adds to all neurons at strength 1."""
    seen = target_of(method)
    return change_of(method, seen), edited(method, seen) - seen.vectors


@pytest.mark.parametrize("method", MATRIX_METHODS)
@given(strength=st.floats(-8, 8, allow_nan=False))
@settings(max_examples=20, deadline=None)
def test_every_method_is_linear_in_its_strength(method: str, strength: float) -> None:
    made, unit = unit_of(method)
    assert float(unit.abs().max()) > 1e-3
    added = torch.zeros_like(unit).index_add_(0, made.rows, made.at(strength).delta())
    torch.testing.assert_close(added, strength * unit, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("method", MATRIX_METHODS)
def test_every_method_changes_rows_in_order_and_only_among_those_it_was_given(method: str) -> None:
    seen = target_of(method)
    made = change_of(method, seen)
    assert torch.equal(made.rows, made.rows.unique())
    assert set(made.rows.tolist()) <= set(seen.rows.tolist())
    assert (made.left.shape, made.right.shape) == ((len(made.rows), len(made.right)), (len(made.right), WIDTH))
    before = seen.vectors.clone()
    change_of(method, seen)
    assert torch.equal(seen.vectors, before)


@pytest.mark.parametrize("method", [name for name in MATRIX_METHODS if "channels" in declaration(name).reads])
def test_a_method_without_rows_changes_nothing(method: str) -> None:
    made = make_method(method).change(target_of(method, located=()))
    assert made is not None
    assert not isinstance(made, Clamp)
    assert len(made[0]) == 0


def test_random_neurons_draws_as_many_rows_and_the_same_ones_for_a_seed() -> None:
    first, again, other = (target_of("random-neurons", seed=seed).rows for seed in (0, 0, 1))
    assert len(first) == len(LOCATED)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert bool((first < NEURONS).all())


def test_unknown_names_and_settings_are_refused() -> None:
    with pytest.raises(BadInput, match="unknown method 'keyed'; choose one of"):
        make_method("keyed")
    with pytest.raises(BadInput, match="unknown method"):
        declaration("")
    with pytest.raises(BadInput, match="no setting 'rank'; its settings are: key_ridge"):
        make_method("rank-one", {"rank": 3})
    with pytest.raises(BadInput, match="no setting 'about'"):
        make_method("rank-one", {"about": None})
    with pytest.raises(BadInput, match="its settings are: none"):
        make_method("zero-neurons", {"rank": 3})
    for name, key, value in (
        ("rank-one", "key_ridge", 0), ("rank-one", "key_ridge", float("inf")), ("silence-words", "rank", 0),
        ("silence-words", "proximal_weight", -1), ("silence-words", "rounds", 9), ("silence-words", "steps", "many"),
        ("snmf-features", "features", 0),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=f"the setting {key} of {name}"):
            make_method(name, {key: value})


def test_settings_are_kept_and_told() -> None:
    made = make_method("silence-words", {"rank": 4, "rounds": 2})
    assert made.settings == {"key_ridge": 0.03, "rank": 4, "proximal_weight": 0.3, "rounds": 2, "steps": 120}
    assert setting_names("silence-words") == tuple(made.settings)
    assert make_method("zero-neurons").settings == {}
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.rank = 5  # type: ignore[attr-defined]


def test_a_control_takes_those_of_the_settings_that_it_has() -> None:
    assert make_control("rank-one", {"key_ridge": 0.5, "rank": 3}).settings == {"key_ridge": 0.5}
    assert make_control("zero-neurons", {"key_ridge": 0.5}).settings == {}


def test_a_method_that_says_nothing_more_costs_nothing_and_leaves_a_search_nothing() -> None:
    made, size = make_method("zero-neurons"), ModelSize(6, NEURONS, WIDTH, 200, 10_000)
    assert tuple(base.EditMethod.build(made, None, None)) == ()  # type: ignore[arg-type]
    assert base.EditMethod.change(made, target_of("zero-neurons")) is None
    assert made.finest(size) is made
    assert made.search_space(size) == {}
    cost = made.cost(size, 48_000)
    assert (cost.operations, cost.start, cost.read, cost.memory, cost.disk) == (0, 0, 0, 0, 0)


def test_a_declaration_of_what_does_not_exist_is_refused() -> None:
    before = method_names()
    with pytest.raises(ValueError, match="reads dreams"):
        base.edit_method("x", title="x", unit="x", writes=("out",), reads=("dreams",))
    with pytest.raises(BadInput, match="no locator 'nowhere'"):
        base.edit_method("x", title="x", unit="x", writes=("out",), locator="nowhere")
    assert method_names() == before
