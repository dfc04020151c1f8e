"""The ROTATE objective of one channel (method.md §2) made ready for a solver. Maths only.

    loss(v) = − λk · slog(kurt(m ∘ (v U))) + λf · (1 − cos(v, w))

`kurt` is the excess kurtosis over the vocabulary (population moments), `slog(x) = sign(x) log(1 + |x|)`, `m` the
token weights: those of the vocabulary, lowered to `claimed_weight` for the tokens earlier channels of the neuron
took.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOMENTS = ("weighted", "zeroed")
COVARIANCE_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Objective:
    """The vocabulary as the objective sees it; its rows (below: `places`) are the tokens that count.

    matrix X: float [T, d], centred rows. `zeroed`: T = V and `X_t = m_t U_t − μ`, `μ = mean_t m_t U_t`, so that
    `v·X_t` is the centred value `m_t (v·U_t)` of the published objective; every place has weight 1. `weighted`: the
    tokens of weight > 0, those of weight 1 first, `X_t = U_t − μ`, `μ = Σ ω U / Σ ω`. Either way `Σ_t ω_t X_t = 0`,
    which keeps means small beside spreads, so that float32 does not cancel. weights ω: [T]; full: how many leading
    places have weight 1; total: Σω; mean μ: [d]; token_weights m: [T], of each place; tokens: int64 [T], token id
    of each place; reading: [T, d], rows (up to one shared shift) for unweighted projections.
    """

    matrix: Tensor
    reading: Tensor
    tokens: Tensor
    weights: Tensor
    token_weights: Tensor
    full: int
    total: float
    mean: Tensor
    preconditioner: Tensor
    moments: str
    sharpness: float
    fidelity: float
    claimed_weight: float
    fused: bool

    @property
    def exact(self) -> torch.dtype:
        """The dtype for moments and polynomials: float64 wherever the device has it."""
        return torch.float32 if self.matrix.device.type == "mps" else torch.float64


def make_objective(
    unembedding: Tensor,
    token_weights: Tensor,
    moments: str,
    *,
    sharpness: float = 0.3,
    fidelity: float = 1.0,
    claimed_weight: float = 0.01,
    fused: bool = False,
) -> Objective:
    """Prepare `unembedding` [V, d] and `token_weights` [V] for one way of taking moments. Copies the matrix once."""
    token_weights = token_weights.to(unembedding)
    if moments == "zeroed":
        tokens = torch.arange(len(unembedding), device=unembedding.device)
        matrix = unembedding * token_weights[:, None]
        mean = matrix.mean(dim=0)
        reading, weights = unembedding, torch.ones_like(token_weights)
    else:
        tokens = torch.argsort(token_weights, descending=True, stable=True)
        tokens = tokens[: int((token_weights > 0).sum())]
        matrix, weights = unembedding[tokens], token_weights[tokens]
        mean = (weights / weights.sum()) @ matrix
    matrix -= mean
    return Objective(
        matrix=matrix,
        reading=matrix if moments == "weighted" else reading,
        tokens=tokens,
        weights=weights,
        token_weights=token_weights[tokens],
        full=int((weights == 1).sum()),
        total=float(weights.double().sum()) if matrix.device.type != "mps" else float(weights.sum()),
        mean=mean,
        preconditioner=make_preconditioner(matrix, weights),
        moments=moments,
        sharpness=sharpness,
        fidelity=fidelity,
        claimed_weight=claimed_weight,
        fused=fused,
    )


def make_preconditioner(matrix: Tensor, weights: Tensor) -> Tensor:
    """`P = (C + ε I)⁻¹`, scaled to mean diagonal 1, [d, d], with `C = Σ ω X Xᵀ / Σ ω` and ε the geometric mean of the
    eigenvalues of C: what a step along the gradient has to be multiplied with where U is anisotropic.

    An estimate does: C is taken from an even sample of the tokens, eight for each of its rows and 8,192 at least. In
    float64 on the CPU, since devices differ in what they offer; one d × d factorisation.
    """
    size = matrix.shape[1]
    stride = max(1, len(matrix) // max(8192, 8 * size))
    matrix, weights = matrix[::stride], weights[::stride]
    covariance = torch.zeros(size, size, dtype=matrix.dtype, device=matrix.device)
    block = max(1, COVARIANCE_ELEMENTS // size)
    for rows, share in zip(matrix.split(block), (weights / weights.sum()).split(block)):
        covariance += (rows * share[:, None]).T @ rows
    covariance = covariance.cpu().double()
    floor = 1e-6 * covariance.diagonal().mean() * torch.eye(size, dtype=torch.float64)
    factor = torch.linalg.cholesky(covariance + floor)
    ridge = torch.exp(2 * factor.diagonal().log().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(covariance + ridge * torch.eye(size, dtype=torch.float64)))
    return (inverse / inverse.diagonal().mean()).to(matrix)


def signed_log(value: Tensor) -> Tensor:
    """`slog(x) = sign(x) log(1 + |x|)`."""
    return value.sign() * value.abs().log1p()


def excess_kurtosis(first: Tensor, second: Tensor, third: Tensor, fourth: Tensor) -> Tensor:
    """`μ₄/μ₂² − 3` from raw moments M1..M4; exact enough where the mean is small beside the spread."""
    square = first * first
    variance = second - square
    centred = fourth - 4 * first * third + 6 * square * second - 3 * square * square
    return centred / (variance * variance).clamp_min(torch.finfo(variance.dtype).tiny) - 3


def shape_of(values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, standard deviation, skewness and excess kurtosis of each row of `values` [n, T], population moments."""
    mean = values.mean(dim=1, keepdim=True)
    centred = values - mean
    square = centred * centred
    variance = square.mean(dim=1).clamp_min(torch.finfo(values.dtype).tiny)
    skewness = (square * centred).mean(dim=1) / variance**1.5
    kurtosis = (square * square).mean(dim=1) / variance**2 - 3
    return mean[:, 0], variance.sqrt(), skewness, kurtosis


def claimed_weights(objective: Objective, claims: Sequence[Tensor]) -> Tensor:
    """The token weights m of each row as a dense [n, T] matrix, claimed places (one int64 tensor a row) lowered."""
    weights = objective.token_weights.repeat(len(claims), 1)
    for row, places in enumerate(claims):
        if len(places):
            weights[row, places] = weights[row, places].clamp_max(objective.claimed_weight)
    return weights


def loss_of(values: Tensor, weights: Tensor, cosine: Tensor, objective: Objective) -> Tensor:
    """The loss of rows of unweighted projections `values` [n, T] under dense token weights m [n, T]; cosine: [n].

    Written straight from the definition and differentiable: the reference that the fast paths are tested against.
    """
    tiny = torch.finfo(values.dtype).tiny
    if objective.moments == "zeroed":
        values = values * weights
        square = (values - values.mean(dim=1, keepdim=True)).square()
        kurtosis = square.square().mean(dim=1) / square.mean(dim=1).clamp_min(tiny) ** 2 - 3
    else:
        total = weights.sum(dim=1)
        square = (values - ((weights * values).sum(dim=1) / total)[:, None]).square()
        weighted = weights * square
        variance = (weighted.sum(dim=1) / total).clamp_min(tiny)
        kurtosis = (weighted * square).sum(dim=1) / total / variance**2 - 3
    return -objective.sharpness * signed_log(kurtosis) + objective.fidelity * (1 - cosine)
