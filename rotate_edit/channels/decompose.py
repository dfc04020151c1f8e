"""Decompose many neurons into vocabulary channels: a few in memory for an edit, or whole models in resumable shards."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rotate_edit.channels import engines
from rotate_edit.channels.channel_set import MANIFEST, Channel, ChannelSet, open_channels, write_channel_set
from rotate_edit.channels.cost import decompose_cost, shard_memory, shard_workers
from rotate_edit.channels.shards import (
    JOB,
    Shard,
    Targets,
    find_rows,
    finished_shards,
    job_shards,
    make_job,
    merged_shards,
    neuron_seed,
    prepare,
    work_shard,
)
from rotate_edit.channels.solver import SolverSettings
from rotate_edit.errors import BadInput
from rotate_edit.files import check_output_outside, write_atomically
from rotate_edit.machine import check_cost, pick_device
from rotate_edit.models.architectures import Neuron
from rotate_edit.models.checkpoint import Checkpoint, read_matrix
from rotate_edit.vocabulary.projection import Projections, Vocabulary

Report = Callable[[str, int, int], None]

# For these families the paper masks a channel's tokens from another z-score on than the 4 used elsewhere.
CLAIM_THRESHOLDS = {"llama": 6.0}


def claim_threshold(checkpoint: Checkpoint) -> float:
    """Return the z-score from which a channel's tokens are masked, by model family.

    Masked tokens get a small weight in later searches. The values are ROTATE's published settings.

    Args:
        checkpoint: The opened checkpoint.

    Returns:
        The z-score; 4 for a family without a published value.
    """
    return CLAIM_THRESHOLDS.get(checkpoint.architecture.model_type, 4.0)


def decompose_neurons(
    neurons: Sequence[tuple[Neuron, str]],
    projections: Projections,
    texts: Sequence[str],
    settings: SolverSettings,
    *,
    tilt: Callable[[int, str], Tensor] | None = None,
    vectors: Tensor | None = None,
    progress: Report | None = None,
) -> list[Channel]:
    """Search the channels of some neurons in memory.

    The search runs on the device of the tables. A neuron whose vector is 0 has no channels.

    Args:
        neurons: Pairs of a neuron's address and a matrix.
        projections: The tables of their checkpoint (`read_projections`).
        texts: Text of every token id.
        settings: The solver's settings.
        tilt: Function of layer and matrix that gives a direction, float32 [d_model], towards which one more start
            leans.
        vectors: Vectors that are searched in place of the neurons' own, float32 [neurons, d_model].
        progress: Function called with "decompose", the number of finished neurons and the number of all.

    Returns:
        The channels, in the order of `neurons`.

    Raises:
        BadInput: If a neuron does not exist, a vector is not finite, or the settings are not possible.
        Failure: If a single search does not fit in memory.
    """
    checkpoint = projections.checkpoint
    groups: dict[tuple[Any, ...], list[int]] = {}
    for place, (neuron, matrix) in enumerate(neurons):
        # Under one table all neurons are searched together; a folded norm differs from layer to layer.
        folded = (neuron.layer, matrix) if projections.rules.fold_norm else ()
        groups.setdefault((projections.names[neuron.layer], *folded), []).append(place)
    results: dict[int, list[Channel]] = {place: [] for place in range(len(neurons))}
    finished = 0

    def report(count: int) -> None:
        nonlocal finished
        finished += count
        if progress is not None:
            progress("decompose", finished, len(neurons))

    for places in groups.values():
        chosen = [neurons[place] for place in places]
        first, matrix = chosen[0]
        found = find_rows(
            _read_neurons(checkpoint, chosen) if vectors is None else vectors[places],
            projections.of(first.layer, matrix),
            settings,
            [neuron_seed(checkpoint, settings, neuron) for neuron, _ in chosen],
            None if tilt is None else torch.stack([tilt(neuron.layer, kind) for neuron, kind in chosen]),
            report,
        )
        for row, owner in enumerate(found["owner"].tolist()):
            neuron, kind = chosen[owner]
            results[places[owner]].append(_channel(neuron, kind, found, row, texts))
    return [channel for place in range(len(neurons)) for channel in results[place]]


def _read_neurons(checkpoint: Checkpoint, neurons: Sequence[tuple[Neuron, str]]) -> Tensor:
    """Read the vectors of some neurons, float32 [n, d_model]; each matrix is read once."""
    sites: dict[tuple[int, str, int | None], list[int]] = {}
    for place, (neuron, matrix) in enumerate(neurons):
        sites.setdefault((neuron.layer, matrix, neuron.expert), []).append(place)
    vectors = torch.empty(len(neurons), checkpoint.hidden_size)
    for site, places in sites.items():
        rows = torch.tensor([neurons[place][0].neuron for place in places])
        vectors[places] = read_matrix(checkpoint, *site, rows)
    return vectors


def _channel(neuron: Neuron, matrix: str, found: dict[str, Tensor], row: int, texts: Sequence[str]) -> Channel:
    ids = [index for index in found["token_ids"][row].tolist() if index >= 0]
    return Channel(
        layer=neuron.layer,
        expert=neuron.expert,
        neuron=neuron.neuron,
        matrix=matrix,
        index=int(found["index"][row]),
        sign=int(found["sign"][row]),
        token_ids=tuple(ids),
        tokens=tuple(texts[index] for index in ids),
        z_scores=tuple(found["z_scores"][row, : len(ids)].tolist()),
        kurtosis=float(found["kurtosis"][row]),
        skewness=float(found["skewness"][row]),
        cosine=float(found["cosine"][row]),
        loss=float(found["loss"][row]),
        support=float(found["support"][row]),
        claimed=int(found["claimed"][row]),
        vector=found["vectors"][row],
    )


def decompose(
    checkpoint: Checkpoint,
    output: Path,
    *,
    targets: Targets,
    vocabulary: Vocabulary,
    settings: SolverSettings,
    vectors: str | None = "bfloat16",
    block: int = 512,
    threads: int = 1,
    device: str = "auto",
    engine: str = "local",
    address: str = "auto",
    workers: int | None = None,
    keep_shards: bool = False,
    progress: Report | None = None,
) -> ChannelSet:
    """Decompose all neurons of the targets into one channel set.

    A run that was killed goes on where it stopped. Until the job is done, the work lies beside the output, in
    `<output>.shards`. A finished output of the same job is returned as it is.

    The manifest holds everything that decides the result, including block, threads and device. The same manifest on the
    same device gives the same bytes. How many shards run at once depends on free memory and does not change the result.

    Args:
        checkpoint: The opened checkpoint.
        output: Folder of the channel set.
        targets: The neurons to decompose.
        vocabulary: The checkpoint's vocabulary (`read_vocabulary`).
        settings: The solver's settings.
        vectors: Dtype in which vectors are kept, "bfloat16" or "float32"; None leaves them out.
        block: Number of neurons in a shard.
        threads: CPU threads of a shard.
        device: Device of the search.
        engine: "local" (threads of this process, or one process for each visible GPU) or "ray" (a Ray cluster).
        address: Address of the Ray cluster.
        workers: Most local threads of work; None for as many as fit.
        keep_shards: Whether the folder of shards is kept at the end.
        progress: Function called with "decompose", the number of finished neurons and the number of all.

    Returns:
        The channel set.

    Raises:
        BadInput: If the output or unfinished work is of another job, or the model does not have the targets.
        Failure: If a worker dies.
    """
    if engine not in ENGINES:
        raise BadInput(f"engine {engine!r} is unknown; choose one of {', '.join(ENGINES)}.")
    check_output_outside(output, checkpoint.folder)
    job = make_job(
        checkpoint, targets, vocabulary, settings,
        block=block, threads=threads, device=pick_device(device), vectors=vectors,
    )  # fmt: skip
    base, how = job["base"], {key: value for key, value in job.items() if key != "base"}
    if (output / MANIFEST).is_file():
        done = open_channels(output)
        if (done.base, done.settings) == (base, how):
            return done
    if os.path.lexists(output):
        raise BadInput(f"the output {output} exists already and is not the result of this job; name another one.")
    if engine == "local":
        # What a cluster has is not known here.
        words_only, where = vocabulary.rules.words_only, job["device"]
        _check_room(checkpoint, output, targets, settings, words_only, vectors, block, threads, workers, where)
    folder = output.with_name(f"{output.name}.shards")
    _begin(folder, job)
    shards = job_shards(checkpoint, job)
    ready = _finish(checkpoint, folder, shards, job, ENGINES[engine], progress, address=address, workers=workers)
    result = write_channel_set(
        merged_shards(shards, ready, vocabulary.texts),
        output, base=base, settings=how, hidden_size=checkpoint.hidden_size, vectors=vectors,
    )  # fmt: skip
    if not keep_shards:
        shutil.rmtree(folder)
    return result


def _check_room(
    checkpoint: Checkpoint,
    output: Path,
    targets: Targets,
    settings: SolverSettings,
    words_only: bool,
    vectors: str | None,
    block: int,
    threads: int,
    workers: int | None,
    device: str,
) -> None:
    cost = decompose_cost(
        checkpoint, settings, matrices=targets.matrices, layers=targets.layers, words_only=words_only,
        vectors=vectors, block=block, threads=threads, workers=workers, device=device,
    )  # fmt: skip
    check_cost(cost, output)


def _finish(
    checkpoint: Checkpoint,
    folder: Path,
    shards: Sequence[Shard],
    job: dict[str, Any],
    engine: Callable[..., None],
    progress: Report | None,
    **where: Any,
) -> dict[str, Path]:
    """Do the shards that are missing, and return the file of every shard by its name."""
    ready = finished_shards(folder, shards)
    missing = [shard for shard in shards if shard.name not in ready]
    total = sum(shard.stop - shard.start for shard in shards)
    finished = total - sum(shard.stop - shard.start for shard in missing)

    def receive(result: tuple[Shard, str, bytes | None]) -> None:
        nonlocal finished
        shard, name, content = result
        if content is not None:
            write_atomically(folder / name, content)
        ready[shard.name] = folder / name
        finished += shard.stop - shard.start
        if progress is not None:
            progress("decompose", finished, total)

    if progress is not None:
        progress("decompose", finished, total)
    model, revision = _reopening(checkpoint)
    text = (folder / JOB).read_text()
    try:
        if missing:
            tasks = [(model, revision, text, str(folder), shard) for shard in missing]
            memory = shard_memory(checkpoint, SolverSettings(**job["solver"]), job["block"])
            engine(tasks, receive, job=job, memory=memory, **where)
    except BadInput:
        # The solver refused the settings; nothing was done that a later run could use.
        if not ready:
            shutil.rmtree(folder)
        raise
    finally:
        prepare.cache_clear()
    return ready


def _begin(folder: Path, job: dict[str, Any]) -> None:
    """Make the job's folder, or find it with the same job in it. Raises BadInput when it holds another one."""
    path = folder / JOB
    if not path.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(job, indent=1))
        except OSError as error:
            reason = error.strerror
            raise BadInput(f"the folder {folder} cannot be written ({reason}); choose another output.") from error
        return
    try:
        old = json.loads(path.read_text())
    except ValueError:
        old = None
    if old != job:
        keys = [key for key in job if not isinstance(old, dict) or old.get(key) != job[key]]
        raise BadInput(
            f"{folder} holds unfinished work of another job (it differs in {', '.join(keys)}); "
            "remove that folder or choose another output."
        )


def _reopening(checkpoint: Checkpoint) -> tuple[str, str | None]:
    """Return the arguments with which `open_checkpoint` opens this checkpoint again, here or on another machine."""
    if checkpoint.hub is not None:
        return checkpoint.hub.name, checkpoint.revision
    return str(checkpoint.folder.resolve()), None


def _local(
    tasks: list[tuple[Any, ...]],
    receive: Callable[..., Any],
    *,
    job: dict[str, Any],
    memory: int,
    address: str,
    workers: int | None,
) -> None:
    """Run shards in CPU threads, as many as cores and free memory allow, or in one process for each GPU."""
    devices = torch.cuda.device_count() if job["device"] == "cuda" else 1
    if devices > 1:
        engines.run_processes(work_shard, tasks, receive, devices=devices)
        return
    before = torch.get_num_threads()
    try:
        # The tables are read once here, before every thread would begin to read them.
        prepare(*tasks[0][:3])
        if job["device"] != "cpu":
            workers = 1
        elif workers is None:
            workers = shard_workers(len(tasks), memory, job["threads"])
        engines.run_threads(work_shard, tasks, receive, workers=workers)
    finally:
        torch.set_num_threads(before)


def _ray(
    tasks: list[tuple[Any, ...]],
    receive: Callable[..., Any],
    *,
    job: dict[str, Any],
    memory: int,
    address: str,
    workers: int | None,
) -> None:
    """Run shards as tasks of a Ray cluster. Every node opens the checkpoint itself."""
    gpus = 1 if job["device"] == "cuda" else 0
    engines.run_ray(work_shard, tasks, receive, address=address, threads=job["threads"], gpus=gpus, memory=memory)


ENGINES: dict[str, Callable[..., None]] = {"local": _local, "ray": _ray}
