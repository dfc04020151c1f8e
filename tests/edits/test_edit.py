"""An edit is data: its strength is one factor, and a concept's part can be taken out of it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rotate_edit.edits.edit import Clamp, Edit, EditedVector, MatrixChange


def change(concept: str, seed: int = 0, strength: float = 1.0) -> MatrixChange:
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(3, 2, generator=generator), torch.randn(2, 5, generator=generator)
    return MatrixChange("out", 1, None, torch.tensor([0, 2, 6]), left, right, strength, concept)


def clamp(concept: str) -> Clamp:
    return Clamp(1, torch.tensor([3]), torch.tensor([0.5]), 1.0, concept)


def vector(concept: str) -> EditedVector:
    return EditedVector("L1.N2", "out", concept, ("L1.N2.out#0",), 3.0, 0.9, 1.0, 0.8)


EDIT = Edit(
    "test", (change("dogs"), change("cats", 1, 2.0), change("dogs", 2)), (vector("dogs"), vector("cats")),
    clamps=(clamp("birds"), clamp("cats")),
)  # fmt: skip


@given(st.floats(-1e3, 1e3))
def test_a_change_is_linear_in_its_strength(strength: float) -> None:
    made = change("dogs")
    torch.testing.assert_close(made.at(strength).delta(), strength * made.left @ made.right)


def test_one_strength_for_all_parts_replaces_theirs() -> None:
    edit = EDIT.at(0.5)
    assert [part.strength for part in (*edit.changes, *edit.clamps)] == 5 * [0.5]
    torch.testing.assert_close(edit.changes[1].delta(), 0.25 * EDIT.changes[1].delta())
    assert all(new.left is old.left for new, old in zip(edit.changes, EDIT.changes, strict=True))
    assert edit.at(1.0).at(2.0).changes[1].strength == 2.0


def test_strengths_by_concept_leave_the_others_alone() -> None:
    edit = EDIT.at({"cats": -3.0, "fish": 9.0})
    assert [part.strength for part in edit.changes] == [1.0, -3.0, 1.0]
    assert [part.strength for part in edit.clamps] == [1.0, -3.0]


def test_a_bounded_change_goes_no_further_than_its_bound() -> None:
    bounded = Edit("test", (replace(change("dogs"), most=0.75), change("cats")))
    for strength, reached in ((0.5, 0.5), (2.0, 0.75), (-4.0, -4.0)):
        assert [part.strength for part in bounded.at(strength).changes] == [reached, strength]
        assert bounded.at({"dogs": strength}).changes[0].strength == reached


def test_concepts_are_named_once_in_the_order_of_their_changes() -> None:
    assert EDIT.concepts == ("dogs", "cats", "birds")
    assert Edit("test", ()).concepts == ()


def test_a_concepts_part_holds_all_that_is_its_own_and_no_more() -> None:
    parts = [EDIT.only(name) for name in EDIT.concepts]
    assert [len(part.changes) for part in parts] == [2, 1, 0]
    assert [len(part.vectors) for part in parts] == [1, 1, 0]
    assert [len(part.clamps) for part in parts] == [0, 1, 1]
    assert all(part.concepts == (name,) for part, name in zip(parts, EDIT.concepts, strict=True))
    assert sum((part.changes for part in parts), ()) == (EDIT.changes[0], EDIT.changes[2], EDIT.changes[1])
    assert EDIT.only("fish").concepts == ()


@pytest.mark.parametrize(
    ("edit", "does"),
    [(EDIT, True), (EDIT.only("birds"), True), (EDIT.only("dogs"), True), (EDIT.only("fish"), False)],
)
def test_an_edit_of_nothing_says_so(edit: Edit, does: bool) -> None:
    assert edit.does_something == does
