"""From which layer on the unembedding reads neuron vectors better than the embedding: a rule without data.

Early layers of an untied model still speak the embedding's language. A table that fits a vector shows it as a sharp
projection, a few tokens standing far out, so each layer takes the table under which a sample of its vectors has the
higher excess kurtosis, subject to one switch from embedding to unembedding.
"""

import torch
from torch import Tensor

from rotate_edit.models.checkpoint import Checkpoint, read_embedding, read_matrix, read_unembedding

# A projection of so many vectors is held at once: 33 MB for a vocabulary of 128,000 tokens.
VECTORS_AT_ONCE = 64


def sharpness(vectors: Tensor, table: Tensor) -> Tensor:
    """`sign(k) log(1 + |k|)`, k the excess kurtosis over the tokens, of each vector's projection: float32 [n].

    vectors: float32 [n, d_model]; table: float32 [V, d_model]. The tokens' mean is taken off and every token scaled to
    length 1, so that no table wins by a few long rows.
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
    """The layer from which on to take the unembedding; gains: how much sharper it is than the embedding, by layer.

    The switch at s collects the gains from layer s on and the losses below; the smallest s wins a tie.
    """
    totals = [sum(gains[switch:]) - sum(gains[:switch]) for switch in range(len(gains) + 1)]
    return totals.index(max(totals))


def measured_switch(checkpoint: Checkpoint, *, neurons: int = 64, seed: int = 0) -> int:
    """The first layer for which the unembedding is the better projection, from a sample of `out` vectors a layer.

    0 for a tied head, of which nothing is read. In a mixture of experts expert 0 is sampled. One table is held in
    memory at a time, and a copy of it.
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
