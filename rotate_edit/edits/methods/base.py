"""What an edit method is: an object that declares what it reads, what it writes and in which unit its strength is.

A method is a class in one file of this package, or of anybody's, under the decorator `edit_method`. Its fields are its
settings. It implements `change` (one matrix at a time) or `build` (a whole concept at once), or both.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, ClassVar, TypeVar, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from rotate_edit.edits.directions import Direction
from rotate_edit.edits.edit import Clamp, MatrixChange
from rotate_edit.edits.material import Concept, Material
from rotate_edit.errors import BadInput
from rotate_edit.machine import Cost
from rotate_edit.models.cost import ModelSize
from rotate_edit.models.hooks import LayerActivations

NEEDS = {
    "channels": "vocabulary channels of the candidate neurons",
    "scores": "every neuron's LM-head z-score",
    "self_text": "text that the model writes itself",
    "activations": "what neurons do in that text",
    "text": "texts about the concept and texts without it",
}
# Colour, dash pattern and marker of a line, as `reporting.figures` draws it.
Style = tuple[str, Any, str]
OTHER_STYLE: Style = ("muted", (0, (4, 2, 1, 2)), "*")
# Rows (int64, ascending, without repeats) and the two factors of their change: left [n, r], right [r, d_model].
Factors = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Decimal:
    """A number that a search may vary, on a logarithmic scale if `log`."""

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True)
class Whole:
    """A whole number that a search may vary, on a logarithmic scale if `log`."""

    low: int
    high: int
    log: bool = False


@dataclass(frozen=True)
class Choice:
    """One of some values that a search may vary."""

    options: tuple[Any, ...]


Distribution = Decimal | Whole | Choice


@dataclass(frozen=True)
class Declaration:
    """What a method says of itself.

    Attributes:
        name: What recipes call it.
        title: What it does, in a few words.
        reference: Where it comes from, such as an arXiv number. Empty for our own.
        unit: What strength 1 means.
        reads: What it needs, of `NEEDS`. What its locator needs is added.
        writes: Kinds of matrices that it can change.
        locator: The name of the locator that chooses its neurons (see `channels.locators`).
        control: Whether it is drawn beside every edit unless a recipe says otherwise.
        live: Whether it works while the model runs only, so that no file can hold it.
        whole_concept: Whether it takes a concept as one, whatever groups its tokens fall into.
        whole_vectors: Whether it takes whole vectors away, so that a neuron of two groups must be changed once.
        last_layer_alone: Whether it changes nothing before the last layer's `out` matrix.
        keeps_words: Whether its direction leaves alone what a recipe keeps or protects.
        search_layers: How many of the last layers a search may end at. None for the upper half.
        search_beside: Methods that a search tries beside it, by name.
        removes_knowledge: Whether it is to take what the model knows, and not only words. It then edits every kind of
            matrix that it writes, and its strength is what a budget allows, unless a recipe says otherwise.
        style: How its line is drawn.
    """

    name: str
    title: str
    reference: str
    unit: str
    reads: frozenset[str]
    writes: frozenset[str]
    locator: str
    control: bool
    live: bool
    whole_concept: bool
    whole_vectors: bool
    last_layer_alone: bool
    keeps_words: bool
    search_layers: int | None
    search_beside: tuple[str, ...]
    removes_knowledge: bool
    style: Style


@dataclass(frozen=True)
class Target:
    """One matrix as an edit method sees it.

    Attributes:
        layer: Its layer.
        expert: Its expert. None in a dense layer.
        matrix: "gate", "in" or "out".
        layers: How many layers the model has.
        vectors: All its neurons, float32 [n, d_model].
        rows: The neurons that the method's locator chose, int64, ascending.
        direction: Of the group of tokens, as the settings want it.
        mean_direction: The unit mean direction of the whole concept.
        channels: By neuron the channels that located it, float32 [c, d_model]. Empty where none did.
        key: The coefficients of `rows`, float32 [n], for methods that read activations (see `edits.key_moments`).
        text: What texts about the concept and texts without it activate in this layer, for methods that read text.
        seed: For methods that choose at random.
    """

    layer: int
    expert: int | None
    matrix: str
    layers: int
    vectors: Tensor
    rows: Tensor
    direction: Direction
    mean_direction: Direction
    channels: Mapping[int, Tensor] = field(default_factory=dict)
    key: Tensor | None = None
    text: tuple[LayerActivations, LayerActivations] | None = None
    seed: int = 0


@dataclass(frozen=True)
class EditMethod:
    """An edit method with its settings.

    Attributes:
        about: What the method says of itself.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
    about: Declaration

    def change(self, target: Target) -> "Factors | Clamp | None":
        """The change of one matrix at strength 1. None leaves it alone.

        Args:
            target: The matrix.

        Returns:
            The rows and the two factors of `W[rows] += strength * left @ right`, or a clamp.
        """
        return None

    def build(self, material: Material, concept: Concept) -> Iterable[MatrixChange]:
        """Changes of a whole concept at strength 1, beside those of single matrices.

        Args:
            material: The model and all that is read off it.
            concept: The concept.
        """
        return ()

    def notes(self, material: Material, concept: Concept) -> tuple[str, ...]:
        """What a reader should know of what was built for a concept, one sentence each.

        Args:
            material: The model and all that is read off it.
            concept: The concept.
        """
        return ()

    def changes_matrices_of(self, concept: Concept) -> bool:
        """Whether `change` is asked for this concept."""
        return True

    def cost(self, size: ModelSize, self_text_tokens: int) -> Cost:
        """What building it takes for one concept, beside reading what it declares."""
        return Cost(start=0.0, memory=0)

    def search_space(self, size: ModelSize) -> dict[str, Distribution]:
        """The settings that a search may vary, by their names."""
        return {}

    def finest(self, size: ModelSize) -> "EditMethod":
        """The method with the settings whose work all trials of a search can share."""
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """Its settings by name."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "about"}


@dataclass(frozen=True)
class _Registered:
    about: Declaration
    kind: type[EditMethod]


_METHODS: dict[str, _Registered] = {}
Kind = TypeVar("Kind", bound=type[EditMethod])


def edit_method(
    name: str,
    *,
    title: str,
    unit: str,
    writes: Sequence[str],
    reads: Sequence[str] = (),
    locator: str = "all",
    reference: str = "",
    control: bool = False,
    live: bool = False,
    whole_concept: bool = False,
    whole_vectors: bool = False,
    last_layer_alone: bool = False,
    keeps_words: bool = True,
    search_layers: int | None = None,
    search_beside: Sequence[str] = (),
    removes_knowledge: bool = False,
    style: Style = OTHER_STYLE,
) -> Callable[[Kind], Kind]:
    """Register a class as an edit method. One class may be registered under several names with different locators.

    Args:
        name: What recipes call it.
        title: What it does, in a few words.
        unit: What strength 1 means.
        writes: Kinds of matrices that it can change.
        reads: What it needs, of `NEEDS`, beside what its locator needs.
        locator: The locator that chooses its neurons.
        reference: Where it comes from.
        control: Whether it is drawn beside every edit by default.
        live: Whether it works while the model runs only.
        whole_concept: Whether it takes a concept as one, whatever groups its tokens fall into.
        whole_vectors: Whether a neuron of two groups must be changed once.
        last_layer_alone: Whether it changes nothing before the last layer's `out` matrix.
        keeps_words: Whether it leaves alone what a recipe keeps or protects.
        search_layers: How many of the last layers a search may end at. None for the upper half.
        search_beside: Methods that a search tries beside it.
        removes_knowledge: Whether it is to take what the model knows, and not only words.
        style: Colour, dash pattern and marker of its line.

    Raises:
        ValueError: The declaration names a need that does not exist.
    """
    from rotate_edit.channels.locators import find_locator

    needs = frozenset(reads) | find_locator(locator).reads
    unknown = needs - NEEDS.keys()
    if unknown:
        raise ValueError(f"the method {name} reads {', '.join(sorted(unknown))}; there are {', '.join(NEEDS)}")

    def register(kind: Kind) -> Kind:
        about = Declaration(
            name, title, reference, unit, needs, frozenset(writes), locator, control, live, whole_concept,
            whole_vectors, last_layer_alone, keeps_words, search_layers, tuple(search_beside), removes_knowledge, style,
        )  # fmt: skip
        _METHODS[name] = _Registered(about, kind)
        _checker.cache_clear()
        return kind

    return register


def method_names(*, live: bool = True) -> tuple[str, ...]:
    """The names of all methods, in the order in which they were registered; without `live`, those that can be saved."""
    return tuple(name for name, found in _METHODS.items() if live or not found.about.live)


def default_controls() -> tuple[str, ...]:
    """The names of the methods that are drawn beside every edit by default."""
    return tuple(name for name, found in _METHODS.items() if found.about.control)


def declaration(name: str) -> Declaration:
    """What a method says of itself.

    Raises:
        BadInput: There is no method of that name.
    """
    return _registered(name).about


def style_of(name: str) -> Style:
    """How a method's line is drawn; that of unknown methods for a name that is not registered."""
    return _METHODS[name].about.style if name in _METHODS else OTHER_STYLE


def setting_names(name: str) -> tuple[str, ...]:
    """The names of a method's own settings."""
    return tuple(entry.name for entry in fields(_registered(name).kind) if entry.name != "about")


def described_settings(name: str) -> list[tuple[str, Any, str]]:
    """A method's own settings: name, default and meaning (the description of its `pydantic.Field`)."""
    kind = _registered(name).kind
    hints = get_type_hints(kind, include_extras=True)
    found = []
    for entry in fields(kind):
        if entry.name != "about":
            notes = [getattr(note, "description", None) for note in getattr(hints[entry.name], "__metadata__", ())]
            found.append((entry.name, entry.default, next((note for note in notes if note), "")))
    return found


def make_method(name: str, settings: Mapping[str, Any] | None = None) -> EditMethod:
    """A method with settings of its own; the defaults where none are given.

    Raises:
        BadInput: There is no such method, it has no such setting, or a value is not possible.
    """
    found = _registered(name)
    unknown = [key for key in settings or {} if key not in setting_names(name)]
    if unknown:
        known = ", ".join(setting_names(name)) or "none"
        raise BadInput(f"the method {name} has no setting {unknown[0]!r}; its settings are: {known}.")
    try:
        made: EditMethod = _checker(name).validate_python({"about": found.about, **(settings or {})})
    except ValidationError as error:
        first = error.errors()[0]
        raise BadInput(f"the setting {'.'.join(map(str, first['loc']))} of {name}: {first['msg'].lower()}.") from error
    return made


@cache
def _checker(name: str) -> TypeAdapter[EditMethod]:
    """What checks a method's settings. Making it takes longer than checking, and methods are made again and again."""
    return TypeAdapter(_registered(name).kind)


def make_control(name: str, settings: Mapping[str, Any]) -> EditMethod:
    """A method with those of another one's settings that it has too."""
    known = setting_names(name)
    return make_method(name, {key: value for key, value in settings.items() if key in known})


def _registered(name: str) -> _Registered:
    if name not in _METHODS:
        raise BadInput(f"unknown method {name!r}; choose one of {', '.join(_METHODS)}.")
    return _METHODS[name]
