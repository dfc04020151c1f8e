"""The published ROTATE optimiser, kept so that its results can be reproduced (method.md §2).

This is maths only.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rotate_edit.channels.objective import Objective, claimed_weights, loss_of, shape_of

LEARNING_RATE = 8e-4
WEIGHT_DECAY = 0.01
WARM_UP = 100
CANDIDATE_EVERY = 100
CONVERGENCE_WINDOW = 100
CONVERGENCE_FROM = 2000
CONVERGENCE_SPREAD = 1e-4


def reflect(normals: Tensor, vectors: Tensor) -> Tensor:
    """Apply Householder reflections `H(u) w = w − 2 u (u·w) / |u|²`.

    Args:
        normals: Rows u, float [n, d].
        vectors: Rows w, float [n, d].

    Returns:
        The reflected rows, float [n, d].
    """
    return vectors - 2 * normals * ((normals * vectors).sum(1, keepdim=True) / (normals * normals).sum(1, keepdim=True))


def search_adamw(
    neurons: Tensor, objective: Objective, claims: Sequence[Tensor], seeds: Sequence[int], steps: int
) -> tuple[Tensor, int]:
    """Search one channel of each neuron by the published procedure.

    The candidate is `v = H(u) w` with `u ~ N(0, 1)` drawn from each neuron's own seed. AdamW changes u, with weight
    decay 0.01 and learning rate 8e-4 after 100 warm-up steps. Every 100 steps the kurtosis of the unweighted projection
    is compared. The candidate with the largest absolute value is kept.

    The batch stops early when every neuron's loss has a standard deviation below 1e-4 over 100 steps. This is checked
    every ten steps, from step 2,000 on.

    Args:
        neurons: Unit neuron vectors, float [n, d].
        objective: The objective.
        claims: Masked places of each neuron, int64 each. Their tokens get a small weight.
        seeds: Seed of each neuron.
        steps: Most steps.

    Returns:
        Unit channel vectors, float [n, d], and the number of steps made.
    """
    draws = [torch.randn(neurons.shape[1], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    normals = torch.stack(draws).to(neurons).requires_grad_(True)
    optimiser = torch.optim.AdamW([normals], lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    weights = claimed_weights(objective, claims)
    history = torch.zeros(CONVERGENCE_WINDOW, len(neurons), dtype=neurons.dtype, device=neurons.device)
    best = neurons.clone()
    sharpest = torch.full((len(neurons),), -1.0, dtype=neurons.dtype, device=neurons.device)
    step = 0
    for step in range(1, steps + 1):
        optimiser.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, step / WARM_UP)
        vectors = reflect(normals, neurons)
        values = vectors @ objective.reading.T
        loss = loss_of(values, weights, (vectors * neurons).sum(dim=1), objective)
        if step % CANDIDATE_EVERY == 0:
            with torch.no_grad():
                kurtosis = shape_of(values.detach())[3].abs()
                better = kurtosis > sharpest
                best[better] = vectors.detach()[better]
                sharpest = torch.where(better, kurtosis, sharpest)
        optimiser.zero_grad()
        loss.sum().backward()
        optimiser.step()
        history[step % CONVERGENCE_WINDOW] = loss.detach()
        if step >= CONVERGENCE_FROM and step % 10 == 0 and bool((history.std(dim=0) < CONVERGENCE_SPREAD).all()):
            break
    return torch.nn.functional.normalize(best, dim=1), step
