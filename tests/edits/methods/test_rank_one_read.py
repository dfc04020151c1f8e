"""The rank-one reading edit: nothing is left of what the concept adds, and other inputs are moved least."""

from pathlib import Path

import pytest
import torch
from tiny_material import ABOUT, FREE, group_of, material, token_set, tokenised, word_checkpoint

from rotate_edit.edits.build import build_edits
from rotate_edit.edits.material import Concept
from rotate_edit.edits.methods import make_method
from rotate_edit.errors import BadInput
from rotate_edit.models.checkpoint import read_matrix
from rotate_edit.models.hooks import mlp_inputs

DOGS = Concept((group_of(token_set("dogs", "dog", "cat")),))
ALL = ("gate", "in", "out")


def test_nothing_is_left_of_what_the_concept_adds(tmp_path: Path) -> None:
    checkpoint = word_checkpoint(tmp_path / "m")
    seen = material(checkpoint, [DOGS], matrices=ALL)
    edit = build_edits(seen, [make_method("rank-one-read", {"depth": 1.0})])["rank-one-read"]
    assert [(c.matrix, c.layer) for c in edit.changes] == [("gate", 0), ("in", 0), ("gate", 1), ("in", 1)]
    own, rest = (mlp_inputs(seen.model, tokenised(texts), [0, 1]) for texts in (ABOUT, FREE))
    for change in edit.changes:
        vectors = read_matrix(checkpoint, change.layer, change.matrix)
        added = own[change.layer].mean - rest[change.layer].mean
        after = vectors + change.delta()
        assert float((after @ added).abs().max()) < 1e-5 * float((vectors @ added).abs().max())
        # No reading that is 1 along the same difference has a smaller (ridged) mean square over the other texts.
        second = rest[change.layer].second
        damped = second + 0.03 * second.diagonal().mean() * torch.eye(16)
        read = change.right[0]
        least = float(read @ damped @ read)
        for seed in range(5):
            other = read + 0.1 * torch.randn(16, generator=torch.Generator().manual_seed(seed))
            other = other / (other @ added)
            assert float(other @ damped @ other) >= least * (1 - 1e-5)


def test_the_moments_are_those_of_what_the_mlp_reads(tmp_path: Path) -> None:
    checkpoint = word_checkpoint(tmp_path / "m")
    seen = material(checkpoint, [DOGS])
    texts = tokenised(ABOUT)
    read: list[torch.Tensor] = []
    handle = seen.model.model.layers[1].mlp.register_forward_hook(lambda _, inputs, __: read.append(inputs[0]))
    found = mlp_inputs(seen.model, texts, [1])[1]
    handle.remove()
    rows = torch.cat(
        [row[:length] for part, lengths in zip(read, texts.lengths) for row, length in zip(part, lengths.tolist())]
    )
    torch.testing.assert_close(found.mean, rows.mean(0))
    torch.testing.assert_close(found.second, rows.T @ rows / len(rows))


def test_it_edits_the_first_layers_alone(tmp_path: Path) -> None:
    checkpoint = word_checkpoint(tmp_path / "m")
    seen = material(checkpoint, [DOGS], matrices=ALL)
    assert {change.layer for change in make_method("rank-one-read").build(seen, DOGS)} == {0}
    late = material(checkpoint, [DOGS], matrices=ALL, layers=[1])
    assert list(make_method("rank-one-read").build(late, DOGS)) == []
    with pytest.raises(BadInput, match="the setting depth of rank-one-read"):
        make_method("rank-one-read", {"depth": 0})
