"""Blocks of a rewritten tensor are its bytes in order with the edit in them, whatever their size."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import random_edit, save_tiny

from rotate_edit.edits.edit import Edit
from rotate_edit.edits.writing.patch import write_checkpoint
from rotate_edit.edits.writing.rewrite import Block, Rounding, plan_edit, rewritten
from rotate_edit.errors import BadInput
from rotate_edit.models.checkpoint import Checkpoint, open_checkpoint


@pytest.fixture(params=["llama", "mixtral", "gpt2", "phi3"], scope="module")
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("base") / "model"
    return open_checkpoint(save_tiny(request.param, folder, tied=False, dtype=torch.bfloat16))


@pytest.fixture(scope="module")
def edit(base: Checkpoint) -> Edit:
    return random_edit(base)


@pytest.fixture(scope="module")
def patched(base: Checkpoint, edit: Edit, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("patched") / "out"
    write_checkpoint(base, edit, folder)
    return open_checkpoint(folder)


def stored_bytes(checkpoint: Checkpoint, name: str) -> bytes:
    stored = checkpoint.stored[name]
    return checkpoint.path(stored.file).read_bytes()[stored.start : stored.end]


def content(blocks: Sequence[Block], *, new: bool) -> bytes:
    return b"".join((block.new if new else block.old).numpy().tobytes() for block in blocks)


@pytest.mark.parametrize("elements", [100, 1777])
def test_small_blocks_give_the_same_bytes(base: Checkpoint, edit: Edit, patched: Checkpoint, elements: int) -> None:
    touched = plan_edit(base, edit)
    assert touched
    for name, stored in base.stored.items():
        blocks = list(rewritten(base, name, touched.get(name, []), elements=elements))
        (whole,) = rewritten(base, name, touched.get(name, []))
        assert len(blocks) > 1 or stored.elements <= max(elements, stored.shape[-1])
        # The blocks follow one another from the tensor's first byte to its last.
        ends = [block.start + len(block.old) for block in blocks]
        assert [block.start for block in blocks] == [stored.start, *ends[:-1]]
        assert ends[-1] == stored.end
        assert content(blocks, new=False) == stored_bytes(base, name)
        assert content(blocks, new=True) == whole.new.numpy().tobytes() == stored_bytes(patched, name)
        total = sum((block.rounding for block in blocks), Rounding())
        assert (total.elements, total.unchanged) == (whole.rounding.elements, whole.rounding.unchanged)
        assert total.largest_error == whole.rounding.largest_error
        assert total.largest_change == whole.rounding.largest_change
        assert math.isclose(total.error_squares, whole.rounding.error_squares, rel_tol=1e-12)


def test_a_block_that_nothing_touches_is_not_copied(base: Checkpoint, edit: Edit) -> None:
    touched = plan_edit(base, edit)
    untouched = next(name for name in base.stored if name not in touched)
    assert all(block.new is block.old for block in rewritten(base, untouched, [], elements=64))
    name = base.place("embedding").name
    blocks = list(rewritten(base, name, touched[name], elements=base.hidden_size))
    # Rows 3 and 17 are edited; each line is a block here.
    assert [place for place, block in enumerate(blocks) if block.new is not block.old] == [3, 17]


def test_what_does_not_fit_is_refused(base: Checkpoint, edit: Edit) -> None:
    change = edit.changes[0]
    narrow = replace(change, right=change.right[:, 1:])
    far = replace(change, rows=torch.tensor([1, 4, 9, 100_000]))
    for made, words in ((narrow, "length 31"), (far, "row 100000")):
        with pytest.raises(BadInput, match=words):
            plan_edit(base, replace(edit, changes=(made,)))


def test_a_tied_table_is_one_tensor_of_both_changes(tmp_path: Path) -> None:
    tied = open_checkpoint(save_tiny("llama", tmp_path / "m", tied=True, dtype=torch.float32))
    changes = tuple(part for part in random_edit(tied).changes if "embedding" in part.matrix)
    touched = plan_edit(tied, Edit("test", changes))
    (name,) = touched
    (entry,) = touched[name]
    assert entry.rows.tolist() == [3, 17, 40, 95]
    assert entry.total is not None
    dense = torch.zeros(96, 32, dtype=torch.float64)
    for change in changes:
        dense[change.rows] += change.strength * (change.left.double() @ change.right.double())
    torch.testing.assert_close(entry.total.left @ entry.total.right, dense[entry.rows], rtol=1e-12, atol=1e-12)
