"""Sums of changes, distinct directions, and a single rounding."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rotate_edit.edits.edit import MatrixChange
from rotate_edit.edits.totals import distinct_directions, rounded, total_changes


def change(rows: list[int], right: torch.Tensor, strength: float, seed: int, matrix: str = "out") -> MatrixChange:
    left = torch.randn(len(rows), len(right), generator=torch.Generator().manual_seed(seed))
    return MatrixChange(matrix, 1, None, torch.tensor(rows), left, right, strength, "test")


def test_total_is_the_sum_and_counts_directions_once() -> None:
    shared, own = torch.randn(1, 8), torch.randn(2, 8)
    changes = [
        change([1, 4, 6], shared, 1.5, 1),
        change([0, 4], torch.cat([own, shared]), -2.0, 2),
        change([6, 7], torch.cat([shared, shared]), 3.3, 3),
        change([2], own, 1.0, 4, matrix="in"),
    ]
    totals = total_changes(changes)
    assert [total.matrix for total in totals] == ["out", "in"]
    total = totals[0]
    assert total.rows.tolist() == [0, 1, 4, 6, 7]
    assert total.right.shape == (3, 8)
    dense = torch.zeros(9, 8, dtype=torch.float64)
    for part in changes[:3]:
        dense[part.rows] += part.strength * (part.left.double() @ part.right.double())
    assert torch.allclose(total.left @ total.right, dense[total.rows], atol=1e-14)
    assert dense[[2, 3, 5, 8]].abs().max() == 0


def test_distinct_directions_keep_the_product() -> None:
    rights = [torch.randn(2, 5).double(), torch.randn(1, 5).double()]
    rights.append(torch.cat([rights[0][1:], rights[1]]))
    lefts = [torch.randn(3, 2).double(), torch.randn(4, 1).double(), torch.randn(2, 2).double()]
    left, right = distinct_directions(lefts, rights)
    assert right.shape == (3, 5)
    expected = torch.cat([a @ b for a, b in zip(lefts, rights, strict=True)])
    assert torch.allclose(left @ right, expected, atol=1e-14)


def nearest_16_bit(value: float, mantissa: int, smallest: int) -> float:
    """The nearest number with `mantissa` fraction bits and exponents from `smallest`, ties to even, by integers."""
    if value == 0:
        return 0.0
    exponent = max(int(np.floor(np.log2(abs(value)))), smallest)
    while abs(value) >= 2.0 ** (exponent + 1):
        exponent += 1
    unit = 2.0 ** (exponent - mantissa)
    return float(np.round(value / unit)) * unit


@given(st.floats(-1e4, 1e4, allow_subnormal=False), st.sampled_from([torch.bfloat16, torch.float16]), st.data())
def test_rounding_is_single(value: float, dtype: torch.dtype, data: st.DataObject) -> None:
    """Near ties, where rounding by way of float32 goes wrong, too."""
    mantissa, smallest = (7, -126) if dtype == torch.bfloat16 else (10, -14)
    low = nearest_16_bit(value, mantissa, smallest)
    tie = low + 2.0 ** (max(int(np.floor(np.log2(max(abs(low), 2.0**smallest)))), smallest) - mantissa - 1)
    nudge = data.draw(st.sampled_from([0.0, 1e-13, -1e-13, 1e-10, -1e-10, 1e-6, -1e-6]))
    for number in (value, tie * (1 + nudge)):
        found = float(rounded(torch.tensor([number], dtype=torch.float64), dtype))
        assert found == nearest_16_bit(number, mantissa, smallest)


def test_two_roundings_would_differ_here() -> None:
    """1 + 2^-8 + 2^-40 lies above the tie between 1 and 1 + 2^-7 in bfloat16, but float32 rounds it onto the tie."""
    value = torch.tensor([1 + 2.0**-8 + 2.0**-40, -(1 + 2.0**-8 + 2.0**-40)], dtype=torch.float64)
    assert value.float().bfloat16().tolist() == [1.0, -1.0]
    assert rounded(value, torch.bfloat16).tolist() == [1 + 2.0**-7, -(1 + 2.0**-7)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_stored_number_rounds_to_itself(dtype: torch.dtype) -> None:
    if dtype in (torch.float16, torch.bfloat16):
        values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    else:
        values = torch.randn(10_000, dtype=dtype) * 10.0 ** torch.randint(-30, 30, (10_000,))
    found = rounded(values.double(), dtype)
    assert torch.equal(found.nan_to_num(), values.nan_to_num())
    assert torch.equal(found.isnan(), values.isnan())
