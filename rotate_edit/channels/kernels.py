"""Triton kernels for the work between the solver's two products on a CUDA device.

This is maths only. The products themselves are left to cuBLAS. Each kernel reads the two projections once and does in
one pass what the plain tensor code of `batch.py` does in about ten. One kernel computes the ten mixed moments after the
first product. The other computes the turn and the gradient polynomial before the second.

The kernels are tested against the plain code. Importing this file needs Triton. With TRITON_INTERPRET=1 the kernels run
on the CPU as well.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
SPLIT = 16 * BLOCK
"""Number of tokens that one program goes through for the moments.

It gives enough programs for the device and few partial sums to add.
"""


# Triton gives annotations a meaning of its own, so the kernels' arguments carry none but `constexpr`.
@triton.jit
def _moments(  # type: ignore[no-untyped-def]
    a_start, b_start, weights_start, sums_start, tokens, row_stride, SPLIT: tl.constexpr, BLOCK: tl.constexpr
):
    """Compute ten partial sums `Σ ω aⁱ bʲ` of one row over one split of the tokens, in float32 in every lane."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    s01 = tl.zeros((BLOCK,), tl.float32)
    s11, s02 = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    s21, s12, s03 = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    s31, s22 = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    s13, s04 = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, SPLIT, BLOCK):
        places = split * SPLIT + start + tl.arange(0, BLOCK)
        inside = places < tokens
        a = tl.load(a_start + row * row_stride + places, mask=inside, other=0.0)
        b = tl.load(b_start + row * row_stride + places, mask=inside, other=0.0)
        weights = tl.load(weights_start + places, mask=inside, other=0.0)
        ab, bb, weighted = a * b, b * b, b * weights
        s01 += weighted
        s11 += a * weighted
        s02 += b * weighted
        s21 += a * a * weighted
        s12 += ab * weighted
        s03 += bb * weighted
        s31 += a * a * a * weighted
        s22 += a * ab * weighted
        s13 += a * bb * weighted
        s04 += b * bb * weighted
    target = sums_start + (row * tl.num_programs(1) + split) * 10
    tl.store(target + 0, tl.sum(s01, axis=0))
    tl.store(target + 1, tl.sum(s11, axis=0))
    tl.store(target + 2, tl.sum(s02, axis=0))
    tl.store(target + 3, tl.sum(s21, axis=0))
    tl.store(target + 4, tl.sum(s12, axis=0))
    tl.store(target + 5, tl.sum(s03, axis=0))
    tl.store(target + 6, tl.sum(s31, axis=0))
    tl.store(target + 7, tl.sum(s22, axis=0))
    tl.store(target + 8, tl.sum(s13, axis=0))
    tl.store(target + 9, tl.sum(s04, axis=0))


@triton.jit
def _turn(  # type: ignore[no-untyped-def]
    a_start, b_start, weights_start, numbers_start, tokens, row_stride, BLOCK: tl.constexpr
):
    """Set `a ← a cos θ + b sin θ` and `b ← ω (q₃ a³ + q₂ a² + q₁ a + q₀)` for one block of one row."""
    row = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = places < tokens
    numbers = numbers_start + row * 6
    cos, sin = tl.load(numbers), tl.load(numbers + 1)
    cubic, square = tl.load(numbers + 2), tl.load(numbers + 3)
    linear, constant = tl.load(numbers + 4), tl.load(numbers + 5)
    a = tl.load(a_start + row * row_stride + places, mask=inside, other=0.0)
    b = tl.load(b_start + row * row_stride + places, mask=inside, other=0.0)
    weights = tl.load(weights_start + places, mask=inside, other=0.0)
    turned = cos * a + sin * b
    slope = ((cubic * turned + square) * turned + linear) * turned + constant
    tl.store(a_start + row * row_stride + places, turned, mask=inside)
    tl.store(b_start + row * row_stride + places, slope * weights, mask=inside)


def mixed_sums(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """Compute the ten sums `Σ ω aⁱ bʲ` with j ≥ 1 of each row.

    Args:
        a: Projections of the points, float32 [n, T].
        b: Projections of the directions, float32 [n, T], with the stride of `a`.
        weights: Weights ω, float32 [T].

    Returns:
        The sums, float32 [n, 10].
    """
    rows, tokens = a.shape
    splits = triton.cdiv(tokens, SPLIT)
    sums = torch.empty(rows, splits, 10, dtype=torch.float32, device=a.device)
    _moments[(rows, splits)](a, b, weights, sums, tokens, a.stride(0), SPLIT=SPLIT, BLOCK=BLOCK)
    return sums.double().sum(dim=1).float() if splits > 1 else sums[:, 0]


def turn_and_slope(a: Tensor, b: Tensor, weights: Tensor, cos: Tensor, sin: Tensor, polynomial: Tensor) -> None:
    """Turn projections by an angle and compute the weighted gradient polynomial there, in place.

    Args:
        a: Projections of the points, float32 [n, T]. It becomes the projection at the angle.
        b: Projections of the directions, float32 [n, T], with the stride of `a`. It becomes the weighted polynomial.
        weights: Weights ω, float32 [T].
        cos: Cosine of each row's angle, float32 [n, 1].
        sin: Sine of each row's angle, float32 [n, 1].
        polynomial: Coefficients, q₃ first, float32 [n, 4].
    """
    rows, tokens = a.shape
    numbers = torch.cat([cos, sin, polynomial], dim=1).contiguous()
    _turn[(rows, triton.cdiv(tokens, BLOCK))](a, b, weights, numbers, tokens, a.stride(0), BLOCK=BLOCK)
