"""A direction out of located neurons: removed from exactly those, kept by the others, weighted by the layer."""

import pytest
import torch
from tiny_targets import LOCATED, NEURONS, SCORED, change_of, edited, target_of

from rotate_edit.edits.methods import declaration

EVERY = list(range(NEURONS))
CASES = [
    ("channel-located", list(LOCATED), "direction"),
    ("lm-head-located", list(SCORED), "direction"),
    ("direction-everywhere", EVERY, "mean_direction"),
    ("least-collateral-everywhere", EVERY, "direction"),
]


@pytest.mark.parametrize(("method", "rows", "direction"), CASES)
def test_strength_one_removes_the_concept_from_exactly_the_chosen_rows(
    method: str, rows: list[int], direction: str
) -> None:
    seen = target_of(method)
    read = getattr(seen, direction).read
    after = edited(method, seen)
    assert (after[rows] @ read).abs().max() < 1e-5 * (seen.vectors @ read).abs().max()
    others = [row for row in EVERY if row not in rows]
    assert torch.equal(after[others], seen.vectors[others])
    assert torch.equal(change_of(method, seen).right[0], getattr(seen, direction).write)


def test_random_neurons_lose_the_direction_and_no_others_do() -> None:
    seen = target_of("random-neurons")
    after = edited("random-neurons", seen)
    assert (after[seen.rows] @ seen.direction.read).abs().max() < 1e-4 * (
        seen.vectors @ seen.direction.read
    ).abs().max()
    others = [row for row in EVERY if row not in seen.rows.tolist()]
    assert torch.equal(after[others], seen.vectors[others])


def test_amplifying_raises_the_reading_and_suppressing_lowers_it() -> None:
    seen = target_of("channel-located")
    rows, read = seen.rows, seen.direction.read
    before = seen.vectors[rows] @ read
    torch.testing.assert_close(edited("channel-located", seen, -2.0)[rows] @ read, 3 * before)
    torch.testing.assert_close(edited("channel-located", seen, 2.0)[rows] @ read, -before)


@pytest.mark.parametrize("matrix", ["gate", "in", "out"])
def test_every_kind_of_matrix_is_treated_alike(matrix: str) -> None:
    for method, *_ in CASES:
        assert matrix in declaration(method).writes
        made, same = (change_of(method, target_of(method, matrix=kind)) for kind in (matrix, "out"))
        torch.testing.assert_close(made.delta(), same.delta())


def test_layer_kernel_is_a_triangle_as_heretic_writes_it() -> None:
    # Six layers: the peak lies at layer 4 (0.8 of 5), three layers (0.6 of 5) away the weight is zero.
    weights = []
    for layer in range(6):
        seen = target_of("layer-kernel", layer=layer)
        change = edited("layer-kernel", seen) - seen.vectors
        full = edited("direction-everywhere", seen) - seen.vectors
        weights.append(float(change.norm() / full.norm()))
        if weights[-1] > 1e-6:
            torch.testing.assert_close(change, weights[-1] * full, atol=1e-5, rtol=1e-5)
    assert weights == pytest.approx([0, 0, 1 / 3, 2 / 3, 1, 2 / 3], abs=1e-6)
