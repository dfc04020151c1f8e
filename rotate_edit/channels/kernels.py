"""Triton kernels for what lies between the solver's two products on a CUDA device. Maths only.

The products themselves are left to cuBLAS; each kernel reads the two projections once and does in one pass what the
plain tensor code of `batch.py` does in about ten: the ten mixed moments after the first product, the turn and the
gradient polynomial before the second. The plain code is the oracle they are tested against. Importing this file needs
Triton; with TRITON_INTERPRET=1 the kernels run on the CPU as well.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
SPLIT = 16 * BLOCK
"""Tokens one program goes through for the moments: enough programs for the device, few partial sums to add."""


# Triton gives annotations a meaning of its own, so the kernels' arguments carry none but `constexpr`.
@triton.jit
def _moments(  # type: ignore[no-untyped-def]
    a_start, b_start, weights_start, sums_start, tokens, row_stride, SPLIT: tl.constexpr, BLOCK: tl.constexpr
):
    """Ten partial sums `Σ ω aⁱ bʲ` of one row over one split of the tokens, float32 accumulation in every lane."""
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
    """`a ← a cos θ + b sin θ`, `b ← ω (q₃ a³ + q₂ a² + q₁ a + q₀)` for one block of one row."""
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
    """The ten sums `Σ ω aⁱ bʲ` with j ≥ 1 of each row, float32 [n, 10]; a, b: float32 [n, T] of one stride; ω: [T]."""
    rows, tokens = a.shape
    splits = triton.cdiv(tokens, SPLIT)
    sums = torch.empty(rows, splits, 10, dtype=torch.float32, device=a.device)
    _moments[(rows, splits)](a, b, weights, sums, tokens, a.stride(0), SPLIT=SPLIT, BLOCK=BLOCK)
    return sums.double().sum(dim=1).float() if splits > 1 else sums[:, 0]


def turn_and_slope(a: Tensor, b: Tensor, weights: Tensor, cos: Tensor, sin: Tensor, polynomial: Tensor) -> None:
    """In place: a [n, T] becomes the projection at the angle, b [n, T] the weighted gradient polynomial there.

    cos, sin: [n, 1]; polynomial: [n, 4], q₃ first; everything float32, a and b of one stride.
    """
    rows, tokens = a.shape
    numbers = torch.cat([cos, sin, polynomial], dim=1).contiguous()
    _turn[(rows, triton.cdiv(tokens, BLOCK))](a, b, weights, numbers, tokens, a.stride(0), BLOCK=BLOCK)
