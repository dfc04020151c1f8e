"""Choose the layer from which the unembedding reads neuron vectors better than the embedding, without data.

Vectors in early layers of an untied model still fit the embedding. A table that fits a vector gives a sharp projection,
in which a few tokens stand far out. So each layer should take the table under which a sample of its vectors has the
higher excess kurtosis. There is only one switch from embedding to unembedding.
"""

import torch
from torch import Tensor

from rotate_edit.models.checkpoint import Checkpoint, read_embedding, read_matrix, read_unembedding

# Number of vectors whose projections are held at once: 33 MB for a vocabulary of 128,000 tokens.
VECTORS_AT_ONCE = 64


def sharpness(vectors: Tensor, table: Tensor) -> Tensor:
    """Measure how sharp the projection of each vector on a table is.

    The measure is `sign(k) log(1 + |k|)`, where k is the excess kurtosis over the tokens. The tokens' mean is
    subtracted, and every token is scaled to length 1. So no table wins by a few long rows.

    Args:
        vectors: Neuron vectors, float32 [n, d_model].
        table: Embedding or unembedding, float32 [V, d_model].

    Returns:
        The sharpness of each vector's projection, float32 [n].
    """
    unit = table - table.mean(0)
    unit /= unit.norm(dim=1, keepdim=True).clamp_min(1e-12)
    parts = []
    for some in vectors.split(VECTORS_AT_ONCE):
        scores = some @ unit.T
        scores -= scores.mean(1, keepdim=True)
        squares = scores.square()
        kurtosis = squares.square().mean(1) / squares.mean(1).square().clamp_min(1e-30) - 3
        parts.append(kurtosis.sign() * kurtosis.abs().log1p())
    return torch.cat(parts)


def best_switch(gains: list[float]) -> int:
    """Choose the first layer that takes the unembedding.

    A switch at s collects the gains from layer s on and the losses below.

    Args:
        gains: For each layer, how much sharper the unembedding is than the embedding.

    Returns:
        The switch with the largest total. The smallest switch wins a tie.
    """
    totals = [sum(gains[switch:]) - sum(gains[:switch]) for switch in range(len(gains) + 1)]
    return totals.index(max(totals))


def measured_switch(checkpoint: Checkpoint, *, neurons: int = 64, seed: int = 0) -> int:
    """Find the first layer for which the unembedding is the better projection.

    A sample of `out` vectors is taken from each layer. In a mixture of experts, expert 0 is sampled. One table and a
    copy of it are held in memory at a time.

    Args:
        checkpoint: The opened checkpoint.
        neurons: Number of vectors sampled from each layer.
        seed: Seed of the samples.

    Returns:
        The first layer that takes the unembedding. It is 0 for a tied head, of which nothing is read.
    """
    if checkpoint.tied:
        return 0
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for layer in range(checkpoint.layers):
        expert = None if checkpoint.experts_in(layer) is None else 0
        rows = torch.randperm(checkpoint.neurons_in(layer), generator=generator)[:neurons].sort().values
        samples.append(read_matrix(checkpoint, layer, "out", expert, neurons=rows))
    vectors, sizes = torch.cat(samples), [len(sample) for sample in samples]
    gained = sharpness(vectors, read_unembedding(checkpoint)) - sharpness(vectors, read_embedding(checkpoint))
    return best_switch([float(layer.mean()) for layer in gained.split(sizes)])
