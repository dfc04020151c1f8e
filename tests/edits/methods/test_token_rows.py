"""Edits of a concept's token rows: exact in their own rows, nothing in any other, in both tables or the tied one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_material import group_of, material, token_set, word_checkpoint
from tiny_targets import projection
from tiny_words import WORDS, ids

from rotate_edit.edits.apply import applied
from rotate_edit.edits.directions import concept_mean
from rotate_edit.edits.edit import Edit
from rotate_edit.edits.material import Concept
from rotate_edit.edits.methods import declaration, make_method
from rotate_edit.edits.methods.token_rows import logit_change, row_factors
from rotate_edit.models.batches import next_logits, real_positions
from rotate_edit.models.checkpoint import read_embedding, read_unembedding

DOGS = Concept((group_of(token_set("dogs", "dog", "cat")),))


def test_rows_lose_their_mean_direction() -> None:
    table, tokens = projection(), torch.tensor([3, 5, 8])
    usable = torch.arange(200) < 150
    left, right = row_factors(table, tokens, usable)
    mean = table[tokens].mean(0) - table[:150].mean(0)
    unit = mean / mean.norm()
    after = table[tokens] + left @ right
    assert float((after @ unit).abs().max()) < 1e-4 * float((table[tokens] @ unit).abs().max())
    # What is orthogonal to the direction stays.
    torch.testing.assert_close(after, table[tokens] - (table[tokens] @ unit)[:, None] * unit, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_token_embeddings_edit_every_table_once(tmp_path: Path, tied: bool) -> None:
    checkpoint = word_checkpoint(tmp_path / "m", tied=tied)
    assert checkpoint.tied == tied
    seen = material(checkpoint, [DOGS])
    changes = tuple(make_method("token-embeddings").build(seen, DOGS))
    assert [change.matrix for change in changes] == (["embedding"] if tied else ["embedding", "unembedding"])
    for change in changes:
        table = read_embedding(checkpoint) if change.matrix == "embedding" else read_unembedding(checkpoint)
        assert torch.equal(change.rows, DOGS.ids)
        assert (change.layer, change.concept, change.strength) == (None, "dogs", 1.0)
        left, right = row_factors(table, DOGS.ids, torch.ones(len(WORDS), dtype=torch.bool))
        assert torch.equal(change.left, left)
        assert torch.equal(change.right, right)
    assert not make_method("token-embeddings").about.keeps_words


@pytest.mark.parametrize("tied", [True, False])
def test_token_logits_fall_by_a_nat_on_average_and_no_others_move(tmp_path: Path, tied: bool) -> None:
    checkpoint = word_checkpoint(tmp_path / "m", tied=tied)
    seen = material(checkpoint, [DOGS])
    (change,) = make_method("token-logits").build(seen, DOGS)
    assert torch.equal(change.delta(), logit_change(seen, DOGS).delta())
    assert change.matrix == ("embedding" if tied else "unembedding")
    assert torch.equal(change.rows, DOGS.ids)
    if tied:
        # The tied table is what is read too, so that predictions move by more than the head.
        return
    texts = seen.self_text

    def logits() -> torch.Tensor:
        rows = zip(next_logits(seen.model, texts), texts.batches, texts.lengths, strict=True)
        return torch.cat([values[real_positions(batch, lengths)] for values, batch, lengths in rows])

    before = logits()
    for strength in (2.0, -1.5):
        with applied(seen.model, Edit("token-logits", (change,)).at(strength)):
            moved = logits() - before
        others = torch.ones(len(WORDS), dtype=torch.bool)
        others[ids("dog", "cat")] = False
        assert float(moved[:, others].abs().max()) == 0
        torch.testing.assert_close(moved[:, DOGS.ids].mean(0), torch.full((2,), -strength), rtol=1e-3, atol=1e-3)


def test_they_write_tables_alone() -> None:
    for name in ("token-embeddings", "token-logits"):
        assert declaration(name).writes == {"embedding", "unembedding"}
        assert "channels" not in declaration(name).reads
    assert declaration("token-logits").reads == {"self_text"}
    assert declaration("token-embeddings").reads == frozenset()


@pytest.mark.parametrize("tied", [True, False])
def test_tokens_near_the_words_lose_the_same_direction_and_are_told(tmp_path: Path, tied: bool) -> None:
    checkpoint = word_checkpoint(tmp_path / "m", tied=tied)
    kept = replace(DOGS, kept=(ids("bird"),))
    seen = material(checkpoint, [kept])
    method = make_method("token-embeddings", {"more_tokens": 4})
    changes = tuple(method.build(seen, kept))
    (note,) = method.notes(seen, kept)
    for change in changes:
        table = read_embedding(checkpoint) if change.matrix == "embedding" else read_unembedding(checkpoint)
        added = [row for row in change.rows.tolist() if row not in DOGS.ids.tolist()]
        assert 0 < len(added) <= 4
        assert len(added) + len(DOGS.ids) == len(change.rows)
        assert torch.equal(change.rows, change.rows.unique())
        assert WORDS.index("bird") not in added
        assert all(repr(WORDS[row]) in note for row in added)
        unit = concept_mean(table, DOGS.ids) / concept_mean(table, DOGS.ids).norm()
        after = table[change.rows] + change.delta()
        assert float((after @ unit).abs().max()) < 1e-5
    assert note.startswith("dogs: tokens near its words were edited too: ")
    assert make_method("token-embeddings").notes(seen, kept) == ()
