"""What edit methods are given: a model, its concepts, and everything that is read off them, each read once.

A method declares what it reads, and asks the material for it. Nothing is loaded or computed before it is asked for.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from rotate_edit.channels.locate import ConceptGroup, Site
from rotate_edit.edits import directions
from rotate_edit.edits.directions import Direction
from rotate_edit.edits.key_moments import KeyMoments, even_reading, key_moments, last_moments
from rotate_edit.errors import BadInput
from rotate_edit.models.batches import Passages, first_texts
from rotate_edit.models.checkpoint import Checkpoint, read_embedding, read_norm, read_unembedding
from rotate_edit.models.gradients import MatrixName, likelihood_gradients
from rotate_edit.models.hooks import InputMoments, LayerActivations, mlp_inputs, record
from rotate_edit.models.output_head import (
    OutputHead,
    Positions,
    Predicted,
    chances,
    output_head_of,
    positions,
    predicted,
)
from rotate_edit.models.self_text import self_text

Value = TypeVar("Value")
# "least-divergence" costs a direction by what it does to the model's own predictions, so it reads self-generated text.
DIRECTIONS = ("least-collateral", "least-divergence", "mean")
# How many tokens of text about a concept its gradient is read from.
GRADIENT_TOKENS = 4096


@dataclass(frozen=True)
class BuildSettings:
    """What holds for every edit method of a job.

    Attributes:
        direction: The concept's direction, of `DIRECTIONS`.
        ridge: Of the least-collateral direction, as a multiple of the median eigenvalue.
        fold_norm: Whether the gain of the norm before the vocabulary is folded into the direction.
        least_score: |LM-head z-score| from which on a neuron counts as located by it.
        self_text_tokens: How many tokens of self-generated text are read.
        layer_strengths: What a change is multiplied by in single layers. 1 in all others.
        seed: Of everything random.
    """

    direction: str = "least-collateral"
    ridge: float = 0.3
    fold_norm: bool = True
    least_score: float = 1.0
    self_text_tokens: int = 48000
    layer_strengths: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True)
class Concept:
    """One concept of a job.

    Attributes:
        groups: Its tokens in one or more groups, each with what was located.
        kept: Token sets whose mean logit its edit must not move, int64 each.
        remaining: The share of its probability mass that a fitted edit aims to leave.
        amplified: Whether the edit is to amplify it.
    """

    groups: tuple[ConceptGroup, ...]
    kept: tuple[Tensor, ...] = ()
    remaining: float = 0.1
    amplified: bool = False

    @property
    def name(self) -> str:
        """Its name."""
        return self.groups[0].name

    @property
    def ids(self) -> Tensor:
        """All its tokens, int64 [n]."""
        return self.groups[0].tokens.ids

    @property
    def identity(self) -> Hashable:
        """What tells it from other concepts: its name, its tokens by group, and what it keeps."""
        groups = tuple(tuple(group.ids.tolist()) for group in self.groups)
        return self.name, groups, tuple(tuple(ids.tolist()) for ids in self.kept)


@dataclass(frozen=True)
class Material:
    """A job's model and concepts, and what is read off them.

    Attributes:
        checkpoint: The base.
        tokenizer: Its tokenizer.
        untrained: Tokens that no training text held, bool [V].
        sites: The neuron matrices that may be edited, in order.
        concepts: The concepts of the job.
        settings: What holds for every method.
        load: Loads the live base model.
        texts: Texts with a concept of that name, and texts without it, for methods that read the user's text.
        kept: What was computed so far, by its key.
    """

    checkpoint: Checkpoint
    tokenizer: Any
    untrained: Tensor
    sites: tuple[Site, ...]
    concepts: tuple[Concept, ...]
    settings: BuildSettings
    load: Callable[[], Any]
    texts: Callable[[str], tuple[Passages, Passages]]
    kept: dict[Hashable, Any] = field(default_factory=dict)

    def once(self, key: Hashable, compute: Callable[[], Value]) -> Value:
        """A value that is computed when it is first asked for and kept for the job.

        Args:
            key: Tells it from other values: everything that it depends on.
            compute: Computes it.
        """
        if key not in self.kept:
            self.kept[key] = compute()
        value: Value = self.kept[key]
        return value

    @cached_property
    def model(self) -> Any:
        """The live base model."""
        return self.load()

    @property
    def self_text(self) -> Passages:
        """Text that the model writes itself from nothing."""
        tokens, seed = self.settings.self_text_tokens, self.settings.seed
        return self.once(
            ("self-generated text", tokens, seed),
            lambda: self_text(self.model, self.tokenizer, tokens=tokens, seed=seed),
        )

    @property
    def output_head(self) -> OutputHead:
        """What follows the last MLP."""
        return self.once("output head", lambda: output_head_of(self.model))

    @property
    def positions(self) -> Positions:
        """What the last layer holds at every position of the self-generated text."""
        key = ("positions", self.settings.self_text_tokens, self.settings.seed)
        return self.once(key, lambda: positions(self.model, self.self_text))

    @property
    def predicted(self) -> Predicted:
        """What the model predicts at these positions."""
        key = ("predicted", self.settings.self_text_tokens, self.settings.seed)
        return self.once(key, lambda: predicted(self.positions, self.output_head))

    @property
    def even_reading(self) -> Tensor:
        """What raises a token's logit by 1 at every position alike when it is added to its row, float32 [d_model]."""
        key = ("even reading", self.settings.self_text_tokens, self.settings.seed)
        return self.once(key, lambda: even_reading(self.model, self.self_text))

    @cached_property
    def gain(self) -> Tensor:
        """The gain of the final norm where it is folded in, ones elsewhere: float32 [d_model]."""
        norm = read_norm(self.checkpoint, "final") if self.settings.fold_norm else None
        return torch.ones(self.checkpoint.hidden_size) if norm is None else norm

    @cached_property
    def last_written(self) -> Site | None:
        """The last of the `out` matrices that may be edited."""
        return next((site for site in reversed(self.sites) if site.matrix == "out"), None)

    def moments(self, rows: Mapping[int, Tensor]) -> KeyMoments:
        """Moments of neurons' activations over the self-generated text.

        Args:
            rows: By layer the neurons wanted, int64, ascending. What was read before is used again when it holds them.
        """
        head = self.settings.direction == "least-divergence"
        key = self._moments_key(head)
        known: KeyMoments | None = self.kept.get(key)
        if known is None or not _holds(known.rows, rows):
            ids = [group.ids for concept in self.concepts for group in concept.groups]
            table = read_unembedding(self.checkpoint) if head else None
            # With the rows of before, so that methods that take turns do not read the text again and again.
            every = joined_rows([known.rows, rows] if known else [rows])
            self.kept[key] = known = self._moments(every, ids, table)
        return known

    def _moments(self, rows: Mapping[int, Tensor], groups: Sequence[Tensor], table: Tensor | None) -> KeyMoments:
        seen, tail, last = self.positions, self.output_head, self.checkpoint.layers - 1
        chance = torch.stack([chances(seen, tail, self.predicted, ids).sum(1) for ids in groups])
        if set(rows) == {last} and len(rows[last]) == seen.neurons.shape[1]:
            return last_moments(seen, tail, last, groups, table, chance=chance)
        return key_moments(self.model, self.self_text, rows, groups, table, chance=chance)

    def group_place(self, concept: Concept, group: ConceptGroup) -> int:
        """Which of the groups of all concepts this is, as `moments` counts them."""
        before = self.concepts[: [other.name for other in self.concepts].index(concept.name)]
        return sum(len(other.groups) for other in before) + group.number

    def activations(self, concept: Concept) -> dict[int, tuple[LayerActivations, LayerActivations]]:
        """By layer what texts about a concept and texts without it activate.

        The concept's positions are those before one of its tokens.

        Raises:
            BadInput: The texts hold none of the concept's tokens, or the model is a mixture of experts.
        """

        def read() -> dict[int, tuple[LayerActivations, LayerActivations]]:
            layers = sorted({site.layer for site in self.sites})
            about, free = self.texts(concept.name)
            own = record(self.model, about, layers, concept.ids)
            rest = record(self.model, free, layers, None)
            if not len(own[layers[0]].neurons):
                raise BadInput(
                    "the texts hold none of the concept's tokens, so its activations cannot be read; give others."
                )
            return {layer: (own[layer], rest[layer]) for layer in layers}

        return self.once(("activations", concept.name, self.sites), read)

    def gradients(self, concept: Concept, *, skip_words: bool) -> dict[Site, Tensor]:
        """By matrix the gradient of the mean log-probability of texts about a concept, float32 [n, d_model].

        Args:
            concept: The concept.
            skip_words: Whether the probability of the concept's own tokens does not count.

        Raises:
            BadInput: There are no such texts, or they hold nothing that counts.
        """

        def read() -> dict[Site, Tensor]:
            about, _ = self.texts(concept.name)
            about = first_texts(about, GRADIENT_TOKENS, self.checkpoint.vocabulary_size)
            names: dict[MatrixName, Site] = {
                (site.matrix, site.layer, site.expert_or_none): site for site in self.sites
            }
            found = likelihood_gradients(self.model, about, names, skip=concept.ids if skip_words else None)
            return {names[name]: gradient for name, gradient in found.items()}

        return self.once(("gradients", concept.identity, self.sites, skip_words), read)

    def mlp_inputs(self, concept: Concept, layers: Sequence[int]) -> dict[int, tuple[InputMoments, InputMoments]]:
        """By layer what the MLP reads in texts about a concept and in texts without it.

        Raises:
            BadInput: There are no such texts, or the model is a mixture of experts.
        """

        def read() -> dict[int, tuple[InputMoments, InputMoments]]:
            own, rest = (mlp_inputs(self.model, texts, layers) for texts in self.texts(concept.name))
            return {layer: (own[layer], rest[layer]) for layer in layers}

        return self.once(("MLP inputs", concept.name, tuple(layers)), read)

    def direction(self, concept: Concept, group: ConceptGroup, site: Site) -> Direction:
        """The direction of a group of tokens as the settings want it, for one matrix.

        The write side (`out`) looks at the unembedding through the final norm. The read side (`gate`, `in`) looks at
        the embedding through the norm before the block's MLP. It leaves alone what the concept keeps.

        Raises:
            BadInput: What is kept spans the direction, so that nothing can be removed.
        """
        return self._directions(concept, group, site)[0]

    def mean_direction(self, concept: Concept, site: Site) -> Direction:
        """The unit mean direction of a whole concept, for one matrix."""
        return self._directions(concept, concept.groups[0], site)[1]

    def _directions(self, concept: Concept, group: ConceptGroup, site: Site) -> tuple[Direction, Direction]:
        settings, writes = self.settings, site.matrix == "out"
        where = "out" if writes else site.layer
        key = ("direction", concept.identity, group.number, where, repr(settings))
        return self.once(key, lambda: self._formed(concept, group, site, writes))

    def _formed(self, concept: Concept, group: ConceptGroup, site: Site, writes: bool) -> tuple[Direction, Direction]:
        settings = self.settings
        mean, whole, covariance, keep = self.once(
            ("table", concept.identity, group.number, writes), lambda: self._table(concept, group, writes)
        )
        norm = read_norm(self.checkpoint, "final" if writes else ("mlp", site.layer)) if settings.fold_norm else None
        gain = torch.ones_like(mean) if norm is None else norm
        of_concept = directions.mean_direction(gain * whole)
        wanted = directions.mean_direction(gain * mean)
        rows = torch.stack([gain * row for row in keep]) if keep else None
        try:
            if settings.direction != "mean":
                metric = self._metric() if settings.direction == "least-divergence" and writes else None
                cost = metric if metric is not None else covariance
                wanted = directions.least_collateral_direction(
                    gain * mean, gain[:, None] * cost * gain, ridge=settings.ridge, keep=rows
                )
            elif rows is not None:
                wanted = directions.keeping(wanted, rows)
        except ValueError as error:
            raise BadInput(
                f"concepts.{concept.name}: {error}; leave some words out of its keep and neighbour_words, "
                "out of protect, or out of the concepts beside it."
            ) from error
        return wanted, of_concept

    def _metric(self) -> Tensor | None:
        last = self.last_written
        rows = {} if last is None else {last.layer: torch.arange(self.checkpoint.neurons_in(last.layer))}
        known: KeyMoments | None = self.kept.get(self._moments_key(head=True))
        return (known or self.moments(rows)).metric

    def _moments_key(self, head: bool) -> Hashable:
        groups = tuple(_told(group) for concept in self.concepts for group in concept.groups)
        return ("moments", self.settings.self_text_tokens, self.settings.seed, head, groups)

    def _table(
        self, concept: Concept, group: ConceptGroup, writes: bool
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """The group's mean, the concept's mean, the covariance and the means to keep, before a norm's gain."""
        projection = read_unembedding(self.checkpoint) if writes else read_embedding(self.checkpoint)
        trained = ~self.untrained
        return (
            directions.concept_mean(projection, group.ids, trained),
            directions.concept_mean(projection, concept.ids, trained),
            directions.token_covariance(projection[trained]),
            [directions.concept_mean(projection, ids, trained) for ids in concept.kept],
        )


def _told(group: ConceptGroup) -> Hashable:
    """What tells a group of tokens from others."""
    return group.name, tuple(group.ids.tolist())


def _holds(known: Mapping[int, Tensor], wanted: Mapping[int, Tensor]) -> bool:
    return all(
        layer in known and bool(torch.isin(rows, known[layer]).all()) for layer, rows in wanted.items() if len(rows)
    )


def joined_rows(parts: Sequence[Mapping[int, Tensor]]) -> dict[int, Tensor]:
    """By layer all neurons that any of the parts names, int64, ascending."""
    every: dict[int, list[Tensor]] = {}
    for layers in parts:
        for layer, rows in layers.items():
            every.setdefault(layer, []).append(rows)
    return {layer: torch.cat(rows).unique() for layer, rows in every.items()}
