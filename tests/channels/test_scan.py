"""The scan against the projection itself in float64, over tile sizes, dead vectors and repeated tokens."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from places import SHARED
from torch import Tensor

from rotate_edit.channels.scan import concept_z, scan_checkpoint, scan_vectors, token_moments
from rotate_edit.errors import BadInput


def vocabulary(tokens: int, size: int, seed: int = 0) -> Tensor:
    """Token vectors with a common mean and unequal spread, as trained tables have."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(0.5, -1.0, size)
    return torch.randn(tokens, size, generator=generator) * spread + torch.randn(size, generator=generator)


def direct(vectors: Tensor, unembedding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z-scores, kurtosis and skewness of the whole projection in float64."""
    projection = vectors.double() @ unembedding.double().T
    centred = projection - projection.mean(1, keepdim=True)
    z = centred / centred.square().mean(1, keepdim=True).sqrt()
    return z, z.pow(4).mean(1) - 3, z.pow(3).mean(1)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(20, 900),
    count=st.integers(1, 40),
    top=st.integers(1, 20),
    chunk=st.integers(1, 1000),
    block=st.integers(1, 50),
    seed=st.integers(0, 5),
)
def test_any_tiling_gives_the_direct_result(
    tokens: int, count: int, top: int, chunk: int, block: int, seed: int
) -> None:
    unembedding = vocabulary(tokens, 24, seed)
    vectors = torch.randn(count, 24, generator=torch.Generator().manual_seed(seed + 100))
    found = scan_vectors(vectors, unembedding, top=top, vocabulary_chunk=chunk, neuron_block=block)
    z, kurtosis, skewness = direct(vectors, unembedding)
    for ids, scores, sign in ((found.top_ids, found.top_z, 1), (found.bottom_ids, found.bottom_z, -1)):
        best = (sign * z).topk(top, dim=1)
        assert torch.allclose((sign * scores).double(), best.values, atol=1e-5)
        assert torch.allclose(z.gather(1, ids), scores.double(), atol=1e-5)
        assert all(len(set(row)) == top for row in ids.tolist())
    assert torch.allclose(found.kurtosis.double(), kurtosis, rtol=1e-5, atol=1e-5)
    assert torch.allclose(found.skewness.double(), skewness, rtol=1e-5, atol=1e-5)


def test_moments_hold_to_a_millionth_and_tokens_exactly_on_a_large_vocabulary() -> None:
    unembedding = vocabulary(20_011, 64)
    vectors = torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    found = scan_vectors(vectors, unembedding, top=10)
    z, kurtosis, skewness = direct(vectors, unembedding)
    projection = vectors.double() @ unembedding.double().T
    assert torch.equal(found.top_ids, z.topk(10, dim=1).indices)
    assert torch.equal(found.bottom_ids, (-z).topk(10, dim=1).indices)
    assert (found.kurtosis.double() - kurtosis).abs().max() < 1e-6 * (kurtosis + 3).max()
    assert (found.skewness.double() - skewness).abs().max() < 1e-6
    assert torch.allclose(found.mean.double(), projection.mean(1), rtol=1e-5, atol=1e-5)
    assert torch.allclose(found.deviation.double(), projection.std(1, correction=0), rtol=1e-6)
    assert torch.allclose(found.norm, vectors.norm(dim=1))


def test_a_large_common_mean_does_not_cancel_the_moments() -> None:
    unembedding = vocabulary(3000, 32) + 100.0
    vectors = torch.randn(8, 32, generator=torch.Generator().manual_seed(2))
    found = scan_vectors(vectors, unembedding, top=3)
    _, kurtosis, skewness = direct(vectors, unembedding)
    assert torch.allclose(found.kurtosis.double(), kurtosis, atol=1e-4)
    assert torch.allclose(found.skewness.double(), skewness, atol=1e-4)


def test_a_dead_vector_scores_zero_and_equal_tokens_stand_in_order() -> None:
    unembedding = vocabulary(300, 16)
    unembedding[[40, 7, 120]] = unembedding[200] * 50
    vectors = torch.stack([torch.zeros(16), unembedding[200]])
    found = scan_vectors(vectors, unembedding, top=3, vocabulary_chunk=300)
    assert found.kurtosis[0] == 0
    assert found.skewness[0] == 0
    assert torch.equal(found.top_z[0], torch.zeros(3))
    assert found.top_ids[1].tolist() == [7, 40, 120]
    assert torch.isfinite(found.kurtosis).all()


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="top"):
        scan_vectors(torch.ones(1, 4), torch.ones(3, 4), top=4)
    with pytest.raises(ValueError, match="match"):
        scan_vectors(torch.ones(1, 4), torch.ones(3, 5))
    with pytest.raises(ValueError, match="at least one"):
        concept_z(torch.ones(1, 4), torch.ones(3, 4), torch.tensor([], dtype=torch.int64))


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(5, 500), count=st.integers(1, 20), seed=st.integers(0, 9), chunk=st.integers(1, 600))
def test_concept_score_is_the_mean_of_the_direct_z_scores(tokens: int, count: int, seed: int, chunk: int) -> None:
    unembedding = vocabulary(tokens, 12, seed)
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(count, 12, generator=generator)
    ids = torch.randperm(tokens, generator=generator)[: 1 + tokens // 4]
    z, _, _ = direct(vectors, unembedding)
    expected = z[:, ids].mean(1)
    assert torch.allclose(concept_z(vectors, unembedding, ids).double(), expected, atol=2e-5)
    moments = token_moments(unembedding, vocabulary_chunk=chunk)
    assert torch.allclose(concept_z(vectors, unembedding, ids, moments=moments).double(), expected, atol=2e-5)


def test_concept_score_of_a_dead_vector_is_zero() -> None:
    assert concept_z(torch.zeros(2, 6), vocabulary(30, 6), torch.tensor([3])).tolist() == [0.0, 0.0]


@pytest.mark.skipif(not (SHARED / "models").is_dir(), reason="the shared checkpoints are not here")
def test_a_checkpoint_is_scanned_to_one_parquet_file(tmp_path: Path) -> None:
    import pyarrow.parquet

    from rotate_edit.models.checkpoint import open_checkpoint, read_matrix, read_unembedding

    checkpoint = open_checkpoint(SHARED / "models" / "stories260K")
    unembedding = read_unembedding(checkpoint)
    output = tmp_path / "scan.parquet"
    steps: list[tuple[int, int]] = []
    rows = scan_checkpoint(
        checkpoint,
        output,
        matrices=["out", "gate"],
        layers=[0, 3],
        projection_of=lambda layer, matrix: unembedding,
        texts=[f"t{index}" for index in range(500)],
        top=5,
        progress=lambda step, done, total: steps.append((done, total)),
    )
    table = pyarrow.parquet.read_table(output).to_pylist()
    assert rows == len(table) == 4 * checkpoint.neurons
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    row = table[checkpoint.neurons + 11]
    assert (row["layer"], row["neuron"], row["matrix"], row["expert"]) == (3, 11, "out", None)
    z, kurtosis, _ = direct(read_matrix(checkpoint, 3, "out")[11:12], unembedding)
    assert row["top_ids"] == z[0].topk(5).indices.tolist()
    assert row["top_tokens"] == [f"t{index}" if index < 500 else "" for index in row["top_ids"]]
    assert row["kurtosis"] == pytest.approx(float(kurtosis[0]), rel=1e-4)
    assert [entry.name for entry in tmp_path.iterdir()] == ["scan.parquet"]
    with pytest.raises(BadInput, match="exists already"):
        scan_checkpoint(checkpoint, output, matrices=["out"], projection_of=lambda *_: unembedding, texts=[])
    for bad in ({"matrices": ["out"], "layers": [9]}, {"matrices": ["up"]}, {"matrices": ["out"], "top": 0}):
        with pytest.raises(BadInput):
            scan_checkpoint(checkpoint, tmp_path / "x", projection_of=lambda *_: unembedding, texts=[], **bad)
    assert [entry.name for entry in tmp_path.iterdir()] == ["scan.parquet"]
    with pytest.raises(BadInput, match="the base's folder lie one inside the other"):
        scan_checkpoint(
            checkpoint, checkpoint.folder / "x", matrices=["out"], projection_of=lambda *_: unembedding, texts=[]
        )
