"""The ROTATE objective of one channel (method.md §2), prepared for a solver.

This is maths only.

    loss(v) = − λk · slog(kurt(m ∘ (v U))) + λf · (1 − cos(v, w))

`kurt` is the excess kurtosis over the vocabulary (population moments), and `slog(x) = sign(x) log(1 + |x|)`. `m` are
the token weights of the vocabulary. The tokens of earlier channels of the neuron are masked: their weight is lowered to
`claimed_weight`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOMENTS = ("weighted", "zeroed")
COVARIANCE_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Objective:
    """The vocabulary as the objective sees it. Its rows, called places, are the tokens that count.

    There are two ways of taking moments. With `zeroed`, T = V and `X_t = m_t U_t − μ` with `μ = mean_t m_t U_t`. So
    `v·X_t` is the centred value `m_t (v·U_t)` of the published objective, and every place has weight 1.
    With `weighted`, the places are the tokens of weight above 0, those of weight 1 first. There `X_t = U_t − μ` with
    `μ = Σ ω U / Σ ω`.

    Either way `Σ_t ω_t X_t = 0`. This keeps means small beside spreads, so that float32 does not cancel.

    Attributes:
        matrix: Centred rows X, float [T, d].
        reading: Rows for unweighted projections, up to one shared shift, float [T, d].
        tokens: Token id of each place, int64 [T].
        weights: Weight ω of each place, float [T].
        token_weights: Token weight m of each place, float [T].
        full: Number of leading places that have weight 1.
        total: Sum Σω of the weights.
        mean: Mean μ, float [d].
        preconditioner: Result of `make_preconditioner`, float [d, d].
        moments: "weighted" or "zeroed".
        sharpness: Factor λk of the kurtosis term.
        fidelity: Factor λf of the cosine term.
        claimed_weight: Weight of a masked token.
        fused: Whether the Triton kernels are used.
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
    """Prepare the vocabulary for one way of taking moments. The matrix is copied once.

    Args:
        unembedding: Table of the tokens, float [V, d].
        token_weights: Weight m of each token, [V].
        moments: "weighted" or "zeroed".
        sharpness: Factor λk of the kurtosis term.
        fidelity: Factor λf of the cosine term.
        claimed_weight: Weight of a masked token.
        fused: Whether the Triton kernels are used.

    Returns:
        The objective, in the dtype and on the device of `unembedding`.
    """
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
    """Compute `P = (C + ε I)⁻¹`, scaled to mean diagonal 1, with `C = Σ ω X Xᵀ / Σ ω`.

    ε is the geometric mean of the eigenvalues of C. A step along the gradient has to be multiplied with P where U is
    anisotropic.

    An estimate is enough. C is taken from an even sample of the tokens: eight for each of its rows, and 8,192 at least.
    The one d × d factorisation runs in float64 on the CPU, since devices differ in what they offer.

    Args:
        matrix: Centred rows X, float [T, d].
        weights: Weights ω, float [T].

    Returns:
        The matrix P, float [d, d], in the dtype and on the device of `matrix`.
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
    """Compute `slog(x) = sign(x) log(1 + |x|)`.

    Args:
        value: Values x, a float tensor of any shape.

    Returns:
        The results, in the same shape.
    """
    return value.sign() * value.abs().log1p()


def excess_kurtosis(first: Tensor, second: Tensor, third: Tensor, fourth: Tensor) -> Tensor:
    """Compute the excess kurtosis `μ₄/μ₂² − 3` from raw moments.

    It is exact enough where the mean is small beside the spread.

    Args:
        first: Raw moment M1, a float tensor of any shape.
        second: Raw moment M2, in the same shape.
        third: Raw moment M3, in the same shape.
        fourth: Raw moment M4, in the same shape.

    Returns:
        The excess kurtosis, in the same shape.
    """
    square = first * first
    variance = second - square
    centred = fourth - 4 * first * third + 6 * square * second - 3 * square * square
    return centred / (variance * variance).clamp_min(torch.finfo(variance.dtype).tiny) - 3


def shape_of(values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute mean, standard deviation, skewness and excess kurtosis of each row (population moments).

    Args:
        values: The rows, float [n, T].

    Returns:
        The four figures, float [n] each.
    """
    mean = values.mean(dim=1, keepdim=True)
    centred = values - mean
    square = centred * centred
    variance = square.mean(dim=1).clamp_min(torch.finfo(values.dtype).tiny)
    skewness = (square * centred).mean(dim=1) / variance**1.5
    kurtosis = (square * square).mean(dim=1) / variance**2 - 3
    return mean[:, 0], variance.sqrt(), skewness, kurtosis


def claimed_weights(objective: Objective, claims: Sequence[Tensor]) -> Tensor:
    """Compute the token weights m of each row, lowered at masked places.

    Args:
        objective: The objective.
        claims: Masked places of each row, int64 each.

    Returns:
        The weights as a dense matrix, float [n, T].
    """
    weights = objective.token_weights.repeat(len(claims), 1)
    for row, places in enumerate(claims):
        if len(places):
            weights[row, places] = weights[row, places].clamp_max(objective.claimed_weight)
    return weights


def loss_of(values: Tensor, weights: Tensor, cosine: Tensor, objective: Objective) -> Tensor:
    """Compute the loss of rows of projections straight from the definition.

    It is differentiable, and it is the reference against which the fast paths are tested.

    Args:
        values: Unweighted projections, float [n, T].
        weights: Token weights m, float [n, T].
        cosine: Cosine of each row's vector with its neuron, float [n].
        objective: The objective.

    Returns:
        The loss, float [n].
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
