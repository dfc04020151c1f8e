"""Exact search along great circles: the default solver of the ROTATE objective (method.md §3).

This is maths only. One step moves along `v(θ) = v cos θ + p sin θ` with unit `v` and unit `p` tangent to the sphere at
`v`. A projection is linear, so `z(θ) = a cos θ + b sin θ` with `a = v Xᵀ` and `b = p Xᵀ`.

Every moment of `z(θ)` is a homogeneous polynomial in `(cos θ, sin θ)`. Its coefficients are the fourteen mixed moments
`Σ ω aⁱ bʲ / Σω` with `1 ≤ i+j ≤ 4`. So one projection of `p` gives the loss on the whole circle exactly. It also gives
`a` at the new point without another projection.
"""

from collections.abc import Sequence
from math import comb

import torch
from torch import Tensor

from rotate_edit.channels.objective import Objective, excess_kurtosis, signed_log

POWERS = tuple((order - j, j) for order in range(1, 5) for j in range(order + 1))
"""(i, j) of the fourteen mixed moments `Σ ω aⁱ bʲ`: order 1, 2, 3, 4, with the power of a falling."""
BINOMIALS = [comb(i + j, j) for i, j in POWERS]
LAST_OF_ORDER = [1, 4, 8, 13]


def mixed_moments(a: Tensor, b: Tensor, weights: Tensor | None = None) -> Tensor:
    """Compute the ten sums `Σ_t ω_t a_tⁱ b_tʲ` with j ≥ 1.

    The four sums without b are known from the step before.

    Args:
        a: Projections of the points, float [n, T].
        b: Projections of the directions, float [n, T].
        weights: Weights ω, float [T] or [n, T]; None for ones.

    Returns:
        The sums, float [n, 10], in the order of `POWERS`.
    """
    dot = torch.linalg.vecdot
    aa, ab, bb = a * a, a * b, b * b
    b_weighted, ab_weighted, bb_weighted = (b, ab, bb) if weights is None else (b * weights, ab * weights, bb * weights)
    return torch.stack(
        [
            b_weighted.sum(dim=1),
            ab_weighted.sum(dim=1),
            bb_weighted.sum(dim=1),
            dot(aa, b_weighted),
            dot(a, bb_weighted),
            dot(b, bb_weighted),
            dot(aa, ab_weighted),
            dot(aa, bb_weighted),
            dot(ab, bb_weighted),
            dot(bb, bb_weighted),
        ],
        dim=1,
    )


def join_moments(pure: Tensor, mixed: Tensor) -> Tensor:
    """Join the moments with and without b.

    Args:
        pure: Moments M1..M4 of a, float [n, 4].
        mixed: The ten moments with b, float [n, 10].

    Returns:
        All fourteen moments, float [n, 14], in the order of `POWERS`.
    """
    parts = []
    for order, low, high in ((1, 0, 1), (2, 1, 3), (3, 3, 6), (4, 6, 10)):
        parts += [pure[:, order - 1 : order], mixed[:, low:high]]
    return torch.cat(parts, dim=1)


def power_moments(mixed: Tensor, tangents: Tensor) -> list[Tensor]:
    """Compute the raw moments M1..M4 of `z(θ)/cos θ = a + b tan θ`.

    Horner's rule evaluates `M_k = Σ_j C(k, j) ⟨a^{k−j} bʲ⟩ tanʲθ`. The moments of z(θ) itself are `cosᵏθ` times that.

    Args:
        mixed: Mixed moments, float [n, 14].
        tangents: Values of tan θ, float [G] or [n, G].

    Returns:
        Four moments, float [n, G] each.
    """
    parts = (mixed * mixed.new_tensor(BINOMIALS)).split((2, 3, 4, 5), dim=1)
    return [evaluate(part, tangents) for part in parts]


def central_polynomials(mixed: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the second and fourth central moments of `a + b τ` as polynomials in τ.

    They are `v = M2 − M1²` and `F = M4 − 4 M1 M3 + M1² (6 M2 − 3 M1²)`.

    Args:
        mixed: Mixed moments, float [n, 14].

    Returns:
        Coefficients of v, float [n, 3], and of F, float [n, 5]; the constant comes first.
    """
    first, second, third, fourth = (mixed * mixed.new_tensor(BINOMIALS)).split((2, 3, 4, 5), dim=1)
    square = multiply(first, first)
    return second - square, fourth - 4 * multiply(first, third) + multiply(square, 6 * second - 3 * square)


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """Multiply polynomials that are given by coefficients, the constant first.

    Args:
        left: Coefficients, float [n, j].
        right: Coefficients, float [n, k].

    Returns:
        Coefficients of the products, float [n, j + k − 1].
    """
    product = torch.nn.functional.pad(left[:, :1] * right, (0, left.shape[1] - 1))
    for power in range(1, left.shape[1]):
        product[:, power : power + right.shape[1]].addcmul_(left[:, power : power + 1], right)
    return product


def evaluate(polynomial: Tensor, at: Tensor) -> Tensor:
    """Evaluate polynomials by Horner's rule.

    Args:
        polynomial: Coefficients, the constant first, float [n, k].
        at: Points, float [G] or [n, G].

    Returns:
        The values, float [n, G].
    """
    *columns, value = polynomial.split(1, dim=1)
    for column in reversed(columns):
        value = torch.addcmul(column, value, at)
    return value


def circle_loss(polynomials: tuple[Tensor, Tensor], angles: Tensor, cosines: Tensor, objective: Objective) -> Tensor:
    """Compute the loss at angles of each row's circle.

    The loss is `−λk slog(F(τ) / v(τ)² − 3) + λf (1 − (v·ŵ cos θ + p·ŵ sin θ))` with `τ = tan θ`. The kurtosis is that
    of `a + b τ`, since scale does not matter to it.

    Args:
        polynomials: Polynomials v and F of `central_polynomials`.
        angles: Angles θ in radians, float [G] or [n, G].
        cosines: Products v·ŵ and p·ŵ, float [n, 2].
        objective: The objective.

    Returns:
        The loss, float [n, G].
    """
    tangents = torch.tan(angles)
    variance, fourth = (evaluate(polynomial, tangents) for polynomial in polynomials)
    kurtosis = fourth / (variance * variance).clamp_min(_tiny(variance)) - 3
    cosine = torch.addcmul(cosines[:, :1] * torch.cos(angles), cosines[:, 1:], torch.sin(angles))
    return torch.add(objective.fidelity * (1 - cosine), signed_log(kurtosis), alpha=-objective.sharpness)


def angle_grid(objective: Objective, reach: float = torch.pi) -> Tensor:
    """Choose the angles tried on every circle.

    They are 0 and, both ways, geometric steps up to a uniform grid over the half circle. Late steps are short and need
    as many choices as early ones.

    Args:
        objective: The objective.
        reach: Largest angle in radians.

    Returns:
        The angles in radians, rising, float [G].
    """
    short = torch.logspace(-3, -1, 4, dtype=objective.exact)
    long = torch.linspace(0.1, 3.1, 9, dtype=objective.exact)[1:]
    positive = torch.cat([short, long]).to(objective.matrix.device)
    positive = positive[positive <= reach]
    return torch.cat([-positive.flip(0), torch.zeros_like(positive[:1]), positive])


def best_angle(
    mixed: Tensor, cosines: Tensor, objective: Objective, grid: Tensor, forced: Tensor, points: int = 6
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the angle of least loss on each circle.

    The whole circle is tried on a grid, and the neighbourhood of the best angle on a finer one. A parabola through the
    three best points of that gives the answer. If its vertex lies higher than they do, the best point is taken. So the
    loss never rises.

    Args:
        mixed: Mixed moments, float [n, 14].
        cosines: Products v·ŵ and p·ŵ, float [n, 2].
        objective: The objective.
        grid: Angles to try, in radians, rising, float [G].
        forced: Rows that go to a quarter circle without a search, bool [n].
        points: Number of points of the finer grid on either side, both ends included.

    Returns:
        Angle in radians [n], raw moments of z there [n, 4], and loss there [n].
    """
    polynomials = central_polynomials(mixed)
    index = circle_loss(polynomials, grid, cosines, objective).argmin(dim=1)
    low, middle, high = grid[torch.stack([index - 1, index, index + 1]).clamp(0, len(grid) - 1)][:, :, None]
    share = torch.linspace(0, 1, points, dtype=grid.dtype, device=grid.device)
    fine = torch.cat([low + (middle - low) * share, middle + (high - middle) * share[1:]], dim=1)
    losses = circle_loss(polynomials, fine, cosines, objective)
    best = losses[:, 1:-1].argmin(dim=1, keepdim=True) + 1
    around = torch.cat([best - 1, best, best + 1], dim=1)
    tried, reached = fine.gather(1, around), losses.gather(1, around)
    vertex = parabola_vertex(tried, reached)
    higher = circle_loss(polynomials, vertex[:, None], cosines, objective)[:, 0] > reached[:, 1]
    angle = torch.where(forced, torch.pi / 2, torch.where(higher, tried[:, 1], vertex))
    moments, loss = _arrive(mixed, angle, cosines, objective, forced)
    return angle, moments, loss


def _arrive(
    mixed: Tensor, angle: Tensor, cosines: Tensor, objective: Objective, quarter: Tensor
) -> tuple[Tensor, Tensor]:
    """Raw moments of z [n, 4] and loss [n] at one angle [n] of each circle; where `quarter` holds it is π/2 exactly."""
    cos, sin = torch.cos(angle), torch.sin(angle)
    square = cos * cos
    scales = torch.stack([cos, square, square * cos, square * square], dim=1)
    moments = torch.cat(power_moments(mixed, torch.tan(angle)[:, None]), dim=1) * scales
    moments = torch.where(quarter[:, None], mixed[:, LAST_OF_ORDER], moments)
    cosine = cosines[:, 0] * cos + cosines[:, 1] * sin
    kurtosis = excess_kurtosis(*moments.unbind(1))
    return moments, objective.fidelity * (1 - cosine) - objective.sharpness * signed_log(kurtosis)


def parabola_vertex(angles: Tensor, losses: Tensor) -> Tensor:
    """Find where the parabola through three points is least.

    Args:
        angles: Rising angles in radians, float [n, 3].
        losses: Losses at these angles, float [n, 3]; the middle one is least.

    Returns:
        The angle in radians, float [n], between the outer two.
    """
    left, right = angles[:, 0] - angles[:, 1], angles[:, 2] - angles[:, 1]
    left_rise, right_rise = losses[:, 0] - losses[:, 1], losses[:, 2] - losses[:, 1]
    bend = (right * left_rise - left * right_rise).clamp_min(_tiny(losses))
    offset = 0.5 * (right * right * left_rise - left * left * right_rise) / bend
    return angles[:, 1] + torch.minimum(torch.maximum(offset, left), right)


def gradient_polynomial(moments: Sequence[Tensor], sharpness: float) -> Tensor:
    """Compute the polynomial that gives the gradient of the kurtosis term in token space.

    It satisfies `d(−λk slog K)/dz_t = (ω_t/Σω) (q₃ z³ + q₂ z² + q₁ z + q₀)`. With `K = μ₄/μ₂² − 3` and `x = z − M1`,
    `dK/dz_t = (ω_t/Σω) [4 (x³ − μ₃)/μ₂² − 4 μ₄ x/μ₂³]`. The signed logarithm multiplies this by `−λk/(1 + |K|)`.

    Args:
        moments: Raw moments M1..M4, float [n] each.
        sharpness: The factor λk.

    Returns:
        The coefficients q₃, q₂, q₁, q₀, float [n, 4].
    """
    first, second, third, fourth = moments
    mean_square = first * first
    variance = second - mean_square
    centred = fourth - first * (4 * third - first * (6 * second - 3 * mean_square))
    square = (variance * variance).clamp_min(_tiny(variance))
    cubic = -4 * sharpness / ((1 + (centred / square - 3).abs()) * square)
    linear = -cubic * centred / variance
    constant = -cubic * (third - 3 * first * variance) - linear * first
    return torch.stack([cubic, -3 * cubic * first, 3 * cubic * mean_square + linear, constant], dim=1)


def apply_polynomial(values: Tensor, polynomial: Tensor, out: Tensor) -> Tensor:
    """Evaluate `q₃ z³ + q₂ z² + q₁ z + q₀` for each row.

    Args:
        values: Values z, float [n, T].
        polynomial: Coefficients, q₃ first, float [n, 4].
        out: Tensor for the result, float [n, T].

    Returns:
        The tensor `out`.
    """
    torch.addcmul(polynomial[:, 1:2], polynomial[:, 0:1], values, out=out)
    torch.addcmul(polynomial[:, 2:3], out, values, out=out)
    return torch.addcmul(polynomial[:, 3:4], out, values, out=out)


def _tiny(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).tiny
