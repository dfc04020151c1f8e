"""Tiny edits and channels that several tests of the evaluation share."""

from tiny_words import ids

from rotate_edit.channels.channel_set import Channel
from rotate_edit.edits.edit import Edit, MatrixChange


def silencing(model, *words):
    """An edit that takes the words' rows out of the unembedding: strength 1 makes their logits 0."""
    rows = ids(*words).sort().values
    vectors = model.lm_head.weight.detach()[rows]
    changes = [
        MatrixChange("unembedding", None, None, rows[i : i + 1], -vectors[i].norm().reshape(1, 1),
                     (vectors[i] / vectors[i].norm())[None], 4.0, "cat")
        for i in range(len(rows))
    ]  # fmt: skip
    return Edit("test", tuple(changes))


def channel(matrix, words, vector, index, layer=0, neuron=3, sign=1, expert=None):
    return Channel(
        layer=layer, expert=expert, neuron=neuron, matrix=matrix, index=index, sign=sign,
        token_ids=tuple(ids(*words).tolist()), tokens=words, z_scores=(5.0,) * len(words), kurtosis=9.0, skewness=2.0,
        cosine=0.7, loss=-1.0, support=3.0, claimed=2, vector=vector,
    )  # fmt: skip
