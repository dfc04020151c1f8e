"""Edits along a concept's gradient: their formula, their size, their words, and both parts of the joint edit."""

from pathlib import Path

import pytest
import torch
from tiny_material import ABOUT, group_of, material, token_set, tokenised, word_checkpoint

from rotate_edit.edits.apply import applied
from rotate_edit.edits.build import build_edits
from rotate_edit.edits.edit import Edit
from rotate_edit.edits.material import Concept
from rotate_edit.edits.methods import make_method
from rotate_edit.edits.methods.selective_gradient import SIZE
from rotate_edit.edits.selective_gradient import without_common
from rotate_edit.errors import BadInput
from rotate_edit.models.batches import log_probabilities
from rotate_edit.models.checkpoint import Checkpoint, read_matrix
from rotate_edit.models.cost import size_of
from rotate_edit.models.gradients import likelihood_gradients

DOGS = Concept((group_of(token_set("dogs", "dog", "cat")),))
ALL = ("gate", "in", "out")


def built(checkpoint: Checkpoint, name: str = "selective-gradient", **settings: object) -> Edit:
    return build_edits(material(checkpoint, [DOGS], matrices=ALL), [make_method(name, settings)])[name]


def sizes(edit: Edit, checkpoint: Checkpoint) -> tuple[float, float]:
    """Frobenius norms of all neuron changes together and of the matrices."""
    changes = [change for change in edit.changes if change.layer is not None]
    matrices = [read_matrix(checkpoint, change.layer, change.matrix) for change in changes]
    return (
        sum(float(change.delta().double().square().sum()) for change in changes) ** 0.5,
        sum(float(matrix.double().square().sum()) for matrix in matrices) ** 0.5,
    )


def test_every_matrix_moves_against_its_own_flattened_gradient(tmp_path: Path) -> None:
    checkpoint = word_checkpoint(tmp_path / "m")
    edit = built(checkpoint, common=0.25, rank=16)
    assert {(change.matrix, change.layer) for change in edit.changes} == {(m, layer) for m in ALL for layer in (0, 1)}
    seen = material(checkpoint, [DOGS], matrices=ALL)
    names = [(change.matrix, change.layer, None) for change in edit.changes]
    gradients = likelihood_gradients(seen.model, tokenised(ABOUT), names)
    scales = []
    for change, gradient in zip(edit.changes, gradients.values(), strict=True):
        wanted = -without_common(gradient, 4)
        delta = change.delta()
        scales.append(float(delta.norm() / wanted.norm()))
        torch.testing.assert_close(delta / scales[-1], wanted, atol=1e-4 * float(wanted.abs().max()), rtol=1e-3)
    assert scales == pytest.approx([scales[0]] * 6, rel=1e-4)
    assert edit.notes == (
        "dogs: rank 16 holds 100% of the gradient's change (of its squared size); the rest is left out.",
    )


def test_strength_1_is_a_thousandth_of_the_matrices_whatever_the_rank(tmp_path: Path) -> None:
    checkpoint = word_checkpoint(tmp_path / "m")
    for settings in ({}, {"rank": 2}, {"skip_words": True}):
        edit = built(checkpoint, **settings)
        moved, matrices = sizes(edit, checkpoint)
        assert moved == pytest.approx(SIZE * matrices, rel=1e-4)
        assert all(len(change.right) == min(settings.get("rank", 16), 16) for change in edit.changes)


def test_it_lowers_the_text_and_amplifies_it_below_zero(tmp_path: Path) -> None:
    checkpoint = word_checkpoint(tmp_path / "m")
    seen = material(checkpoint, [DOGS], matrices=ALL)

    def likelihood() -> float:
        texts, total = tokenised(ABOUT), 0.0
        for predicted, batch, lengths in zip(
            log_probabilities(seen.model, texts), texts.batches, texts.lengths, strict=True
        ):
            for row, length in enumerate(lengths.tolist()):
                total += float(predicted[row, : length - 1].gather(1, batch[row, 1:length, None]).sum())
        return total

    before = likelihood()
    for name in ("selective-gradient", "remove-concept"):
        edit = build_edits(seen, [make_method(name)])[name]
        found = []
        for strength in (4.0, -4.0):
            with applied(seen.model, edit.at(strength)):
                found.append(likelihood())
        assert found[0] < before < found[1]


def test_a_share_of_the_neurons_is_changed_alone(tmp_path: Path) -> None:
    checkpoint = word_checkpoint(tmp_path / "m")
    whole, some = built(checkpoint, rank=16), built(checkpoint, rank=16, neurons=0.1)
    assert sum(len(change.rows) for change in some.changes) == round(0.1 * 6 * 24)
    strongest = torch.cat([change.delta().norm(dim=1) for change in whole.changes]).topk(14).values
    kept = {(change.matrix, change.layer): change for change in whole.changes}
    same = torch.cat([kept[c.matrix, c.layer].delta().norm(dim=1)[c.rows] for c in some.changes])
    torch.testing.assert_close(same.sort().values, strongest.sort().values)


def test_the_joint_edit_is_the_sum_of_its_parts(tmp_path: Path) -> None:
    checkpoint = word_checkpoint(tmp_path / "m")
    joint = built(checkpoint, "remove-concept", rows=0.5, rows_most=2.0)
    alone = built(checkpoint)
    rows = built(checkpoint, "token-embeddings")
    tables = [change for change in joint.changes if change.layer is None]
    assert [change.matrix for change in tables] == ["embedding", "unembedding"]
    for change, own in zip(tables, rows.changes, strict=True):
        torch.testing.assert_close(change.at(3.0).delta(), own.at(1.5).delta())
        # The rows stop where they are turned round as far as is set; the gradient goes on.
        torch.testing.assert_close(change.at(9.0).delta(), own.at(2.0).delta())
    rest = joint.changes[len(tables) :]
    assert [change.at(9.0).strength for change in rest] == [9.0] * 6
    for change, own in zip(rest, alone.changes, strict=True):
        assert torch.equal(change.delta(), own.delta())
    assert all(change.layer is not None for change in built(checkpoint, "remove-concept", rows=0.0).changes)
    assert len(built(checkpoint, "remove-concept", more_tokens=3).notes) == 2


def test_it_needs_text_and_costs_what_it_reads(tmp_path: Path) -> None:
    checkpoint = word_checkpoint(tmp_path / "m")
    cost = make_method("selective-gradient").cost(size_of(checkpoint), 48_000)
    assert cost.operations > 0
    assert cost.memory > 2 * 4 * 6 * 24 * 16
    for key, value in (("common", 1.0), ("rank", 0), ("neurons", 0), ("skip_words", "some")):
        with pytest.raises(BadInput, match=f"the setting {key} of"):
            make_method("selective-gradient", {key: value})
