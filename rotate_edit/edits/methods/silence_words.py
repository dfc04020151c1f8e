"""The default: a KL-optimised low-rank change of the last layer's `out` matrix that silences a concept's words."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from rotate_edit.edits.directions import concept_mean
from rotate_edit.edits.edit import MatrixChange
from rotate_edit.edits.key_moments import fit_keys
from rotate_edit.edits.low_rank import (
    DRAWN,
    DRAWN_LATER,
    STEPS,
    FitAim,
    LowRankFit,
    fit_change,
    related_tokens,
    whitened,
)
from rotate_edit.edits.material import Concept, Material
from rotate_edit.edits.methods.base import Distribution, EditMethod, Whole, edit_method
from rotate_edit.edits.methods.token_rows import logit_change
from rotate_edit.errors import BadInput
from rotate_edit.machine import Cost
from rotate_edit.models.checkpoint import read_unembedding
from rotate_edit.models.cost import ModelSize
from rotate_edit.models.output_head import AT_ONCE

# Rounds of steps of a search's fit, and its rank over the recipe's. A trial takes as much of both as it says.
SEARCHED_ROUNDS, SEARCHED_RANKS = 3, 4
# Seconds of a fit's steps over the seconds of their products alone: 2.0 measured on one thread. The steps also take
# logarithms of what they predict. Operations of an eigendecomposition over the cube of its size.
OVERHEAD, ROOTS = 2.0, 20


@edit_method(
    "silence-words",
    title="KL-optimised low-rank edit of the last layer",
    unit="about one nat of the concept's mean logit where it comes next; nats at every position where it amplifies",
    reads=("self_text", "activations"),
    writes=("out",),
    locator="last-matrix",
    last_layer_alone=True,
    search_layers=1,
    search_beside=("rank-one",),
    style=("blue", "-", "o"),
)
@dataclass(frozen=True)
class SilenceWords(EditMethod):
    """The last layer's whole `out` matrix, changed by as little as the predictions elsewhere allow.

    It starts from the rank-one edit and takes steps on self-generated text (see `edits.low_rank`). It lowers the
    concept's words where they would come next. What the model knows of the concept in earlier layers stays.

    A concept that is to be amplified is amplified by its tokens' logits. What neurons write raises a concept only
    where it is likely anyway.

    Attributes:
        key_ridge: Ridge of the rank-one key that it starts from, as a multiple of the neurons' mean square.
        rank: It writes along so many directions at most.
        proximal_weight: How firmly it is held at the rank-one edit that it starts from.
        rounds: How many rounds of ever smaller steps it takes.
        steps: How many steps a round has.
    """

    key_ridge: Annotated[
        float,
        Field(gt=0, allow_inf_nan=False, description="Ridge of the key, as a multiple of the neurons' mean square."),
    ] = 0.03
    rank: Annotated[int, Field(gt=0, description="It writes along so many directions at most.")] = 32
    proximal_weight: Annotated[
        float,
        Field(
            ge=0,
            allow_inf_nan=False,
            description="How firmly it is held at the rank-one edit that it starts from. 0, not at all, fits the given "
            "words more closely and says less of held-out ones.",
        ),
    ] = 0.3
    rounds: Annotated[
        int,
        Field(
            ge=1,
            le=8,
            description="How many rounds of ever smaller steps it takes. Each after the first costs half its time. "
            "Three, with a rank of 128, do about four fifths of the damage of one with 32 on the demo.",
        ),
    ] = 1
    steps: Annotated[int, Field(ge=1, description="How many steps a round has.")] = STEPS

    def build(self, material: Material, concept: Concept) -> Iterator[MatrixChange]:
        """The change of the last matrix, or of the concept's logits where it is amplified."""
        if concept.amplified:
            yield logit_change(material, concept)
            return
        left, right = self._fits(material, concept)[self.rounds - 1].factors(self.rank)
        layer = material.checkpoint.layers - 1
        yield MatrixChange("out", layer, None, torch.arange(len(left)), left, right, 1.0, concept.name)

    def changes_matrices_of(self, concept: Concept) -> bool:
        """It builds whole concepts only."""
        return False

    def _fits(self, material: Material, concept: Concept) -> list[LowRankFit]:
        """The fit after each round of steps. A longer one that was made before is used again."""
        own = (self.key_ridge, self.proximal_weight, self.steps)
        parts = (*own, concept.identity, concept.remaining, material.settings)
        key = ("low-rank fit", repr(parts))
        known: list[LowRankFit] = material.kept.get(key, [])
        if len(known) < self.rounds:
            material.kept[key] = known = self._fit(material, concept)
        return known

    def _fit(self, material: Material, concept: Concept) -> list[LowRankFit]:
        checkpoint, last = material.checkpoint, material.last_written
        if last is None or last.layer != checkpoint.layers - 1:
            raise BadInput(
                f"locate.layers: the method silence-words rewrites the last layer, {checkpoint.layers - 1}; add it, or "
                "set edit.method to rank-one."
            )
        rows = {last.layer: torch.arange(checkpoint.neurons_in(last.layer))}
        group = concept.groups[0]
        moments, place = material.moments(rows), material.group_place(concept, group)
        _, coefficients = fit_keys(moments, place, rows, ridge=self.key_ridge)[last.layer]
        start = coefficients, material.direction(concept, group, last).write
        ridge = self.key_ridge
        settings = material.settings
        key = ("whitened", settings.self_text_tokens, settings.seed, ridge)
        seen = material.once(key, lambda: whitened(material.positions, ridge=ridge))
        return fit_change(
            seen,
            material.output_head,
            material.predicted,
            start,
            self._aim(material, concept),
            proximal_weight=self.proximal_weight,
            seed=settings.seed,
            rounds=self.rounds,
            steps=self.steps,
        )

    def _aim(self, material: Material, concept: Concept) -> FitAim:
        """The concept's tokens and those that are predicted with them, and what must stay."""
        ids, near = concept.ids, concept.kept
        close = torch.cat(near).unique() if near else ids[:0]
        found: Tensor = related_tokens(material.positions, material.output_head, material.predicted, ids, close)
        rows = None
        if near:
            projection, trained = read_unembedding(material.checkpoint), ~material.untrained
            rows = torch.stack([material.gain * concept_mean(projection, own, trained) for own in near])
        return FitAim(torch.cat((ids, found)), concept.remaining, close[~torch.isin(close, ids)], rows)

    def search_space(self, size: ModelSize) -> dict[str, Distribution]:
        """How many rounds, and the rank."""
        return {"rounds": Whole(1, self.rounds), "rank": Whole(1, self.rank, log=True)}

    def finest(self, size: ModelSize) -> "SilenceWords":
        """As many rounds as a search has time for, and as many directions as still make a small adapter."""
        rank = min(SEARCHED_RANKS * self.rank, size.hidden_size)
        return replace(self, rounds=max(self.rounds, SEARCHED_ROUNDS), rank=rank)

    def cost(self, size: ModelSize, self_text_tokens: int) -> Cost:
        """Each step predicts its positions twice and goes back once, after two looks at all positions.

        The positions are held as they are and whitened, beside the head in float32, a step's predictions, and the
        change four times.
        """
        head = size.hidden_size * size.vocabulary_size
        change = size.neurons * size.hidden_size
        later = self.rounds - 1
        drawn = self.steps * (DRAWN + later * DRAWN_LATER)
        whole = self.steps * (1 + later) * 3 * 2 * size.neurons * size.hidden_size**2
        products = drawn * (4 * 2 * head + 3 * 2 * change) + whole
        roots = ROOTS * size.neurons**3 + 2 * 2 * self_text_tokens * size.neurons**2
        positions = self_text_tokens * 2 * (size.neurons + size.hidden_size)
        predictions = 6 * max(DRAWN, AT_ONCE // 2) * size.vocabulary_size
        held = 4 * (positions + head + predictions + 2 * 5 * size.neurons**2 + 4 * change)
        operations = OVERHEAD * (products + 2 * self_text_tokens * 2 * head + roots)
        return Cost(operations=operations, start=0.0, memory=held)
