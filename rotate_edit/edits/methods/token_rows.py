"""Edits of the rows of a concept's own tokens, in the embedding and in the output head."""

from collections.abc import Iterator

import torch
from torch import Tensor

from rotate_edit.edits.directions import concept_mean, mean_direction, subtract_direction
from rotate_edit.edits.edit import MatrixChange
from rotate_edit.edits.material import Concept, Material
from rotate_edit.edits.methods.base import EditMethod, edit_method
from rotate_edit.models.checkpoint import read_embedding, read_unembedding


@edit_method(
    "token-embeddings",
    title="mean direction out of the concept's embedding rows",
    reference="after EMBER, arXiv 2606.03695",
    unit="the projection on the direction: 1 removes it",
    writes=("embedding", "unembedding"),
    keeps_words=False,
    style=("green", (0, (5, 2)), "p"),
)
class EmbeddingRows(EditMethod):
    """The concept's mean direction out of its own tokens' rows of the embedding and of an untied output head.

    EMBER erases in the rows of a concept's tokens because that survives relearning. The direction there is a semi-NMF
    feature of the embeddings. Here it is `mean(rows of the tokens) - mean(usable rows)`.
    """

    def build(self, material: Material, concept: Concept) -> Iterator[MatrixChange]:
        """One change for each table."""
        tables = {"embedding": read_embedding(material.checkpoint)}
        if not material.checkpoint.tied:
            tables["unembedding"] = read_unembedding(material.checkpoint)
        for matrix, table in tables.items():
            left, right = row_factors(table, concept.ids, ~material.untrained)
            yield MatrixChange(matrix, None, None, concept.ids, left, right, 1.0, concept.name)


def row_factors(table: Tensor, token_ids: Tensor, usable: Tensor) -> tuple[Tensor, Tensor]:
    """Factors that take a concept's mean direction out of its own tokens' rows.

    Args:
        table: An embedding or unembedding, float32 [V, d_model].
        token_ids: The concept's tokens, int64 [n].
        usable: Tokens that the vocabulary's mean is taken over, bool [V].

    Returns:
        left [n, 1] and right [1, d_model].
    """
    return subtract_direction(table[token_ids], mean_direction(concept_mean(table, token_ids, usable)))


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
