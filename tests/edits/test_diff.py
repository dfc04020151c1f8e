"""The figures of a diff are those of the dense change."""

from pathlib import Path

import pytest
import torch
from tiny_models import random_edit, save_tiny

from rotate_edit.edits.diff import diff
from rotate_edit.edits.edit import Edit, MatrixChange
from rotate_edit.models.checkpoint import open_checkpoint, read_matrix


def test_diff_of_random_edits(tmp_path: Path) -> None:
    base = open_checkpoint(save_tiny("mixtral", tmp_path / "m", tied=False, dtype=torch.float32))
    edit = random_edit(base)
    rows, alone = diff(edit, base), diff(edit)
    assert [row.address for row in rows] == [row.address for row in alone]
    assert {"L1.E3.gate", "L0.E0.out", "embedding", "unembedding"} <= {row.address for row in rows}
    assert all(row.tensor is None and row.relative is None for row in alone)
    for row in rows:
        dense = torch.zeros(200, 32, dtype=torch.float64)
        for change in edit.changes:
            expert = "" if change.expert is None else f".E{change.expert}"
            if row.address in (change.matrix, f"L{change.layer}{expert}.{change.matrix}"):
                dense[change.rows] += change.strength * change.left.double() @ change.right.double()
        assert row.rows == int((dense != 0).any(1).sum())
        assert row.rank == int(torch.linalg.matrix_rank(dense))
        assert row.largest == pytest.approx(float(dense.abs().max()), rel=1e-12)
        assert row.norm == pytest.approx(float(dense.norm()), rel=1e-12)
        if row.address == "L1.E0.out":
            assert row.relative == pytest.approx(row.norm / float(read_matrix(base, 1, "out", 0).norm()), rel=1e-6)
            assert row.tensor == "model.layers.1.block_sparse_moe.experts.0.w2.weight"


def test_many_rows_are_summed_in_parts() -> None:
    left, right = torch.randn(3000, 1), torch.randn(1, 4)
    (row,) = diff(Edit("t", (MatrixChange("unembedding", None, None, torch.arange(3000), left, right, 1.0, "c"),)))
    assert row.norm == pytest.approx(float(left.double().norm() * right.double().norm()), rel=1e-12)
    assert row.rows == 3000
