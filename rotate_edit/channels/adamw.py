"""The published ROTATE optimiser, kept so that its results can be reproduced (method.md §2). Maths only."""

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
    """Householder reflections `H(u) w = w − 2 u (u·w) / |u|²` of rows w [n, d] by rows u [n, d]."""
    return vectors - 2 * normals * ((normals * vectors).sum(1, keepdim=True) / (normals * normals).sum(1, keepdim=True))


def search_adamw(
    neurons: Tensor, objective: Objective, claims: Sequence[Tensor], seeds: Sequence[int], steps: int
) -> tuple[Tensor, int]:
    """One channel of each unit neuron [n, d] by the published procedure: (unit vectors [n, d], steps made).

    `v = H(u) w`, `u ~ N(0, 1)` from each neuron's own seed; AdamW on u, learning rate 8e-4 after 100 warm-up steps,
    weight decay 0.01. Every 100 steps the candidate of largest |kurtosis| of the unweighted projection is kept. The
    batch stops when every neuron's loss has a standard deviation below 1e-4 over 100 steps, looked at from step 2,000
    on, every ten steps.
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
