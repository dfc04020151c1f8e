"""The recipe: one YAML file that says what is edited, how, and how it is measured.

Every setting stands here with its default and a sentence. A recipe is data: nothing in it is ever executed. All
errors of a recipe are reported together.
"""

import difflib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from rotate_edit.edits.strength import Goal
from rotate_edit.errors import BadInput, quoted
from rotate_edit.files import data_folder, read_yaml

Matrix = Literal["gate", "in", "out"]
Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
GOALS = ("remaining", "budget", "odds", "strength")
DEFAULT_REMAINING = 0.1
DEFAULT_BUDGET = 0.02
# What settings and methods of earlier versions are called now.
RENAMED = {
    "edit.target": "concepts.remaining",
    "edit.key_tokens": "edit.self_text",
    "edit.key_ridge": "edit.settings.key_ridge",
    "edit.fit_rank": "edit.settings.rank",
    "edit.fit_leash": "edit.settings.proximal_weight",
    "edit.fit_rounds": "edit.settings.rounds",
    "decompose.level_rarity": "decompose.remove_frequency",
    "select.support": "select.fdr",
}
RENAMED_METHODS = {
    "fitted": "silence-words",
    "keyed": "rank-one",
    "channel-keyed": "rank-one-channels",
    "lm-head-keyed": "rank-one-lm-head",
    "random-keyed": "rank-one-random",
}


class _Section(BaseModel):
    """Unknown keys are errors, and a recipe does not change after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ConceptRecipe(_Section):
    """One concept: its words and what is done to it."""

    name: str = Field(min_length=1, max_length=80, pattern=r"^[\w][\w .-]*$", description="A short name.")
    words: list[str] = Field(min_length=1, description="The words of the concept.")
    plurals: bool = Field(False, description="Also follow the plural of every word.")
    remaining: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="The smallest strength that leaves this share of the concept's probability mass. 0.1 for methods "
        "that silence words, when none of `remaining`, `budget`, `odds` and `strength` is given.",
    )
    budget: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None,
        description="The largest strength with at most so many nats of KL divergence on texts without the concept. "
        "0.02 for methods that remove knowledge, when no other goal is given.",
    )
    odds: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = Field(
        None, description="Amplify: make the concept's odds so many times as large on texts without it."
    )
    strength: Finite | None = Field(
        None,
        description="The strength itself, in the method's unit: 1 removes a projection, more pushes against it, below "
        "0 amplifies.",
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
    def goal(self) -> Goal:
        """What the strength of the concept's edit is chosen by."""
        for kind in GOALS:
            value = getattr(self, kind)
            if value is not None:
                return Goal(kind, value)
        return Goal("remaining", DEFAULT_REMAINING)

    @field_validator("words", "neighbour_words", "keep")
    @classmethod
    def _no_empty_word(cls, words: list[str]) -> list[str]:
        if any(not word.strip() for word in words):
            raise ValueError("a word is empty")
        return [word.strip() for word in words]

    @field_validator("strength", mode="before")
    @classmethod
    def _strength_does_something(cls, strength: Any) -> Any:
        if strength == "auto":
            raise ValueError("auto is written as `remaining: 0.1` now, which is also the default")
        if strength == 0:
            raise ValueError("0 changes nothing; use a positive number to suppress or a negative one to amplify")
        return strength

    @model_validator(mode="after")
    def _one_goal(self) -> "ConceptRecipe":
        given = [kind for kind in GOALS if getattr(self, kind) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given, and each of them decides the strength; leave one")
        return self


class ChannelRecipe(_Section):
    """One chosen channel, or the channels that say some words, and how far they are turned."""

    channel: str | None = Field(None, description="A channel by its name, such as `L9.N12.gate#0`.")
    tokens: list[str] = Field(
        [],
        description="In place of a name: words that the channels' strongest tokens are. They are searched for. Beside "
        "a name whose number is 1000 or more: the words by whose search that channel was found.",
    )
    matrix: Matrix = Field("out", description="Where channels of `tokens` are looked for.")
    layers: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] | None = Field(
        None, description="The first and the last layer where they are looked for; all when left out."
    )
    strength: Finite = Field(
        1.0, description="1 takes the channel out of its neuron, more turns it round, -1 doubles it."
    )

    @property
    def name(self) -> str:
        """What it is called: the channel's name, or `token:` and the words."""
        return self.channel if self.channel is not None else f"token:{','.join(self.tokens)}"

    def _was_searched(self) -> bool:
        from rotate_edit.channels.channel_set import ASKED, parse_channel

        return self.channel is not None and parse_channel(self.channel)[2] >= ASKED

    @field_validator("channel")
    @classmethod
    def _possible(cls, channel: str | None) -> str | None:
        from rotate_edit.channels.channel_set import parse_channel

        if channel is not None:
            try:
                parse_channel(channel)
            except BadInput as error:
                raise ValueError(str(error).rstrip(".")) from error
            return channel.strip()
        return None

    @model_validator(mode="after")
    def _one_way(self) -> "ChannelRecipe":
        if self.channel is None and not self.tokens:
            raise ValueError("give `channel` or `tokens`")
        if self.channel is not None and self.tokens and not self._was_searched():
            raise ValueError("give `channel` or `tokens`, and not both")
        if self.strength == 0:
            raise ValueError(
                "strength 0 changes nothing; use a positive number to suppress or a negative one to amplify"
            )
        if self.layers is not None and self.layers[0] > self.layers[1]:
            raise ValueError("layers names the first and the last layer, and the first is above the last")
        return self


class LocateRecipe(_Section):
    """Which neurons are looked at."""

    matrices: Annotated[list[Matrix], Field(min_length=1)] | None = Field(
        None,
        description="out: what neurons write; gate, in: what they read. When left out: out, or all that the model has "
        "for methods that remove knowledge.",
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
        "keeps one group; auto does too, unless the method is located and groups halve the damage on validation texts.",
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
    remove_frequency: bool = Field(
        True, description="Take out the token-frequency direction, on which rare tokens differ from the rest."
    )
    tilted_start: bool = Field(
        True,
        description="Search each candidate from the concept's own direction (is this concept in it?), and decompose "
        "those that have it. Without, every candidate is decomposed.",
    )
    claim_threshold: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None,
        description="z-score above which a channel's tokens are masked in later searches of the neuron; the family's "
        "value when left out.",
    )
    unsupported_limit: Positive = Field(3, description="Stop a neuron after this many unsupported channels in a row.")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="Where the solver runs.")


class SelectRecipe(_Section):
    """Which neurons carry the concept."""

    top: Positive = Field(10, description="How many of a channel's strongest tokens are looked at.")
    share: Fraction = Field(0.5, description="At least this fraction of them must be words of the concept.")
    fdr: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = Field(
        0.05,
        description="The share of false ones, in the mean, among the neurons whose channels count as the concept's: "
        "support is compared with neurons drawn at random.",
    )
    lm_head_z: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        1.0, description="|mean z| above which the control `lm-head-located` takes a neuron."
    )


class EditRecipe(_Section):
    """How the located neurons are rewritten."""

    method: str = Field(
        "auto",
        description="An edit method by its name ([methods](methods.md)). auto takes `remove-concept` where knowledge "
        "is removed, `silence-words` where words are; then `rank-one` beside `embeddings` or where `locate.layers` "
        "names layers, and `channel-located` where no `out` matrix is looked at; `token-logits` where every concept is "
        "amplified.",
    )
    settings: dict[str, Any] = Field(
        {}, description="The method's own settings. Controls take those that they have too."
    )
    direction: Literal["least-collateral", "least-divergence", "mean"] = Field(
        "least-collateral",
        description="The concept's direction: its mean, chosen to move other logits least, or chosen to change the "
        "model's own predictions least (KL divergence on self-generated text).",
    )
    ridge: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        0.3, description="Ridge of the least-collateral direction, as a multiple of the median eigenvalue."
    )
    fold_norm: bool = Field(True, description="Fold the gain of the norm before the vocabulary into the direction.")
    self_text: Annotated[int, Field(ge=100)] = Field(
        48000, description="How many tokens of text the model writes itself, for methods that read it."
    )
    embeddings: bool = Field(
        False,
        description="Also take three quarters of the concept out of its own embedding rows and output head rows (the "
        "control `token-embeddings` shows what these rows do alone). A concept that is amplified keeps its rows.",
    )
    layer_strengths: dict[Annotated[int, Field(ge=0)], Finite] = Field(
        {}, description="What the strength is multiplied by in single layers, such as `{0: 0, 3: 1.5}`; 1 elsewhere."
    )

    @field_validator("method")
    @classmethod
    def _known_method(cls, method: str) -> str:
        from rotate_edit.edits.methods import declaration

        if method == "auto":
            return method
        _check_methods([method])
        if declaration(method).live:
            raise ValueError(
                f"{method} works while the model runs and cannot be written; name it under evaluate.controls"
            )
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
    written_texts: Annotated[int, Field(ge=0)] = Field(
        40,
        description="Where neither `items` nor `text` is given, the model writes so many texts about each concept "
        "itself, and as many about other things. 0 writes none, so that nothing is measured.",
    )
    limit: Positive | None = Field(None, description="At most this many items of each task.")
    tokens: Positive = Field(4000, description="At most this many tokens of text for each point of a curve.")
    controls: list[str] | Literal["all"] | None = Field(
        None,
        description="The edit methods drawn beside the chosen one, or `all`. Three when left out: one that edits every "
        "neuron, one located by the LM head, and random neurons.",
    )
    strengths: list[Finite] = Field(
        [1.0, 2.0, 4.0, 8.0, 16.0],
        min_length=2,
        description="The strengths of a suppression curve, which ends at the first that leaves a tenth of the concept.",
    )
    batch_size: Positive = Field(64, description="Sequences scored at once.")

    @field_validator("items", "text")
    @classmethod
    def _home(cls, path: str | None) -> str | None:
        return _without_tilde(path)

    @field_validator("controls")
    @classmethod
    def _known_controls(cls, controls: list[str] | str | None) -> list[str] | str | None:
        _check_methods(() if isinstance(controls, str) else controls or ())
        return controls


def _check_methods(names: Iterable[str]) -> None:
    """Raises ValueError for a name that no method has."""
    from rotate_edit.edits.methods import method_names

    for name in names:
        if name in RENAMED_METHODS:
            raise ValueError(f"the method {name} is called {RENAMED_METHODS[name]} now")
        if name not in method_names():
            raise ValueError(f"unknown method {name!r}; choose one of {', '.join(method_names())}")


class Recipe(_Section):
    """A whole run."""

    model: str = Field(min_length=1, description="`demo`, a folder, a Hub id, or a GGUF file (`.gguf`).")
    revision: str | None = Field(None, description="The Hub revision.")
    concepts: list[ConceptRecipe] = Field([], description="The concepts to edit.")
    channels: list[ChannelRecipe] = Field([], description="Chosen channels to turn, beside the concepts or alone.")
    channel_set: str | None = Field(
        None,
        description="A channel set, an atlas or a run folder that `channels` are taken from. Without, they are "
        "decomposed on the spot.",
    )
    remove: Literal["knowledge", "words"] | None = Field(
        None,
        description="What `edit.method: auto` removes of a concept: what the model knows of it, or its words alone. "
        "When left out: words where a concept gives `remaining` or `strength` or something is kept or protected, "
        "knowledge elsewhere.",
    )
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

    @field_validator("model", "channel_set")
    @classmethod
    def _home(cls, path: str | None) -> str | None:
        return _without_tilde(path)

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        names = [concept.name for concept in self.concepts]
        if not names and not self.channels:
            raise ValueError("there is nothing to edit; give `concepts`, `channels` or both")
        if len(set(names)) != len(names):
            raise ValueError("two concepts have the same name")
        chosen = [entry.name for entry in self.channels]
        if len({*names, *chosen}) != len(names) + len(chosen):
            raise ValueError("two of the channels are the same; name each of them once")
        for problem in (self._method_problem(), self._goal_problem()):
            if problem:
                raise ValueError(problem)
        return self

    def _method_problem(self) -> str | None:
        """Why the edit method cannot do what the rest of the recipe asks."""
        from rotate_edit.edits.methods import declaration, make_method

        about = declaration(self.method)
        if not about.keeps_words and (self.protect or any(concept.keep for concept in self.concepts)):
            return f"the method {about.name} takes one direction as it is and can keep or protect nothing"
        kinds = about.writes & {"gate", "in", "out"}
        if kinds and self.locate.matrices is not None and not kinds & set(self.locate.matrices):
            return (
                f"edit.method: {about.name} rewrites {' and '.join(sorted(kinds))} matrices only; add "
                f"{sorted(kinds)[0]} to locate.matrices, or set edit.method to channel-located"
            )
        if self.edit.direction == "least-divergence" and "activations" not in about.reads:
            return (
                "edit.direction: least-divergence is fitted on activations that only some methods read, and the method "
                f"here is {about.name}; take least-collateral, or set edit.method to rank-one"
            )
        try:
            make_method(about.name, self.edit.settings)
        except BadInput as error:
            return f"edit.settings: {str(error).rstrip('.')}"
        return None

    def _goal_problem(self) -> str | None:
        """Why no strength can be found."""
        goals = [concept.goal for concept in self.concepts]
        if self.edit.embeddings and goals and all(goal.amplifies for goal in goals):
            return (
                "edit.embeddings takes a concept out of its tokens' rows, and every concept here is amplified; leave "
                "it out, or suppress a concept"
            )
        solved = [goal.kind for goal in goals if goal.kind != "strength"]
        if solved and not (self.evaluate.items or self.evaluate.text or self.evaluate.written_texts):
            return (
                f"{solved[0]} needs evaluate.items, evaluate.text or evaluate.written_texts to measure the concept on; "
                "or give a strength"
            )
        return None

    @property
    def removed(self) -> str:
        """What is removed where the recipe names no method: "knowledge" or "words"."""
        from rotate_edit.edits.methods.defaults import KNOWLEDGE, WORDS

        if self.remove is not None:
            return self.remove
        told = any(concept.remaining or concept.strength for concept in self.concepts)
        keeps = bool(self.protect) or any(concept.keep for concept in self.concepts)
        return WORDS if told or keeps else KNOWLEDGE

    @property
    def method(self) -> str:
        """The name of the edit method, with `auto` settled."""
        from rotate_edit.edits.methods.defaults import default_method

        if self.edit.method != "auto":
            return self.edit.method
        return default_method(
            self.locate.matrices or (),
            remove=self.removed,
            layers_named=self.locate.layers is not None,
            embeddings=self.edit.embeddings,
            amplified=[concept.goal.amplifies for concept in self.concepts],
        )


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe file.

    A bare name is also looked for among the recipes that come with the package.

    Args:
        path: The file or the bare name.

    Returns:
        The recipe.

    Raises:
        BadInput: With every error of the recipe at once.
    """
    found = find_recipe(path)
    try:
        content = read_yaml(found.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"recipe {found.name} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise BadInput(f"recipe {found.name} must be a mapping of settings such as `model:` and `concepts:`.")
    return parse_recipe(content, found.name)


def find_recipe(path: str | Path) -> Path:
    """Find the file that a recipe argument means.

    Args:
        path: A path, or the file name of a bundled recipe.

    Returns:
        The path itself where it is a file. Otherwise the bundled recipe of that file name.

    Raises:
        BadInput: When there is neither.
    """
    if Path(path).is_file():
        return Path(path)
    bundled = data_folder("recipes") / Path(path).name
    if bundled.is_file() and Path(path).parent in (Path("."), Path("recipes")):
        return bundled
    raise BadInput(f"there is no recipe at {path}; the bundled ones are {', '.join(bundled_recipes())}.")


def bundled_recipes() -> list[str]:
    """List the recipes that come with the package.

    Returns:
        Their file names, sorted.
    """
    return sorted(path.name for path in data_folder("recipes").glob("*.yaml"))


def parse_recipe(content: dict[str, Any], name: str = "recipe") -> Recipe:
    """Check a recipe's content.

    Args:
        content: The settings by key.
        name: The recipe's name, for messages.

    Returns:
        The recipe, with what `auto` and the left-out controls stand for.

    Raises:
        BadInput: When there are errors. It lists every error with its key.
    """
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
    """The recipe with what `auto`, the left-out goals and the left-out controls stand for."""
    from rotate_edit.edits.methods import declaration, default_controls, method_names

    edit = recipe.edit.model_copy(update={"method": recipe.method})
    controls = recipe.evaluate.controls
    about = declaration(recipe.method)
    if controls is None or controls == "all":
        names = default_controls() if controls is None else method_names()
        # An edit that reads no channels does not have them searched for a control's sake.
        spared = about.removes_knowledge and controls is None
        wanted = [name for name in names if not (spared and "channels" in declaration(name).reads)]
        controls = [name for name in wanted if name != recipe.method]
    evaluation = recipe.evaluate.model_copy(update={"controls": controls})
    goal = {"budget": DEFAULT_BUDGET} if about.removes_knowledge else {}
    concepts = [
        concept.model_copy(update=goal) if all(getattr(concept, kind) is None for kind in GOALS) else concept
        for concept in recipe.concepts
    ]
    return recipe.model_copy(update={"edit": edit, "evaluate": evaluation, "concepts": concepts})


def recipe_text(recipe: Recipe) -> str:
    """Write a recipe as YAML with every default filled in.

    The home folder is written as `~`, since it would tell a user's name.

    Args:
        recipe: The recipe.

    Returns:
        The YAML.
    """
    content = recipe.model_dump(mode="json", by_alias=True)
    paths = (
        (content, "model"),
        (content, "channel_set"),
        (content["evaluate"], "items"),
        (content["evaluate"], "text"),
    )
    for section, key in paths:
        home = str(Path.home())
        if section[key] and (section[key] == home or section[key].startswith(f"{home}/")):
            section[key] = "~" + section[key].removeprefix(home)
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _without_tilde(path: str | None) -> str | None:
    return str(Path(path).expanduser()) if path and path.split("/")[0] == "~" else path


def reference() -> str:
    """Describe every key of a recipe with its default and meaning.

    Returns:
        Markdown. docs/recipes.md is this text.
    """
    sections: dict[str, type[BaseModel]] = {"": Recipe, "concepts": ConceptRecipe, "channels": ChannelRecipe}
    for name, field in Recipe.model_fields.items():
        if isinstance(field.default, BaseModel):
            sections[name] = field.default.__class__
    lines = ["# Recipe reference", "", "Generated from the schema; every unknown key is an error.", ""]
    for name, section in sections.items():
        rows = [
            (key, "required" if field.is_required() else field.default, field.description or "")
            for key, field in section.model_fields.items()
            if key not in sections
        ]
        lines += _reference_table(name or "top level", (section.__doc__ or "").strip(), rows)
    from rotate_edit.edits.methods import method_names
    from rotate_edit.edits.methods.base import described_settings

    for name in sorted(method_names()):
        settings = described_settings(name)
        if settings:
            lines += _reference_table(f"edit.settings of {name}", "", settings)
    return "\n".join(lines)


def _reference_table(title: str, text: str, rows: Iterable[tuple[str, Any, str]]) -> list[str]:
    """A heading, a sentence and a table of keys with defaults and meanings."""
    lines = [f"## {title}", "", *([text, ""] if text else []), "| key | default | |", "|---|---|---|"]
    for key, default, meaning in rows:
        shown = default if default == "required" else yaml.safe_dump(default, default_flow_style=True).strip()
        lines.append(f"| `{key}` | {shown.removesuffix('...').strip()} | {meaning} |")
    return [*lines, ""]


def _explain(error: Any) -> tuple[str, str]:
    # Which alternative of a union it was tells a person nothing.
    alternatives = ("float", "int", "function-after", "literal[", "constrained-int")
    named = [str(part) for part in error["loc"] if not str(part).startswith(alternatives)]
    # A key may be anybody's text, and the message is one line.
    key = ".".join(quoted(part)[1:-1] for part in named)
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        guess = _closest_key(error["loc"])
        message = "unknown key" + (f", did you mean {guess!r}" if guess else "")
        if key in RENAMED:
            message = f"it is called {RENAMED[key]} now"
    elif isinstance(error.get("input"), float) and not math.isfinite(error["input"]):
        message = f"{error['input']} is not a finite number"
    return key or "recipe", message[:1].lower() + message[1:]


def _closest_key(location: tuple[Any, ...]) -> str | None:
    sections = {name: field.annotation for name, field in Recipe.model_fields.items()}
    section = sections.get(str(location[0])) if len(location) > 1 else Recipe
    if location[0] in ("concepts", "channels"):
        section = ConceptRecipe if location[0] == "concepts" else ChannelRecipe
    fields = getattr(section, "model_fields", {})
    found = difflib.get_close_matches(str(location[-1]), list(fields), n=1)
    return found[0] if found else None
