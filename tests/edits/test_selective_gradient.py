"""Flattening a gradient, cutting it to a rank and choosing its rows follow their formulas."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rotate_edit.edits.selective_gradient import largest_part, strongest_rows, without_common


def matrix(seed: int, rows: int = 24, columns: int = 16) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@given(seed=st.integers(0, 1000), rows=st.integers(2, 40), common=st.integers(1, 30))
@settings(max_examples=30, deadline=None)
def test_the_largest_singular_values_are_turned_round(seed: int, rows: int, common: int) -> None:
    """The papers' two steps, one on each side, leave S_q^2 / S_i of the first q singular values and the others."""
    gradient = matrix(seed, rows).double()
    outer, sizes, inner = torch.linalg.svd(gradient, full_matrices=False)
    kept = min(common, min(gradient.shape) - 1)
    ratio = sizes[:kept] / sizes[kept - 1]
    shrink = torch.diag(1 - 1 / ratio)
    once = gradient - gradient @ inner[:kept].T @ shrink @ inner[:kept]
    twice = once - outer[:, :kept] @ shrink @ outer[:, :kept].T @ once
    torch.testing.assert_close(without_common(gradient, common).double(), twice, atol=1e-5, rtol=1e-5)
    found = torch.linalg.svdvals(without_common(gradient, common).double())
    assert float(found[0]) <= float(sizes[kept - 1]) * (1 + 1e-5)


def test_nothing_is_flattened_where_nothing_is_asked() -> None:
    gradient = matrix(0)
    assert torch.equal(without_common(gradient, 0), gradient)
    assert torch.equal(without_common(gradient[:1], 5), gradient[:1])
    assert torch.equal(without_common(torch.zeros(4, 3), 2), torch.zeros(4, 3))


def test_the_largest_part_is_the_best_of_its_rank() -> None:
    change = matrix(1)
    outer, sizes, inner = torch.linalg.svd(change)
    for rank in (1, 5, 16, 99):
        left, right = largest_part(change, rank)
        kept = min(rank, 16)
        assert (left.shape, right.shape) == ((24, kept), (kept, 16))
        best = outer[:, :kept] @ torch.diag(sizes[:kept]) @ inner[:kept]
        torch.testing.assert_close(left @ right, best, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(right @ right.T, torch.eye(kept), atol=1e-5, rtol=0)
        torch.testing.assert_close(left.square().sum(), sizes[:kept].square().sum(), rtol=1e-5, atol=0)


def test_the_strongest_rows_are_chosen_over_all_matrices() -> None:
    first, second = torch.zeros(6, 4), torch.zeros(4, 4)
    first[4], second[[0, 3]] = 2.0, torch.tensor([[3.0], [1.0]])
    assert [rows.tolist() for rows in strongest_rows([first, second], 0.2)] == [[4], [0]]
    assert [rows.tolist() for rows in strongest_rows([first, second], 0.3)] == [[4], [0, 3]]
    assert [rows.tolist() for rows in strongest_rows([first, second], 1e-9)] == [[], [0]]
    assert [len(rows) for rows in strongest_rows([first, second], 1.0)] == [6, 4]
    assert strongest_rows([], 0.5) == []
