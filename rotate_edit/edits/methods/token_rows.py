"""Edits of the rows of a concept's own tokens, in the embedding and in the output head."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from rotate_edit.edits.directions import concept_mean, mean_direction, nearest_tokens, subtract_direction
from rotate_edit.edits.edit import MatrixChange
from rotate_edit.edits.material import Concept, Material
from rotate_edit.edits.methods.base import EditMethod, edit_method
from rotate_edit.models.checkpoint import read_embedding, read_unembedding
from rotate_edit.vocabulary.concept import token_texts


@edit_method(
    "token-embeddings",
    title="mean direction out of the concept's embedding rows",
    reference="after EMBER, arXiv 2606.03695",
    unit="the projection on the direction: 1 removes it, more turns it round",
    writes=("embedding", "unembedding"),
    keeps_words=False,
    style=("green", (0, (5, 2)), "p"),
)
@dataclass(frozen=True)
class EmbeddingRows(EditMethod):
    """The concept's mean direction out of its own tokens' rows of the embedding and of an untied output head.

    EMBER erases in the rows of a concept's tokens because that survives relearning. The direction there is a semi-NMF
    feature of the embeddings. Here it is `mean(rows of the tokens) - mean(usable rows)`.

    Attributes:
        more_tokens: How many tokens that no word names lose the direction too: those whose rows point most along it.
    """

    more_tokens: Annotated[
        int, Field(ge=0, description="How many tokens near the concept's are edited too, beside those of its words.")
    ] = 0

    def build(self, material: Material, concept: Concept) -> Iterator[MatrixChange]:
        """One change for each table."""
        yield from row_changes(material, concept, self.more_tokens)

    def notes(self, material: Material, concept: Concept) -> tuple[str, ...]:
        """The tokens that were added to the user's."""
        return added_tokens(material, concept, self.more_tokens)


def row_changes(material: Material, concept: Concept, more_tokens: int) -> Iterator[MatrixChange]:
    """Take a concept's mean direction out of its tokens' rows, in each table once.

    Args:
        material: The model.
        concept: The concept.
        more_tokens: How many of the nearest tokens are edited beside its own.
    """
    rows = torch.cat([concept.ids, _nearest(material, concept, more_tokens)]).sort().values
    for matrix, table in _tables(material).items():
        left, right = row_factors(table, concept.ids, ~material.untrained, rows)
        yield MatrixChange(matrix, None, None, rows, left, right, 1.0, concept.name)


def added_tokens(material: Material, concept: Concept, more_tokens: int) -> tuple[str, ...]:
    """One sentence that names the tokens which `row_changes` edits beside the concept's own. Nothing without any."""
    found = _nearest(material, concept, more_tokens).tolist()
    if not found:
        return ()
    texts = token_texts(material.tokenizer)
    names = ", ".join(repr(texts[index]) for index in found)
    return (f"{concept.name}: tokens near its words were edited too: {names}.",)


def _tables(material: Material) -> dict[str, Tensor]:
    tables = {"embedding": read_embedding(material.checkpoint)}
    if not material.checkpoint.tied:
        tables["unembedding"] = read_unembedding(material.checkpoint)
    return tables


def _nearest(material: Material, concept: Concept, count: int) -> Tensor:
    """The tokens nearest to a concept's, without any that it keeps, int64."""
    if not count:
        return concept.ids[:0]
    usable = ~material.untrained
    for kept in concept.kept:
        usable[kept] = False

    def find() -> Tensor:
        return nearest_tokens(list(_tables(material).values()), concept.ids, usable, count)

    return material.once(("nearest tokens", concept.identity, count), find)


def row_factors(table: Tensor, token_ids: Tensor, usable: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Factors that take a concept's mean direction out of rows of a table.

    Args:
        table: An embedding or unembedding, float32 [V, d_model].
        token_ids: The concept's tokens, int64 [n].
        usable: Tokens that the vocabulary's mean is taken over, bool [V].
        rows: The tokens whose rows lose it, int64 [m]. The concept's own when left out.

    Returns:
        left [m, 1] and right [1, d_model].
    """
    changed = token_ids if rows is None else rows
    return subtract_direction(table[changed], mean_direction(concept_mean(table, token_ids, usable)))


@edit_method(
    "token-logits",
    title="a constant on the logits of the concept's tokens",
    unit="nats at every position",
    reads=("self_text",),
    writes=("embedding", "unembedding"),
    style=("purple", (0, (1, 2)), "H"),
)
class TokenLogits(EditMethod):
    """The logits of a concept's tokens lowered by `strength` nats at every position alike. Below 0 they rise.

    Of all changes of the predictions with a given gain this one diverges least. See docs/method.md, Amplifying.
    """

    def build(self, material: Material, concept: Concept) -> Iterator[MatrixChange]:
        """One change of the output head's rows."""
        yield logit_change(material, concept)


def logit_change(material: Material, concept: Concept) -> MatrixChange:
    """The change that lowers the logits of a concept's tokens by 1 nat at every position."""
    head = "embedding" if material.checkpoint.tied else "unembedding"
    rows = -torch.ones(len(concept.ids), 1)
    return MatrixChange(head, None, None, concept.ids, rows, material.even_reading[None], 1.0, concept.name)
