"""The shards of a large job: make its manifest, divide it, do one shard, and put the results together.

A job is a manifest (`job.json`, everything that decides the result) and a list of shards. Each shard is a block of
neurons of one matrix. A finished shard is one file whose name holds the SHA-256 of its content. So a second run does
only what is missing and trusts nothing that was cut short.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rotate_edit.channels.channel_set import DTYPES, TESTED, channel_schema
from rotate_edit.channels.solver import SolverSettings, find_channels
from rotate_edit.errors import BadInput, Failure
from rotate_edit.files import write_atomically
from rotate_edit.models.architectures import Neuron
from rotate_edit.models.checkpoint import Checkpoint, identity, open_checkpoint, read_matrix
from rotate_edit.vocabulary.projection import (
    Projections,
    Vocabulary,
    VocabularyRules,
    first_unembedding_layer,
    mask_from_json,
    mask_to_json,
    projection_names,
    read_projections,
)

if TYPE_CHECKING:
    import pyarrow

FORMAT = "rotate_edit decompose job"

VERSION = 1

JOB = "job.json"

BATCH_BYTES = 1 << 27

NUMBERS = ("kurtosis", "skewness", "cosine", "loss", "support")

WHOLE = ("index", "sign", "claimed")


@dataclass(frozen=True)
class Targets:
    """The neurons that a job decomposes.

    Attributes:
        matrices: "gate", "in", "out".
        layers: Indices of the layers; None for all.
    """

    matrices: tuple[str, ...] = ("out",)
    layers: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Shard:
    """One piece of a job: a block of neurons of one matrix.

    Attributes:
        layer: Index of the layer.
        matrix: "gate", "in" or "out".
        expert: Index of the expert; None in a dense layer.
        start: First neuron.
        stop: The neuron after the last one.
    """

    layer: int
    matrix: str
    expert: int | None
    start: int
    stop: int

    @property
    def name(self) -> str:
        """The shard's name, as "L003.out.000512-001024", or "L010.E003.out.000512-001024" in a mixture of experts."""
        expert = "" if self.expert is None else f".E{self.expert:03d}"
        return f"L{self.layer:03d}{expert}.{self.matrix}.{self.start:06d}-{self.stop:06d}"


def make_job(
    checkpoint: Checkpoint,
    targets: Targets,
    vocabulary: Vocabulary,
    settings: SolverSettings,
    *,
    block: int,
    threads: int,
    device: str,
    vectors: str | None,
) -> dict[str, Any]:
    """Make the manifest of a job: everything that decides its result.

    Args:
        checkpoint: The opened checkpoint.
        targets: The neurons to decompose.
        vocabulary: The checkpoint's vocabulary.
        settings: The solver's settings.
        block: Number of neurons in a shard.
        threads: CPU threads of a shard.
        device: Device of the search.
        vectors: Dtype in which vectors are kept, "bfloat16" or "float32"; None leaves them out.

    Returns:
        The manifest as plain JSON.

    Raises:
        BadInput: If layers, matrices or numbers are not possible.
    """
    layers = list(range(checkpoint.layers)) if targets.layers is None else sorted(set(targets.layers))
    if not layers or not targets.matrices or block < 1 or threads < 1:
        raise BadInput("a job needs at least one layer, one matrix, one neuron a block and one thread.")
    if vectors not in (None, *DTYPES):
        raise BadInput(f"vectors can be kept as {' or '.join(DTYPES)}, not as {vectors!r}.")
    places = [
        checkpoint.place(matrix, layer, expert)
        for layer in layers
        for matrix in targets.matrices
        for expert in _experts(checkpoint, layer)
    ]
    # The rule is replaced by a layer here, since every machine that works on the job has to take the same tables.
    rules = replace(vocabulary.rules, projection=first_unembedding_layer(checkpoint, vocabulary.rules.projection))
    names = projection_names(checkpoint, rules.projection)
    tables = [checkpoint.place(name) for name in set(names)]
    return {
        "format": FORMAT,
        "version": VERSION,
        "torch": torch.__version__.split("+")[0],
        "base": identity(checkpoint, [place.name for place in places + tables]),
        "matrices": list(dict.fromkeys(targets.matrices)),
        "layers": layers,
        "solver": asdict(settings),
        "vocabulary": asdict(rules),
        "projection": {name: [layer for layer in layers if names[layer] == name] for name in sorted(set(names))},
        "ignored": mask_to_json(vocabulary.ignored),
        "untrained": mask_to_json(vocabulary.untrained),
        "block": block,
        "threads": threads,
        "device": device,
        "vectors": vectors,
    }


def job_shards(checkpoint: Checkpoint, job: dict[str, Any]) -> list[Shard]:
    """List the shards of a job, in the order in which they stand in the result.

    Args:
        checkpoint: The opened checkpoint.
        job: The manifest.

    Returns:
        The shards.
    """
    return [
        Shard(layer, matrix, expert, start, min(start + job["block"], checkpoint.neurons_in(layer)))
        for layer in job["layers"]
        for matrix in job["matrices"]
        for expert in _experts(checkpoint, layer)
        for start in range(0, checkpoint.neurons_in(layer), job["block"])
    ]


def _experts(checkpoint: Checkpoint, layer: int) -> Sequence[int | None]:
    count = checkpoint.experts_in(layer) if 0 <= layer < checkpoint.layers else None
    return [None] if count is None else range(count)


def neuron_seed(checkpoint: Checkpoint, settings: SolverSettings, neuron: Neuron) -> int:
    """Compute a neuron's own seed. It does not depend on the neurons decomposed with it.

    Args:
        checkpoint: The opened checkpoint.
        settings: The solver's settings.
        neuron: The neuron's address.

    Returns:
        The seed.
    """
    place = neuron.layer * (checkpoint.experts or 1) + (neuron.expert or 0)
    return settings.seed + place * checkpoint.neurons + neuron.neuron


def find_rows(
    vectors: Tensor,
    projection: tuple[Tensor, Tensor],
    settings: SolverSettings,
    seeds: Sequence[int],
    tilts: Tensor | None = None,
    progress: Callable[[int], None] | None = None,
    name: str = "a neuron vector",
) -> dict[str, Tensor]:
    """Search the channels of vectors and put them into a table, one row for each channel.

    The columns are tensors on the CPU. owner is int64, the row of `vectors`. index, sign and claimed are int32.
    kurtosis, skewness, cosine, loss and support are float32. token_ids is int32 [rows, k], with -1 where there is none.
    z_scores is float32 [rows, k]. vectors is float32 [rows, d_model].

    Args:
        vectors: Neuron vectors, float [n, d_model]. Vectors of length 0 have no rows.
        projection: The table to project on, [V, d_model], and the token weights, [V].
        settings: The solver's settings.
        seeds: Seed of each vector.
        tilts: Direction towards which one more start of each vector leans, [n, d_model]; None for no such start.
        progress: Function called with the number of vectors just finished.
        name: What to call the vectors in messages.

    Returns:
        The columns by name, with the vectors' channels in order.

    Raises:
        BadInput: If a value is not finite; the message names `name`. Also if the settings are not possible.
        Failure: If a single search does not fit in memory.
    """
    table, weights = projection
    if not bool(vectors.isfinite().all()):
        raise BadInput(f"{name} holds a value that is not finite, so it cannot be decomposed.")
    alive = (vectors != 0).any(1).nonzero()[:, 0]
    if progress is not None and len(alive) < len(vectors):
        progress(len(vectors) - len(alive))
    if not len(alive):
        return _empty_rows(settings, vectors.shape[1])
    found = find_channels(
        vectors[alive].to(table),
        table,
        weights,
        settings,
        tilt=None if tilts is None else tilts[alive],
        seeds=[seeds[row] for row in alive.tolist()],
        progress=progress,
    )
    kept = torch.arange(settings.channels) < found.found.cpu()[:, None]
    owner, index = kept.nonzero(as_tuple=True)

    def rows(values: Tensor, dtype: torch.dtype) -> Tensor:
        return values.cpu()[owner, index].to(dtype)

    return (
        {"owner": alive[owner], "index": index.int()}
        | {name: rows(getattr(found, name), torch.int32) for name in ("sign", "claimed", "token_ids")}
        | {name: rows(getattr(found, name), torch.float32) for name in (*NUMBERS, "z_scores", "vectors")}
    )


def _empty_rows(settings: SolverSettings, size: int) -> dict[str, Tensor]:
    whole = {name: torch.zeros(0, dtype=torch.int32) for name in WHOLE}
    lists = {"token_ids": torch.zeros(0, settings.top_tokens, dtype=torch.int32)}
    lists |= {"z_scores": torch.zeros(0, settings.top_tokens), "vectors": torch.zeros(0, size)}
    return {"owner": torch.zeros(0, dtype=torch.int64)} | whole | {name: torch.zeros(0) for name in NUMBERS} | lists


def shard_content(projections: Projections, job: dict[str, Any], shard: Shard) -> bytes:
    """Do one shard and return the content of its file.

    The content is the table of `find_rows` as safetensors, with `neuron` in place of `owner`.

    Args:
        projections: The tables of the job's checkpoint.
        job: The manifest.
        shard: The shard.

    Returns:
        The content of the file.

    Raises:
        BadInput: If a vector holds a value that is not finite.
    """
    from safetensors.torch import save

    settings = SolverSettings(**job["solver"])
    rows = torch.arange(shard.start, shard.stop)
    addresses = [Neuron(shard.layer, row, shard.expert) for row in rows.tolist()]
    found = find_rows(
        read_matrix(projections.checkpoint, shard.layer, shard.matrix, shard.expert, rows),
        projections.of(shard.layer, shard.matrix),
        settings,
        [neuron_seed(projections.checkpoint, settings, address) for address in addresses],
        name=shard.name,
    )
    found["neuron"] = (found.pop("owner") + shard.start).int()
    vectors = found.pop("vectors")
    if job["vectors"] is not None:
        found["vectors"] = vectors.to(DTYPES[job["vectors"]])
    return save({name: column.contiguous() for name, column in found.items()})


def work_shard(
    model: str, revision: str | None, job_text: str, folder: str, shard: Shard
) -> tuple[Shard, str, bytes | None]:
    """Do one shard on any machine.

    This opens the checkpoint, searches, and writes the shard's file into the job's folder. Another machine may not see
    the folder with this job. Then the file's content is returned instead.

    Args:
        model: The model as `open_checkpoint` takes it.
        revision: Hub revision; None for a folder.
        job_text: The manifest as text.
        folder: The job's folder.
        shard: The shard.

    Returns:
        The shard, the name of its file, and the file's content if it was not written (else None).

    Raises:
        Failure: If the checkpoint here is not the one of the manifest.
    """
    projections, job = prepare(model, revision, job_text)
    torch.set_num_threads(job["threads"])
    content = shard_content(projections, job, shard)
    name = f"{shard.name}.{hashlib.sha256(content).hexdigest()}.safetensors"
    own = Path(folder) / JOB
    if own.is_file() and own.read_text() == job_text:
        write_atomically(Path(folder) / name, content)
        return shard, name, None
    return shard, name, content


@lru_cache(maxsize=1)
def prepare(model: str, revision: str | None, job_text: str) -> tuple[Projections, dict[str, Any]]:
    """Read the checkpoint's tables for a job.

    The result is kept, because every shard that this process does needs the same tables.

    Args:
        model: The model as `open_checkpoint` takes it.
        revision: Hub revision; None for a folder.
        job_text: The manifest as text.

    Returns:
        The tables, and the manifest.

    Raises:
        Failure: If the checkpoint here is not the one of the manifest.
    """
    job = json.loads(job_text)
    torch.set_num_threads(job["threads"])
    checkpoint = open_checkpoint(model, revision)
    base = identity(checkpoint, job["base"]["tensors"])
    if base | {"source": None} != job["base"] | {"source": None}:
        raise Failure(f"the checkpoint {checkpoint.source} on this machine is not the one the job was started with.")
    rules = VocabularyRules(**job["vocabulary"])
    words = Vocabulary(rules, (), mask_from_json(job["ignored"]), mask_from_json(job["untrained"]))
    return read_projections(checkpoint, words, job["device"]), job


def finished_shards(folder: Path, shards: Sequence[Shard]) -> dict[str, Path]:
    """Find the shards that lie finished in a job's folder.

    A file whose content is not what its name says is removed.

    Args:
        folder: The job's folder.
        shards: The shards of the job.

    Returns:
        The files of finished shards by the shards' names.
    """
    wanted = {shard.name for shard in shards}
    ready = {}
    for path in sorted(folder.glob("*.safetensors")):
        name, digest, _ = path.name.rsplit(".", 2)
        if name not in wanted:
            continue
        if hashlib.sha256(path.read_bytes()).hexdigest() == digest:
            ready[name] = path
        else:
            path.unlink()
    return ready


def merged_shards(
    shards: Sequence[Shard], ready: dict[str, Path], texts: Sequence[str]
) -> "Iterator[tuple[pyarrow.Table, Tensor]]":
    """Merge the finished shards in order into batches of a channel set.

    A bounded number of bytes is in memory at a time.

    Args:
        shards: The shards of the job, in order.
        ready: The files of all shards by the shards' names.
        texts: Text of every token id.

    Yields:
        Rows of `channel_schema`, and their vectors [rows, d_model] in the kept dtype ([0, 0] if none are kept).

    Raises:
        Failure: If a file's content is not what its name says.
    """
    import pyarrow
    from safetensors.torch import load

    words = pyarrow.array(texts, pyarrow.string())
    tables: list[pyarrow.Table] = []
    vectors: list[Tensor] = []
    row = held = 0
    for shard in shards:
        content = ready[shard.name].read_bytes()
        if hashlib.sha256(content).hexdigest() != ready[shard.name].name.rsplit(".", 2)[1]:
            raise Failure(f"the shard {shard.name} was changed while the job ran; run the same command again.")
        found = load(content)
        tables.append(_shard_table(found, shard, words, row))
        vectors.append(found.get("vectors", torch.empty(0, 0)))
        row += tables[-1].num_rows
        held += len(content)
        if held > BATCH_BYTES:
            yield pyarrow.concat_tables(tables), torch.cat(vectors)
            tables, vectors, held = [], [], 0
    if tables:
        yield pyarrow.concat_tables(tables), torch.cat(vectors)


def _shard_table(found: dict[str, Tensor], shard: Shard, words: "pyarrow.Array", first: int) -> "pyarrow.Table":
    """Turn a shard's rows into rows of a channel set that begin at row `first`."""
    import pyarrow

    count = len(found["neuron"])
    there = found["token_ids"] >= 0
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), there.sum(1).cumsum(0)])
    offsets = pyarrow.array(ends.int().numpy())
    ids = pyarrow.array(found["token_ids"][there].numpy())
    lists = {
        "token_ids": ids,
        "tokens": words.take(ids),
        "z_scores": pyarrow.array(found["z_scores"][there].numpy()),
    }
    columns: dict[str, Any] = {
        "row": pyarrow.array(range(first, first + count), pyarrow.int64()),
        "layer": pyarrow.array([shard.layer] * count, pyarrow.int32()),
        "expert": pyarrow.array([shard.expert] * count, pyarrow.int32()),
        "matrix": pyarrow.array([shard.matrix] * count, pyarrow.string()),
        **{name: pyarrow.array(found[name].numpy()) for name in ("neuron", *WHOLE, *NUMBERS)},
        **{name: pyarrow.ListArray.from_arrays(offsets, values) for name, values in lists.items()},
        TESTED: pyarrow.nulls(count, pyarrow.float64()),
    }
    schema = channel_schema()
    return pyarrow.Table.from_arrays([columns[name] for name in schema.names], schema=schema)
