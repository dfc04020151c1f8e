"""The recipe: one YAML file that says what is edited, how, and how it is measured.

Every setting stands here with its default and a sentence. A recipe is data: nothing in it is ever executed. All
errors of a recipe are reported together.
"""

import difflib
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from rotate_edit.edits.edit import (
    KEYED,
    LIVE_METHODS,
    LOGIT_METHOD,
    METHODS,
    TOKEN_METHOD,
    TOKEN_METHODS,
    WHOLE_CONCEPT,
)
from rotate_edit.errors import BadInput
from rotate_edit.files import data_folder

Matrix = Literal["gate", "in", "out"]
Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Section(BaseModel):
    """Unknown keys are errors, and a recipe does not change after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ConceptRecipe(_Section):
    """One concept: its words and what is done to it."""

    name: str = Field(min_length=1, max_length=80, pattern=r"^[\w][\w .-]*$", description="A short name.")
    words: list[str] = Field(min_length=1, description="The words of the concept.")
    plurals: bool = Field(False, description="Also follow the plural of every word.")
    strength: Finite | Literal["auto"] = Field(
        "auto",
        description="1 removes the concept's direction from the located neurons, more pushes against it, below 0 "
        "amplifies (by token-logits and fitted in nats: -1.6 makes its odds five times as large); auto takes the "
        "smallest strength that leaves `target` of the concept.",
    )
    neighbours: list[str] = Field(
        [], description="Names of concepts of the evaluation items that lie close and must be kept."
    )
    neighbour_words: list[str] = Field(
        [],
        description="Words that lie close and must be kept: edits with a direction "
        "leave them alone to first order, and they are measured on `text`.",
    )
    keep: list[str] = Field([], description="Words whose mean logit the edit must not move (first order).")

    @property
    def amplified(self) -> bool:
        """Whether the edit is to raise the concept."""
        return self.strength != "auto" and self.strength < 0

    @field_validator("words", "neighbour_words", "keep")
    @classmethod
    def _no_empty_word(cls, words: list[str]) -> list[str]:
        if any(not word.strip() for word in words):
            raise ValueError("a word is empty")
        return [word.strip() for word in words]

    @field_validator("strength")
    @classmethod
    def _strength_does_something(cls, strength: float | str) -> float | str:
        if strength == 0:
            raise ValueError("0 changes nothing; use a positive number to suppress or a negative one to amplify")
        return strength


class LocateRecipe(_Section):
    """Which neurons are looked at."""

    matrices: list[Matrix] = Field(
        ["out"], min_length=1, description="out: what neurons write; gate, in: what they read."
    )
    layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = Field(
        None, description="Layers to look at; all when left out."
    )
    candidates: Positive = Field(
        300, description="How many neurons of each matrix kind the LM-head scan passes on for each group of tokens."
    )
    group_distance: Annotated[float, Field(gt=0, le=2, allow_inf_nan=False)] | Literal["auto"] = Field(
        "auto",
        description="Cosine distance at which a concept's tokens fall into groups with a direction of their own; 2 "
        "keeps one group; auto does too, unless the method is located and groups halve the damage on the texts for "
        "choosing.",
    )
    projection: Literal["auto", "unembedding", "embedding"] | Annotated[int, Field(ge=0, strict=True)] = Field(
        "auto",
        description="What projects a vector on the vocabulary: one table for all layers, or the first layer that takes "
        "the unembedding; auto finds that layer from the weights of a model with two tables.",
    )


class DecomposeRecipe(_Section):
    """How candidates are split into vocabulary channels."""

    solver: Literal["circle", "adamw"] = Field("circle", description="circle is exact and fast; adamw is the paper's.")
    channels: Positive = Field(2, description="At most this many channels of a neuron.")
    moments: Literal["weighted", "zeroed"] = Field("weighted", description="How masked tokens enter the kurtosis.")
    words_only: bool = Field(True, description="Only tokens that begin a word and are made of letters count.")
    ignore_undertrained: bool = Field(True, description="Under-trained tokens get weight 0.")
    level_rarity: bool = Field(True, description="Take out the axis on which rare tokens differ from the rest.")
    tilted_start: bool = Field(
        True, description="Also search each candidate from the concept's own direction: is this concept in it?"
    )
    claim_threshold: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="z-score above which a channel claims tokens; the family's value when left out."
    )
    unsupported_limit: Positive = Field(3, description="Stop a neuron after this many unsupported channels in a row.")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="Where the solver runs.")


class SelectRecipe(_Section):
    """Which neurons carry the concept."""

    top: Positive = Field(10, description="How many of a channel's strongest tokens are looked at.")
    share: Fraction = Field(0.5, description="At least this fraction of them must be words of the concept.")
    support: Finite = Field(2.0, description="Channels with less support are never used.")
    lm_head_z: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        1.0, description="|mean z| above which the control `lm-head-located` takes a neuron."
    )


class EditRecipe(_Section):
    """How the located neurons are rewritten."""

    method: str = Field(
        "auto",
        description="fitted; keyed beside `embeddings` (unless a concept is amplified) or where `locate.layers` names "
        "layers; channel-located where no "
        "`out` matrix is looked at; token-logits where every concept is amplified. Or one of: "
        + ", ".join((*METHODS, *TOKEN_METHODS))
        + ".",
    )
    direction: Literal["least-collateral", "least-divergence", "plain"] = Field(
        "least-collateral",
        description="The concept's direction: plain, chosen to move other logits least, or chosen to change the "
        "model's own predictions least (KL divergence on the text that a keyed method reads).",
    )
    ridge: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        0.3, description="Ridge of the least-collateral direction, as a multiple of the median eigenvalue."
    )
    fold_norm: bool = Field(True, description="Fold the gain of the norm before the vocabulary into the direction.")
    key_tokens: Annotated[int, Field(ge=100)] = Field(
        48000, description="How many tokens of its own text the model writes for fitted and keyed methods."
    )
    key_ridge: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        0.03, description="Ridge of the keyed methods, as a multiple of the neurons' mean square."
    )
    fit_rank: Positive = Field(32, description="The method `fitted` writes along so many directions at most.")
    fit_leash: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        0.3,
        description="How firmly `fitted` is held at the keyed edit that it starts from; 0, not at all, fits the words "
        "told more closely and says less of others.",
    )
    fit_rounds: Annotated[int, Field(ge=1, le=8)] = Field(
        1,
        description="How many rounds of ever smaller steps `fitted` takes; each after the first costs half its time. "
        "Three, with a `fit_rank` of 128, do about four fifths of the damage of one with 32 on the demo.",
    )
    embeddings: bool = Field(
        False,
        description="Also take three quarters of the concept out of its own tokens' embeddings and head rows (the "
        "control `token-embeddings` shows what these rows do alone). A concept that is amplified keeps its rows.",
    )
    layer_strengths: dict[Annotated[int, Field(ge=0)], Finite] = Field(
        {}, description="What the strength is multiplied by in single layers, such as `{0: 0, 3: 1.5}`; 1 elsewhere."
    )
    target: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.1, description="The share of the concept's probability mass that `strength: auto` leaves."
    )

    @field_validator("method")
    @classmethod
    def _known_method(cls, method: str) -> str:
        if method in LIVE_METHODS:
            raise ValueError(
                f"{method} works while the model runs and cannot be written; name it under evaluate.controls"
            )
        if method not in ("auto", *METHODS, *TOKEN_METHODS):
            raise ValueError(f"unknown method {method!r}; choose one of {', '.join((*METHODS, *TOKEN_METHODS))}")
        return method


class SaveRecipe(_Section):
    """What is written."""

    checkpoint: bool = Field(True, description="Write the patched checkpoint to model/.")
    adapter: bool = Field(True, description="Write the same edit as a LoRA adapter to adapter/.")
    undo: bool = Field(True, description="Write what an exact undo needs beside the edit.")
    full_hash: bool = Field(
        False, description="Take the SHA-256 of every tensor of a base above a gigabyte, not of the changed ones alone."
    )


class EvaluateRecipe(_Section):
    """How the edit is proved."""

    items: str | None = Field(None, description="A folder of evaluation items, or `demo` for the bundled ones.")
    tasks: list[str] = Field([], description="lm-eval tasks by name, as general abilities (they need a network).")
    text: str | None = Field(
        None,
        description="A text file or folder, or a dataset of the Hub (`name`, `name:configuration` or "
        "`name:configuration:split`), for concept mass and collateral KL.",
    )
    limit: Positive | None = Field(None, description="At most this many items of each task.")
    tokens: Positive = Field(4000, description="At most this many tokens of text for each point of a curve.")
    controls: list[str] = Field(
        [
            "keyed",
            "channel-located",
            "channel-keyed",
            "lm-head-located",
            "direction-everywhere",
            "project-channel",
            "zero-neurons",
            "random-neurons",
        ],
        description="The edit methods drawn beside the chosen one.",
    )
    strengths: list[Finite] = Field(
        [1.0, 2.0, 4.0, 8.0, 16.0], min_length=2, description="The strengths of a suppression curve."
    )
    batch_size: Positive = Field(64, description="Sequences scored at once.")

    @field_validator("items", "text")
    @classmethod
    def _home(cls, path: str | None) -> str | None:
        return _without_tilde(path)

    @field_validator("controls")
    @classmethod
    def _known_controls(cls, controls: list[str]) -> list[str]:
        known = (*METHODS, *TOKEN_METHODS, *LIVE_METHODS)
        unknown = [name for name in controls if name not in known]
        if unknown:
            raise ValueError(f"unknown method {', '.join(unknown)}; choose from {', '.join(known)}")
        return controls


class Recipe(_Section):
    """A whole run."""

    model: str = Field(min_length=1, description="`demo`, a folder, or a Hub id.")
    revision: str | None = Field(None, description="The Hub revision.")
    concepts: list[ConceptRecipe] = Field(min_length=1, description="The concepts to edit.")
    protect: list[str | list[str]] = Field(
        [],
        description="What no edit may move (first order): words, each by itself, or lists of words, each as a concept.",
    )
    locate: LocateRecipe = LocateRecipe()
    decompose: DecomposeRecipe = DecomposeRecipe()
    select: SelectRecipe = SelectRecipe()
    edit: EditRecipe = EditRecipe()
    save: SaveRecipe = SaveRecipe()
    evaluate: EvaluateRecipe = EvaluateRecipe()
    seed: int = Field(0, description="Seed of everything random.")

    @field_validator("model")
    @classmethod
    def _home(cls, path: str) -> str:
        return _without_tilde(path) or path

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        names = [concept.name for concept in self.concepts]
        if len(set(names)) != len(names):
            raise ValueError("two concepts have the same name")
        if self.edit.method in (*WHOLE_CONCEPT, TOKEN_METHOD) and (
            self.protect or any(concept.keep for concept in self.concepts)
        ):
            raise ValueError(
                f"the method {self.edit.method} takes one direction as it is and can keep or protect nothing"
            )
        if self.edit.method in KEYED and "out" not in self.locate.matrices:
            raise ValueError(
                f"edit.method: {self.edit.method} rewrites out matrices only; add out to locate.matrices, or set "
                "edit.method to channel-located"
            )
        if self.edit.embeddings and all(concept.amplified for concept in self.concepts):
            raise ValueError(
                "edit.embeddings takes a concept out of its tokens' rows, and every concept here is amplified; leave "
                "it out, or give a positive strength"
            )
        if self.edit.direction == "least-divergence" and _method(self) not in KEYED:
            raise ValueError(
                "edit.direction: least-divergence is fitted on text that only the keyed methods read, and the method "
                f"here is {_method(self)}; take least-collateral, or set edit.method to keyed"
            )
        if any(concept.strength == "auto" for concept in self.concepts) and not (
            self.evaluate.items or self.evaluate.text
        ):
            raise ValueError("strength: auto needs evaluate.items or evaluate.text to measure the concept on")
        return self


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe file; a bare name is also looked for among the recipes that come with the package.

    Raises BadInput with every error of the recipe at once.
    """
    found = find_recipe(path)
    try:
        content = yaml.safe_load(found.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"recipe {found.name} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise BadInput(f"recipe {found.name} must be a mapping of settings such as `model:` and `concepts:`.")
    return parse_recipe(content, found.name)


def find_recipe(path: str | Path) -> Path:
    """The file a recipe argument means: the path itself, or a bundled recipe of that file name."""
    if Path(path).is_file():
        return Path(path)
    bundled = data_folder("recipes") / Path(path).name
    if bundled.is_file() and Path(path).parent in (Path("."), Path("recipes")):
        return bundled
    raise BadInput(f"there is no recipe at {path}; the bundled ones are {', '.join(bundled_recipes())}.")


def bundled_recipes() -> list[str]:
    """File names of the recipes that come with the package."""
    return sorted(path.name for path in data_folder("recipes").glob("*.yaml"))


def parse_recipe(content: dict[str, Any], name: str = "recipe") -> Recipe:
    """Check a recipe's content. Raises BadInput that lists every error with its key."""
    try:
        return _settled(Recipe.model_validate(content))
    except ValidationError as error:
        messages: dict[str, list[str]] = {}
        for key, message in map(_explain, error.errors()):
            if message not in messages.setdefault(key, []):
                messages[key].append(message)
        lines = [f"{key}: {', or '.join(found)}." for key, found in messages.items()]
        count = f"{len(lines)} errors" if len(lines) > 1 else "an error"
        raise BadInput(f"{name} has {count}: " + " ".join(lines)) from error


def _settled(recipe: Recipe) -> Recipe:
    """The recipe with the edit method that `auto` stands for.

    A fit needs the last layer, and beside embedding rows it comes back sooner than the key when it is relearned. What
    neurons do raises a concept where it is likely anyway; its tokens' logits raise it everywhere.
    """
    return recipe.model_copy(update={"edit": recipe.edit.model_copy(update={"method": _method(recipe)})})


def _method(recipe: Recipe) -> str:
    if recipe.edit.method != "auto":
        return recipe.edit.method
    if "out" not in recipe.locate.matrices:
        return "channel-located"
    raised = [concept for concept in recipe.concepts if concept.amplified]
    if recipe.locate.layers is not None or (recipe.edit.embeddings and not raised):
        return "keyed"
    return LOGIT_METHOD if len(raised) == len(recipe.concepts) else "fitted"


def recipe_text(recipe: Recipe) -> str:
    """The recipe as YAML with every default filled in, and `~` for the home folder, which would tell a user's name."""
    content = recipe.model_dump(mode="json", by_alias=True)
    for section, key in ((content, "model"), (content["evaluate"], "items"), (content["evaluate"], "text")):
        home = str(Path.home())
        if section[key] and (section[key] == home or section[key].startswith(f"{home}/")):
            section[key] = "~" + section[key].removeprefix(home)
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _without_tilde(path: str | None) -> str | None:
    return str(Path(path).expanduser()) if path and path.split("/")[0] == "~" else path


def reference() -> str:
    """Every key of a recipe with its default and meaning, as Markdown (docs/recipes.md is this text)."""
    sections: dict[str, type[BaseModel]] = {"": Recipe, "concepts": ConceptRecipe}
    for name, field in Recipe.model_fields.items():
        if isinstance(field.default, BaseModel):
            sections[name] = field.default.__class__
    lines = ["# Recipe reference", "", "Generated from the schema; every unknown key is an error.", ""]
    for name, section in sections.items():
        lines += [
            f"## {name or 'top level'}",
            "",
            (section.__doc__ or "").strip(),
            "",
            "| key | default | |",
            "|---|---|---|",
        ]
        for key, field in section.model_fields.items():
            if key in sections:
                continue
            default = (
                "required" if field.is_required() else yaml.safe_dump(field.default, default_flow_style=True).strip()
            )
            lines.append(f"| `{key}` | {default.removesuffix('...').strip()} | {field.description or ''} |")
        lines.append("")
    return "\n".join(lines)


def _explain(error: Any) -> tuple[str, str]:
    # Which alternative of a union it was tells a person nothing.
    alternatives = ("float", "int", "function-after", "literal[", "constrained-int")
    key = ".".join(str(part) for part in error["loc"] if not str(part).startswith(alternatives))
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        guess = _closest_key(error["loc"])
        message = "unknown key" + (f", did you mean {guess!r}" if guess else "")
    elif isinstance(error.get("input"), float) and not math.isfinite(error["input"]):
        message = f"{error['input']} is not a finite number"
    return key or "recipe", message[:1].lower() + message[1:]


def _closest_key(location: tuple[Any, ...]) -> str | None:
    sections = {name: field.annotation for name, field in Recipe.model_fields.items()}
    section = sections.get(str(location[0])) if len(location) > 1 else Recipe
    if location[0] == "concepts":
        section = ConceptRecipe
    fields = getattr(section, "model_fields", {})
    found = difflib.get_close_matches(str(location[-1]), list(fields), n=1)
    return found[0] if found else None
