"""What a recipe names, opened and checked before anything is written."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rotate_edit.channels.locate import sites
from rotate_edit.edits.edit import KEYED, NEEDS_TEXT
from rotate_edit.errors import BadInput
from rotate_edit.estimate import recipe_cost
from rotate_edit.evaluation.tasks import Items, open_items
from rotate_edit.evaluation.text_tasks import items_from_text
from rotate_edit.files import check_output_outside
from rotate_edit.machine import Cost, check_cost, pick_device
from rotate_edit.models.checkpoint import Checkpoint, load_model, load_tokenizer, open_checkpoint
from rotate_edit.recipe import Recipe
from rotate_edit.vocabulary.concept import TokenSet, find_tokens
from rotate_edit.vocabulary.projection import Vocabulary, VocabularyRules, read_vocabulary


@dataclass(frozen=True)
class Opened:
    """What a recipe names, opened and checked: nothing was written yet.

    recipe: without controls that cannot work on this model or on these matrices, which `notes` then names; tokens: for
    each concept its token set; items: what the edit is measured on, or None.
    """

    recipe: Recipe
    checkpoint: Checkpoint
    tokenizer: Any
    vocabulary: Vocabulary
    tokens: tuple[TokenSet, ...]
    items: Items | None
    device: str
    notes: tuple[str, ...] = ()

    def load_base(self) -> Any:
        """The live base model on the recipe's device: in bfloat16 on a CUDA GPU, which the memory check counts on, in
        float32 elsewhere."""
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        return load_model(self.checkpoint, device=self.device, dtype=dtype)

    def warnings(self) -> list[str]:
        """Everything the user should know about the words, one sentence each."""
        return [warning for tokens in self.tokens for warning in tokens.warnings]


def open_recipe(
    recipe: Recipe, output: Path | None = None, *, measured: bool = True, allow_code: bool = False
) -> Opened:
    """Open everything a recipe names. Raises BadInput for whatever cannot work, before anything is written.

    output: where a run will write; then a run that does not fit this machine's memory or disk is refused first;
    allow_code: let the definitions of the items run code that they bring along.
    """
    checkpoint = open_checkpoint(recipe.model, recipe.revision)
    if output is not None:
        check_output_outside(output, checkpoint.folder)
    sites(checkpoint, recipe)
    recipe, notes = _suited(recipe, checkpoint)
    device = pick_device(recipe.decompose.device)
    if output is not None:
        check_cost(recipe_cost(recipe, checkpoint, None, device=device, measured=measured), output)
    tokenizer = load_tokenizer(checkpoint)
    rules = VocabularyRules(
        projection=recipe.locate.projection,
        words_only=recipe.decompose.words_only,
        ignore_undertrained=recipe.decompose.ignore_undertrained,
        level_rarity=recipe.decompose.level_rarity,
    )
    vocabulary = read_vocabulary(checkpoint, rules, tokenizer)
    texts = list(vocabulary.texts)
    tokens = tuple(
        find_tokens(concept.name, concept.words, tokenizer, texts, plurals=concept.plurals)
        for concept in recipe.concepts
    )
    items = _open_items(recipe, tokenizer, allow_code)
    return Opened(recipe, checkpoint, tokenizer, vocabulary, tokens, items, device, notes)


def estimate(recipe: Recipe, *, measured: bool = True) -> tuple[Cost, str]:
    """What a run of a recipe (or, not `measured`, its edit alone) takes, and on which device; no weight is read."""
    checkpoint = open_checkpoint(recipe.model, recipe.revision)
    recipe, _ = _suited(recipe, checkpoint)
    device = pick_device(recipe.decompose.device)
    needs_tokenizer = recipe.evaluate.text is not None
    items = _open_items(recipe, load_tokenizer(checkpoint) if needs_tokenizer else None)
    return recipe_cost(recipe, checkpoint, items, device=device, measured=measured), device


def _suited(recipe: Recipe, checkpoint: Checkpoint) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe without controls that cannot work here, and what to say about them.

    Raises BadInput where the recipe's own method cannot."""
    unsuited: dict[str, str] = {}
    if "out" not in recipe.locate.matrices:
        unsuited |= dict.fromkeys(KEYED, "rewrite out matrices, which locate.matrices leaves out")
    if checkpoint.experts is not None:
        unsuited |= dict.fromkeys((*KEYED, *NEEDS_TEXT), "read activations of dense layers, and this model has experts")
    method, controls = recipe.edit.method, recipe.evaluate.controls
    if method in unsuited:
        raise BadInput(
            f"edit.method: methods such as {method} {unsuited[method]}; set edit.method to channel-located, or to "
            "direction-everywhere."
        )
    kept = [control for control in controls if control not in unsuited]
    left_out = [control for control in controls if control in unsuited]
    if not left_out:
        return recipe, ()
    notes = tuple(
        f"Controls left out: {', '.join(control for control in left_out if unsuited[control] == why)}; they {why}."
        for why in dict.fromkeys(unsuited[control] for control in left_out)
    )
    evaluation = recipe.evaluate.model_copy(update={"controls": kept})
    return recipe.model_copy(update={"evaluate": evaluation}), notes


def _open_items(recipe: Recipe, tokenizer: Any, allow_code: bool = False) -> Items | None:
    if recipe.evaluate.items is not None:
        return open_items(recipe.evaluate.items, allow_code=allow_code)
    if recipe.evaluate.text is not None:
        return items_from_text(
            recipe.evaluate.text,
            {concept.name: concept.words for concept in recipe.concepts},
            {concept.name: concept.neighbour_words for concept in recipe.concepts},
            tokenizer,
            plurals=any(concept.plurals for concept in recipe.concepts),
        )
    return None
