"""A rank-one edit is the key times the concept's direction, on the neurons that its locator chose."""

from dataclasses import replace

import pytest
import torch
from tiny_targets import LOCATED, NEURONS, SCORED, change_of, target_of

from rotate_edit.edits.methods import Decimal, declaration, make_method
from rotate_edit.models.cost import ModelSize

ROWS = {
    "rank-one": list(range(NEURONS)),
    "rank-one-channels": list(LOCATED),
    "rank-one-lm-head": list(SCORED),
    "rank-one-random": None,
}


@pytest.mark.parametrize("method", ROWS)
def test_a_rank_one_edit_writes_the_direction_by_its_coefficients(method: str) -> None:
    seen = target_of(method)
    made = change_of(method, seen).at(2.0)
    assert seen.key is not None
    rows = ROWS[method]
    assert len(made.rows) == 3 if rows is None else made.rows.tolist() == rows
    assert torch.equal(made.rows, seen.rows)
    torch.testing.assert_close(made.delta(), -2.0 * torch.outer(seen.key, seen.direction.write))


@pytest.mark.parametrize("method", ROWS)
def test_without_a_key_nothing_is_changed(method: str) -> None:
    assert make_method(method).change(replace(target_of(method), key=None)) is None


@pytest.mark.parametrize("method", ROWS)
def test_it_writes_what_neurons_write_and_a_search_varies_its_ridge(method: str) -> None:
    assert declaration(method).writes == {"out"}
    space = make_method(method).search_space(ModelSize(6, NEURONS, 16, 200, 10_000))
    assert space == {"key_ridge": Decimal(0.001, 1.0, log=True)}
    low, high = space["key_ridge"].low, space["key_ridge"].high
    assert low < make_method(method).settings["key_ridge"] < high
    assert make_method(method, {"key_ridge": low}).settings == {"key_ridge": low}
