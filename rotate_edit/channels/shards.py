"""The pieces of a large job: its manifest, the shards it is cut into, doing one, and putting them together again.

A job is a manifest (`job.json`: everything that decides the result) and a list of shards, each a block of neurons of
one matrix. A finished shard is one file whose name holds the SHA-256 of its content, so that a re-run does only what
is missing and trusts nothing that was cut short.
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

from rotate_edit.channels.channel_set import DTYPES, channel_schema
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
    """Which neurons a job decomposes: matrices ("gate", "in", "out") and layers, None for all of them."""

    matrices: tuple[str, ...] = ("out",)
    layers: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Shard:
    """One piece of a job: neurons `start` to `stop` (exclusive) of one matrix."""

    layer: int
    matrix: str
    expert: int | None
    start: int
    stop: int

    @property
    def name(self) -> str:
        """For instance "L003.out.000512-001024", or "L010.E003.out.000512-001024" in a mixture of experts."""
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
) -> dict:
    """The manifest of a job: everything that decides its result, as plain JSON.

    Raises BadInput for layers, matrices or numbers that cannot be.
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
    # Settled here, since every machine that works on the job has to take the same tables.
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


def job_shards(checkpoint: Checkpoint, job: dict) -> list[Shard]:
    """The shards of a job, in the order in which they stand in the result."""
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
    """A neuron's own seed, the same whatever it is decomposed together with."""
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
    """The channels of vectors [n, d_model] as a table of tensors on the CPU, one row a channel, neurons in order.

    projection: ([V, d_model], token weights [V]). Columns: owner (int64, row of `vectors`), index, sign, claimed
    (int32), kurtosis, skewness, cosine, loss, support (float32), token_ids (int32 [rows, k], -1 where there is
    none), z_scores (float32 [rows, k]), vectors (float32 [rows, d_model]). Vectors of length 0 have no rows. Raises
    BadInput, about `name`, for a value that is not finite.
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


def shard_content(projections: Projections, job: dict, shard: Shard) -> bytes:
    """The content of a shard's file: the table of `find_rows` as safetensors, with `neuron` in place of `owner`."""
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
    """Do one shard, anywhere: open the checkpoint, search, and write the shard's file into the job's folder.

    Returns the shard and its file's name; where the folder with this job cannot be seen (another machine), the
    file's content as well. Raises Failure when the checkpoint here is not the one of the manifest.
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
def prepare(model: str, revision: str | None, job_text: str) -> tuple[Projections, dict]:
    """The checkpoint's tables for a job; kept, because every shard that this process does needs the same."""
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
    """Which shards lie finished in a job's folder; a file whose content is not what its name says is removed."""
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
    """The finished shards in order as batches of a channel set, a bounded number of bytes in memory at a time.

    Raises Failure when a file is not what its name says.
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
    """A shard's rows as rows of a channel set that begin at row `first`."""
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
    }
    schema = channel_schema()
    return pyarrow.Table.from_arrays([columns[name] for name in schema.names], schema=schema)
