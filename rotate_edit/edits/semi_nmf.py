"""Semi-nonnegative matrix factorisation of activations (maths only), for the baseline `snmf-features`.

`A ~ F G'` with F free and sparse and G >= 0 (Ding, Li and Jordan 2010), with the hard winner-take-all of the SNMF
decomposition of MLP activations (arXiv 2506.10920): a feature keeps only its strongest entries.
"""

import torch
from torch import Tensor

TINY = 1e-6


def semi_nmf(
    activations: Tensor, rank: int, *, sparsity: float = 0.05, iterations: int = 100, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Factor activations [neurons, positions] into features [neurons, rank] and weights [positions, rank] >= 0.

    Each iteration: `F = A G (G'G + 1e-6 I)^-1`, of which every column keeps the `sparsity` share of its largest
    absolute entries (at least one); the columns of G are scaled to unit length and F by the inverse; then
    `G *= sqrt((P+ + G Q-) / (P- + G Q+ + 1e-6))` with `P = A'F`, `Q = F'F` and + and - their positive and negative
    parts. G starts as the absolute values of normal numbers. float32 throughout.
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
    """`log(mean weight on the concept's positions / mean weight on the others)` of each feature, float32 [rank].

    weights: [positions, rank]; concept: bool [positions]. The detection score of arXiv 2506.10920.
    """
    return ((weights[concept].mean(0) + TINY) / (weights[~concept].mean(0) + TINY)).log()
