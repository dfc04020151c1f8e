"""What opening a recipe settles: which methods the model and the matrices allow, and what is said of the others."""

from typing import Any

import pytest
import torch
from tiny_models import FAMILIES

from rotate_edit import pipeline
from rotate_edit.edits import build as making
from rotate_edit.edits.edit import KEYED, NEEDS_TEXT
from rotate_edit.errors import BadInput
from rotate_edit.models.checkpoint import load_tokenizer, open_checkpoint
from rotate_edit.recipe import EvaluateRecipe, Recipe, parse_recipe
from rotate_edit.session import Opened, open_recipe

DEFAULT_CONTROLS = EvaluateRecipe().controls


def recipe(model: str, **changes: Any) -> Recipe:
    small = {"candidates": 20, "group_distance": 2.0}
    content: dict[str, Any] = {
        "model": model,
        "concepts": [{"name": "dogs", "words": ["dog", "puppy"], "strength": 2.0}],
        "locate": small,
        "decompose": {"channels": 1},
    }
    if "locate" in changes:
        changes["locate"] = small | changes["locate"]
    return parse_recipe(content | changes)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random mixture of experts whose first layer is dense, with the demo's tokens."""
    import transformers

    folder = tmp_path_factory.mktemp("mixture") / "model"
    tokenizer = load_tokenizer(open_checkpoint("demo"))
    family = FAMILIES["qwen3_moe-dense-layer"]
    settings = family.sizes | family.extra | {"vocab_size": len(tokenizer), "tie_word_embeddings": False}
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(transformers.Qwen3MoeConfig(**settings))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def built(opened: Opened) -> Any:
    """The edits of the recipe's method and of its controls."""
    return making.edits_of(
        opened, pipeline.locate(opened), [opened.recipe.edit.method, *opened.recipe.evaluate.controls]
    )


def test_a_mixture_of_experts_is_edited_with_the_controls_that_work_there(mixture: str) -> None:
    opened = open_recipe(recipe(mixture, edit={"method": "direction-everywhere"}))
    assert not {*KEYED, *NEEDS_TEXT} & {*opened.recipe.evaluate.controls}
    left_out = [control for control in DEFAULT_CONTROLS if control in (*KEYED, *NEEDS_TEXT)]
    (note,) = opened.notes
    assert all(control in note for control in left_out)
    assert "experts" in note
    edits = built(opened)
    # Layer 0 is dense, layer 1 has four experts.
    changed = edits["direction-everywhere"].changes
    assert {(change.layer, change.expert) for change in changed} == {(0, None), *((1, expert) for expert in range(4))}


@pytest.mark.parametrize("edit", [{}, {"method": "keyed"}, {"method": "snmf-features"}])
def test_a_method_that_reads_activations_is_refused_at_once_for_a_mixture(mixture: str, edit: dict[str, str]) -> None:
    settings = {"items": "demo"}
    with pytest.raises(BadInput, match=r"this model has experts; set edit.method to channel-located"):
        open_recipe(recipe(mixture, edit=edit, evaluate=settings))


@pytest.mark.parametrize("matrices", [["gate"], ["gate", "in"]])
def test_the_read_side_goes_without_controls_that_write(matrices: list[str]) -> None:
    opened = open_recipe(recipe("demo", locate={"matrices": matrices}, edit={"method": "lm-head-located"}))
    assert opened.recipe.evaluate.controls == [control for control in DEFAULT_CONTROLS if control not in KEYED]
    assert "out matrices" in opened.notes[0]
    assert built(opened)["lm-head-located"].changes


def test_a_dense_model_keeps_every_control() -> None:
    opened = open_recipe(recipe("demo"))
    assert opened.recipe.evaluate.controls == DEFAULT_CONTROLS
    assert opened.notes == ()


def test_an_empty_list_of_layers_is_refused() -> None:
    with pytest.raises(BadInput, match=r"locate.layers"):
        recipe("demo", locate={"layers": []})
