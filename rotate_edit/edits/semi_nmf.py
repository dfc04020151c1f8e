"""Semi-nonnegative matrix factorisation of activations, for the baseline `snmf-features` (mathematics only).

`A ~ F G'` with F free and sparse and G >= 0 (Ding, Li and Jordan 2010). It has the hard winner-take-all step of the
SNMF decomposition of MLP activations (arXiv 2506.10920). A feature keeps only its strongest entries.
"""

import torch
from torch import Tensor

TINY = 1e-6


def semi_nmf(
    activations: Tensor, rank: int, *, sparsity: float = 0.05, iterations: int = 100, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Factor activations into sparse features and nonnegative weights.

    Each iteration has three steps. First `F = A G (G'G + 1e-6 I)^-1`, of which every column keeps the `sparsity` share
    of its largest absolute entries (at least one). Second, the columns of G are scaled to unit length and F by the
    inverse. Third, `G *= sqrt((P+ + G Q-) / (P- + G Q+ + 1e-6))` with `P = A'F` and `Q = F'F`. Here + and - are their
    positive and negative parts. G starts as the absolute values of normal numbers. float32 is used throughout.

    Args:
        activations: Float [neurons, positions].
        rank: Number of features.
        sparsity: Share of the neurons that each feature keeps.
        iterations: Number of iterations.
        seed: Seed of the starting weights.

    Returns:
        Features, float32 [neurons, rank], and weights, float32 [positions, rank], >= 0.
    """
    generator = torch.Generator().manual_seed(seed)
    table = activations.float()
    weights = torch.randn(table.shape[1], rank, generator=generator).abs()
    kept = max(1, round(sparsity * len(table)))
    for _ in range(iterations):
        features, weights = _features(table, weights, kept)
        products, gram = table.T @ features, features.T @ features
        weights = (
            weights
            * (
                (products.clamp(min=0) + weights @ (-gram).clamp(min=0))
                / ((-products).clamp(min=0) + weights @ gram.clamp(min=0) + TINY)
            ).sqrt()
        )
    return _features(table, weights, kept)


def _features(table: Tensor, weights: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    gram = weights.T @ weights + TINY * torch.eye(weights.shape[1])
    features = torch.linalg.solve(gram, (table @ weights).T).T
    threshold = features.abs().topk(kept, dim=0).values[-1]
    features = features * (features.abs() >= threshold)
    length = weights.norm(dim=0).clamp_min(TINY)
    return features * length, weights / length


def concept_score(weights: Tensor, concept: Tensor) -> Tensor:
    """Score how well each feature detects a concept (the detection score of arXiv 2506.10920).

    It is `log(mean weight on the concept's positions / mean weight on the others)`.

    Args:
        weights: float32 [positions, rank].
        concept: bool [positions], true where the text is about the concept.

    Returns:
        float32 [rank], natural logarithms.
    """
    return ((weights[concept].mean(0) + TINY) / (weights[~concept].mean(0) + TINY)).log()
