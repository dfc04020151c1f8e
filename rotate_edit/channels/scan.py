"""Scan every neuron at once: each vector's projection on the vocabulary, its strongest tokens and its moments.

The vocabulary is processed in tiles, so no `neurons x vocabulary` matrix is ever held. This is the LM-head scan of
"Flash Interpretability" (arXiv 2501.02688), with moments beside the tokens. `scan_vectors` and `concept_z` are maths.
`scan_checkpoint` reads a checkpoint and writes one Parquet file.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rotate_edit.errors import BadInput
from rotate_edit.files import check_output_free, check_output_outside, whole_file
from rotate_edit.models.checkpoint import Checkpoint, read_matrix

if TYPE_CHECKING:
    import pyarrow

FAMILY = 64
"""Number of tokens in a family. A family's maximum decides whether its tokens are looked at one by one."""
TILE = {"cpu": (512, 8192), "cuda": (2048, 8192), "mps": (1024, 8192)}
"""Vectors and tokens of a tile. A tile and its squares then stay in the last-level cache of the CPU."""
CPU_COLUMNS = 1024
"""Number of tokens in one product on the CPU.

It was measured to be a tenth faster than products as wide as a tile.
"""


@dataclass(frozen=True)
class Scan:
    """What the projections of N vectors on the vocabulary look like.

    Moments are population moments over the vocabulary. A vector whose projection is constant has z-scores, kurtosis and
    skewness 0.

    Attributes:
        top_ids: The strongest tokens of each vector, strongest first, int64 [N, k].
        top_z: Their z-scores in the vector's projection, float32 [N, k].
        bottom_ids: The strongest tokens on the negative side, most negative first, int64 [N, k].
        bottom_z: Their z-scores, float32 [N, k].
        kurtosis: Excess kurtosis of the projection, float32 [N].
        skewness: Skewness of the projection, float32 [N].
        norm: Euclidean norm of the vector, float32 [N].
        mean: Mean of the projection, float32 [N].
        deviation: Standard deviation of the projection, float32 [N].
    """

    top_ids: Tensor
    top_z: Tensor
    bottom_ids: Tensor
    bottom_z: Tensor
    kurtosis: Tensor
    skewness: Tensor
    norm: Tensor
    mean: Tensor
    deviation: Tensor


def scan_vectors(
    vectors: Tensor,
    unembedding: Tensor,
    *,
    top: int = 10,
    vocabulary_chunk: int | None = None,
    neuron_block: int | None = None,
    product: torch.dtype = torch.float32,
) -> Scan:
    """Scan vectors against an unembedding.

    Both are float32 or bfloat16 and on one device. Tokens are centred before the product. So the second to fourth power
    sums of a tile are central moments and do not cancel. They are taken in float32 within a tile and added up in
    float64.

    The strongest tokens of a tile are exact: they lie in the `top` families of 64 tokens whose maxima are largest.
    Among tokens with equal projections the lower id comes first. Which of them are kept at the cut is not defined.

    Args:
        vectors: The vectors, [N, d_model].
        unembedding: The unembedding, [V, d_model].
        top: Number k of tokens kept on either side.
        vocabulary_chunk: Number of tokens in a tile; None chooses it by device. It changes results only by rounding.
        neuron_block: Number of vectors in a tile; None chooses it by device. It changes results only by rounding.
        product: Dtype of the product's operands. bfloat16 is for CUDA, where sums stay float32.

    Returns:
        The scan, on the CPU.

    Raises:
        ValueError: If `top` is not within 1 to V, or shapes do not match.
    """
    count, vocabulary = len(vectors), len(unembedding)
    if vectors.ndim != 2 or unembedding.ndim != 2 or vectors.shape[1] != unembedding.shape[1]:
        raise ValueError(f"vectors {tuple(vectors.shape)} and unembedding {tuple(unembedding.shape)} do not match")
    if not 1 <= top <= vocabulary:
        raise ValueError(f"top must lie between 1 and the vocabulary's {vocabulary}, not {top}")
    block, chunk = TILE.get(vectors.device.type, TILE["cpu"])
    block, chunk = min(neuron_block or block, max(count, 1)), min(vocabulary_chunk or chunk, vocabulary)
    device = vectors.device
    mean_token = unembedding.mean(0, dtype=torch.float32)
    operands = vectors.to(product)
    sums = torch.zeros(3, count, dtype=_exact(device), device=device)
    values = torch.full((2, count, top), -torch.inf, device=device)
    ids = torch.zeros(2, count, top, dtype=torch.int64, device=device)
    tiles = torch.empty(2, block * chunk, device=device)
    for first in range(0, vocabulary, chunk):
        tokens = (unembedding[first : first + chunk].float() - mean_token).to(product).T
        for start in range(0, count, block):
            rows = slice(start, min(start + block, count))
            shape = (rows.stop - start, tokens.shape[1])
            tile, squares = (side[: shape[0] * shape[1]].view(shape) for side in tiles)
            _product(operands[rows], tokens, tile)
            sums[:, rows] += _power_sums(tile, squares)
            for side in range(2):
                found = _strongest(tile, min(top, shape[1]))
                values[side, rows], ids[side, rows] = _merge(values[side, rows], ids[side, rows], found, first)
                if side == 0:
                    tile.neg_()
    return _finish(vectors, mean_token, sums / vocabulary, values, ids)


def _exact(device: torch.device) -> torch.dtype:
    """Return the dtype to add up in: float64 wherever the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def _product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Write `left @ right` to the float32 `out`; low-precision operands are summed in float32 where the device can."""
    if left.device.type == "cpu" and left.dtype == torch.float32:
        for first in range(0, right.shape[1], CPU_COLUMNS):
            columns = slice(first, first + CPU_COLUMNS)
            torch.mm(left, right[:, columns], out=out[:, columns])
    elif left.dtype == torch.float32:
        torch.mm(left, right, out=out)
    elif left.device.type == "cuda" and "dtype_out" in torch.ops.aten.mm.overloads():
        torch.mm(left, right, out_dtype=torch.float32, out=out)
    else:
        out.copy_(left @ right)


def _power_sums(tile: Tensor, squares: Tensor) -> Tensor:
    """Compute the sums [3, n] of second, third and fourth powers of each row of a tile [n, c].

    `squares` is working memory.
    """
    torch.mul(tile, tile, out=squares)
    fourth = torch.linalg.vector_norm(squares, dim=1).square()
    return torch.stack([squares.sum(1), torch.linalg.vecdot(squares, tile), fourth])


def _strongest(tile: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Find the `top` largest entries of each row of a contiguous tile [n, c] and their columns, both [n, top].

    Only the families of columns with the `top` largest maxima are searched. A family that holds one of the `top`
    largest entries has a maximum at least as large. No more than `top` families can.
    """
    rows, columns = tile.shape
    if columns <= top * FAMILY:
        return tile.topk(top, dim=1, sorted=False)
    if columns % FAMILY:
        tile = torch.nn.functional.pad(tile, (0, -columns % FAMILY), value=-torch.inf)
    families = tile.view(rows, -1, FAMILY)
    best = families.amax(2).topk(top, dim=1, sorted=False).indices
    offsets = torch.arange(rows, device=tile.device)[:, None] * families.shape[1]
    entries = families.reshape(-1, FAMILY)[(best + offsets).flatten()].view(rows, -1)
    values, places = entries.topk(top, dim=1, sorted=False)
    return values, best.gather(1, places // FAMILY) * FAMILY + places % FAMILY


def _merge(values: Tensor, ids: Tensor, found: tuple[Tensor, Tensor], first: int) -> tuple[Tensor, Tensor]:
    """Merge the strongest tokens known so far [n, k] with those of a tile that begins at token `first`."""
    kept = values.shape[1]
    ids = torch.cat([ids, found[1] + first], 1)
    values, places = torch.cat([values, found[0]], 1).topk(kept, dim=1, sorted=False)
    return values, ids.gather(1, places)


def _finish(vectors: Tensor, mean_token: Tensor, moments: Tensor, values: Tensor, ids: Tensor) -> Scan:
    """Compute moments and z-scores from the central power means [3, N] and both sides' entries [2, N, k]."""
    second, third, fourth = moments.cpu().double()
    norm = vectors.float().norm(dim=1).cpu()
    # Rounding leaves a little spread where the true projection is constant; that is no scale for a z-score.
    constant = second.sqrt() <= 1e-7 * norm * float(mean_token.norm() + 1e-30)
    scale = torch.where(constant, torch.inf, second.sqrt())
    ids, values = ids.cpu(), values.cpu()
    order = ids.argsort(2)
    ids, values = ids.gather(2, order), values.gather(2, order)
    values, order = values.sort(dim=2, descending=True, stable=True)
    ids, z = ids.gather(2, order), (values / scale[:, None]).float()
    return Scan(
        top_ids=ids[0],
        top_z=z[0],
        bottom_ids=ids[1],
        bottom_z=-z[1],
        kurtosis=torch.where(constant, 0.0, fourth / scale**4 - 3.0).float(),
        skewness=(third / scale**3).float(),
        norm=norm,
        mean=(vectors.float() @ mean_token).cpu(),
        deviation=second.sqrt().float(),
    )


@dataclass(frozen=True)
class TokenMoments:
    """Mean and covariance of the token vectors over the vocabulary.

    Attributes:
        mean: The mean, float32 [d_model].
        covariance: The covariance, float32 [d_model, d_model].
    """

    mean: Tensor
    covariance: Tensor


def token_moments(unembedding: Tensor, *, vocabulary_chunk: int = 8192) -> TokenMoments:
    """Compute the mean and covariance of an unembedding's rows, a chunk of tokens at a time.

    Products are in float32, sums in float64.

    Args:
        unembedding: The unembedding, [V, d_model].
        vocabulary_chunk: Number of tokens in a chunk.

    Returns:
        The moments.
    """
    mean = unembedding.mean(0, dtype=torch.float32)
    size = unembedding.shape[1]
    total = torch.zeros(size, size, dtype=_exact(unembedding.device), device=unembedding.device)
    for first in range(0, len(unembedding), vocabulary_chunk):
        tokens = unembedding[first : first + vocabulary_chunk].float() - mean
        total += tokens.T @ tokens
    return TokenMoments(mean, (total / len(unembedding)).float())


def concept_z(
    vectors: Tensor, unembedding: Tensor, token_ids: Tensor, *, moments: TokenMoments | None = None
) -> Tensor:
    """Compute the mean z-score of some tokens in each vector's own projection.

    It has a closed form, so the other tokens are not projected on. With `mean` m and `covariance` S of the token
    vectors u, `z = w . (mean_T u - m) / sqrt(w' S w)`. A vector whose projection is constant has z-score 0.

    Args:
        vectors: Vectors w, [N, d_model].
        unembedding: The unembedding, [V, d_model].
        token_ids: The tokens, int64 [t].
        moments: Moments of the same unembedding; None computes them. Giving them saves time when there are many
            matrices.

    Returns:
        The mean z-score, float32 [N].

    Raises:
        ValueError: If there is no token.
    """
    if len(token_ids) == 0:
        raise ValueError("a mean z-score needs at least one token")
    moments = moments or token_moments(unembedding)
    rows = vectors.float()
    direction = unembedding[token_ids].float().mean(0) - moments.mean
    variance = torch.linalg.vecdot(rows @ moments.covariance, rows)
    floor = 1e-14 * torch.linalg.vecdot(rows, rows) * moments.covariance.trace()
    return torch.where(variance > floor, (rows @ direction) * variance.clamp_min(1e-38).rsqrt(), 0.0)


def scan_checkpoint(
    checkpoint: Checkpoint,
    output: Path,
    *,
    matrices: Sequence[str],
    projection_of: Callable[[int, str], Tensor],
    texts: Sequence[str],
    layers: Sequence[int] | None = None,
    top: int = 10,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> int:
    """Scan all neurons of some matrices into one Parquet file.

    There is one row for each neuron vector. It has layer, expert, neuron, matrix and norm, and kurtosis, skewness, mean
    and deviation of the projection. It also has the strongest tokens on either side as ids, texts and z-scores. The
    product runs in bfloat16 on CUDA. The file appears whole.

    Args:
        checkpoint: The opened checkpoint.
        output: Path of the Parquet file.
        matrices: The matrices: "gate", "in", "out".
        projection_of: Function of layer and matrix that gives the table to project on, float32 or bfloat16 [V,
            d_model].
        texts: Text of every token id.
        layers: Indices of the layers; None for all.
        top: Number of tokens kept on either side.
        device: Device of the scan.
        overwrite: Whether an existing output is replaced.
        progress: Function called with "scan", the number of finished matrices and the number of all.

    Returns:
        The number of rows.

    Raises:
        BadInput: If the output exists and `overwrite` is False, or the model does not have the layers or matrices. Also
            if `top` is not within 1 to V.
    """
    import pyarrow.parquet

    check_output_free(output, overwrite=overwrite)
    check_output_outside(output, checkpoint.folder)
    if not 1 <= top <= checkpoint.vocabulary_size:
        raise BadInput(f"top must lie between 1 and the vocabulary's {checkpoint.vocabulary_size}, not {top}.")
    wanted = range(checkpoint.layers) if layers is None else layers
    places = [
        (layer, matrix, expert)
        for matrix in matrices
        for layer in wanted
        for expert in range(checkpoint.experts_in(layer) or 1)
    ]
    product = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    # A vocabulary table is often padded beyond the tokenizer's last id.
    padding = max(0, checkpoint.vocabulary_size - len(texts))
    words = pyarrow.array([*texts, *[""] * padding], pyarrow.string())
    count = 0
    held: tuple[Tensor, Tensor] | None = None
    with (
        whole_file(output, overwrite=overwrite) as temporary,
        pyarrow.parquet.ParquetWriter(temporary, scan_schema(), compression="zstd") as writer,
    ):
        for done, (layer, matrix, index) in enumerate(places):
            expert = index if checkpoint.experts_in(layer) is not None else None
            projection = projection_of(layer, matrix)
            if held is None or held[0] is not projection:
                held = (projection, projection.to(device))
            vectors = read_matrix(checkpoint, layer, matrix, expert)
            found = scan_vectors(vectors.to(device), held[1], top=top, product=product)
            writer.write_table(scan_table(found, words, layer, matrix, expert))
            count += len(vectors)
            if progress is not None:
                progress("scan", done + 1, len(places))
    return count


def scan_schema() -> "pyarrow.Schema":
    """Return the columns of a scan's Parquet file."""
    import pyarrow

    sides = [
        (f"{side}_{name}", pyarrow.list_(kind))
        for side in ("top", "bottom")
        for name, kind in (("ids", pyarrow.int32()), ("tokens", pyarrow.string()), ("z", pyarrow.float32()))
    ]
    place = [("layer", pyarrow.int32()), ("expert", pyarrow.int32()), ("neuron", pyarrow.int32())]
    figures = [(name, pyarrow.float32()) for name in ("norm", "kurtosis", "skewness", "mean", "deviation")]
    return pyarrow.schema([*place, ("matrix", pyarrow.string()), *figures, *sides])


def scan_table(found: Scan, words: "pyarrow.Array", layer: int, matrix: str, expert: int | None) -> "pyarrow.Table":
    """Turn one matrix's scan into Arrow rows.

    Args:
        found: The scan.
        words: Text of every token id.
        layer: Index of the layer.
        matrix: "gate", "in" or "out".
        expert: Index of the expert; None in a dense layer.

    Returns:
        One row for each neuron, in the columns of `scan_schema`.
    """
    import pyarrow

    rows, top = found.top_ids.shape
    offsets = pyarrow.array(range(0, rows * top + 1, top), pyarrow.int32())
    columns: list[pyarrow.Array] = [
        pyarrow.array([layer] * rows, pyarrow.int32()),
        pyarrow.array([expert] * rows, pyarrow.int32()),
        pyarrow.array(range(rows), pyarrow.int32()),
        pyarrow.array([matrix] * rows, pyarrow.string()),
        *(
            pyarrow.array(column.numpy())
            for column in (found.norm, found.kurtosis, found.skewness, found.mean, found.deviation)
        ),
    ]
    for ids, z in ((found.top_ids, found.top_z), (found.bottom_ids, found.bottom_z)):
        flat = pyarrow.array(ids.flatten().int().numpy())
        for values in (flat, words.take(flat), pyarrow.array(z.flatten().numpy())):
            columns.append(pyarrow.ListArray.from_arrays(offsets, values))
    return pyarrow.Table.from_arrays(columns, schema=scan_schema())
