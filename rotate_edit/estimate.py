"""What a job will take on this machine: time, memory, GPU memory and disk; refused early when it cannot fit."""

import math
import os
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rotate_edit import hub
from rotate_edit.checkpoint import Checkpoint
from rotate_edit.edit import Edit
from rotate_edit.errors import BadInput
from rotate_edit.files import check_free_space, free_space
from rotate_edit.rewrite import BLOCK_ELEMENTS, plan_edit
from rotate_edit.rotate import SolverSettings, memory_bound

# What Python with torch takes before any work, with a tokenizer, and with a model of transformers, in bytes, and how
# long it takes to begin, in seconds; measured on Linux.
PROCESS, PROCESS_WITH_TOKENIZER, PROCESS_WITH_TRANSFORMERS = 350_000_000, 600_000_000, 900_000_000
START, START_WITH_TRANSFORMERS = 3.0, 12.0
# Bytes a second at which weights are read; most disks and every page cache are faster.
READING = 1e9
# Products of one vector with the vocabulary matrix for one channel (circle: 48 to 57 measured; adamw: two a step).
PRODUCTS = {"circle": 57, "adamw": 12_000}
# Seconds of a search over the seconds of its products alone: 2.6 to 4.6 measured.
SEARCH_OVERHEAD = 3.0
# The share of a vocabulary that are beginnings of words: 0.57 and 0.69 measured.
WORDS_SHARE = 0.65
# Vocabulary tables in memory while they are read and prepared: 1.6 (tied) and 4.5 measured, two more when levelled.
TABLES, TABLES_UNTIED = 4, 6
# Bytes of a channel in a shard beside its vector, and again in the table.
CHANNEL_BYTES = 250
# Bytes of one strong token in a scan's table: its id, z-score and text.
TOKEN_BYTES = 20
PROBE = 32 << 20
PROBE_SECONDS = 0.3


@dataclass(frozen=True)
class Cost:
    """What a job takes.

    operations: floating-point operations, with what surrounds the products counted in; start: seconds before work
    begins; read, disk: bytes read and bytes that are new on the disk; memory, gpu_memory: bytes at most; download:
    bytes that the Hub's cache does not hold yet, at most.
    """

    operations: float = 0.0
    start: float = START
    read: int = 0
    memory: int = PROCESS
    gpu_memory: int = 0
    disk: int = 0
    download: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        """One job after the other in one process: work and disk add up, the larger memory counts.

        What the first has downloaded the second need not download.
        """
        return Cost(
            self.operations + other.operations,
            max(self.start, other.start),
            self.read + other.read,
            max(self.memory, other.memory),
            max(self.gpu_memory, other.gpu_memory),
            self.disk + other.disk,
            max(self.download, other.download),
        )


def estimate_patch(checkpoint: Checkpoint, edit: Edit | None = None, *, link: bool = False) -> Cost:
    """What writing a patched checkpoint takes; without an edit all shards are taken to be touched, and no undo."""
    sizes = dict.fromkeys(checkpoint.headers, 0)
    for stored in checkpoint.stored.values():
        sizes[stored.file] += stored.end - stored.start
    written, undo, memory = set(sizes), 0, 0
    if edit is not None:
        touched = plan_edit(checkpoint, edit)
        for name, parts in touched.items():
            stored = checkpoint.stored[name]
            for part in parts:
                undo += len(part.rows) * (checkpoint.hidden_size * stored.itemsize + 8)
            # To keep the originals for the undo, one tensor is read whole where neurons are its columns.
            memory = max(memory, stored.end - stored.start)
        if link:
            written = {checkpoint.stored[name].file for name in touched}
    disk = sum(sizes[shard] for shard in written) + undo
    # A block is held in its own dtype, twice, and in float64, three times.
    return Cost(
        read=disk, memory=PROCESS + memory + BLOCK_ELEMENTS * (2 * 4 + 3 * 8), disk=disk,
        download=to_download(checkpoint),
    )  # fmt: skip


def estimate_live(checkpoint: Checkpoint, itemsize: int = 4, *, gpu: bool = False) -> Cost:
    """What loading the live model takes, with `itemsize` bytes a parameter."""
    model = parameters(checkpoint) * itemsize
    # A tenth more for activations and for the tensors on their way from the file.
    held = model + model // 10
    return Cost(
        start=START_WITH_TRANSFORMERS,
        read=checkpoint.size,
        memory=PROCESS_WITH_TRANSFORMERS + (checkpoint.size if gpu else held),
        gpu_memory=held if gpu else 0,
        download=to_download(checkpoint),
    )


def decompose_cost(
    checkpoint: Checkpoint,
    settings: SolverSettings,
    *,
    matrices: tuple[str, ...],
    layers: tuple[int, ...] | None = None,
    words_only: bool = True,
    vectors: str | None = "bfloat16",
    block: int = 512,
    threads: int = 1,
    workers: int | None = None,
    device: str = "cpu",
) -> Cost:
    """What `decompose.decompose` takes with these settings, when every neuron has all its channels."""
    chosen = range(checkpoint.layers) if layers is None else [one for one in layers if 0 <= one < checkpoint.layers]
    neurons = len(matrices) * sum(checkpoint.neurons_in(one) * (checkpoint.experts_in(one) or 1) for one in chosen)
    shards = math.ceil(neurons / block)
    one = shard_memory(checkpoint, settings, block)
    tables = table_memory(checkpoint)
    on_gpu = device != "cpu"
    running = 1 if on_gpu else (workers or shard_workers(shards, one, threads))
    width = {"bfloat16": 2, "float32": 4}.get(vectors or "", 0) * checkpoint.hidden_size
    channels = neurons * settings.channels
    return Cost(
        operations=search_operations(checkpoint, settings, channels, words_only),
        read=checkpoint.size,
        memory=PROCESS_WITH_TOKENIZER + tables + (0 if on_gpu else running * one),
        gpu_memory=tables + one if on_gpu else 0,
        # The shards stay until the channel set that is made of them is complete.
        disk=channels * (2 * width + CHANNEL_BYTES),
        download=to_download(checkpoint),
    )


def scan_cost(checkpoint: Checkpoint, matrices: int, top: int) -> Cost:
    """What a scan of so many matrices of every layer takes, with `top` tokens kept on either side of a vector."""
    layers = range(checkpoint.layers)
    vectors = matrices * sum(checkpoint.neurons_in(one) * (checkpoint.experts_in(one) or 1) for one in layers)
    return Cost(
        operations=vectors * 2 * checkpoint.vocabulary_size * checkpoint.hidden_size,
        read=checkpoint.size,
        memory=PROCESS_WITH_TOKENIZER + table_memory(checkpoint),
        disk=vectors * (2 * top * TOKEN_BYTES + CHANNEL_BYTES),
    )


def shard_memory(checkpoint: Checkpoint, settings: SolverSettings, block: int) -> int:
    """Bytes that one shard needs at most while it is searched, beside the tables that all shards share."""
    vocabulary = checkpoint.vocabulary_size
    needed = memory_bound(block, vocabulary, checkpoint.hidden_size, settings)
    # The AdamW procedure keeps its projections for the backward pass, about eight of them a row.
    return needed + (32 * settings.rows * vocabulary if settings.solver == "adamw" else 0)


def shard_workers(shards: int, memory: int, threads: int) -> int:
    """How many shards run at once on the CPU: as many as cores and free memory allow."""
    return max(1, min(shards, available_memory() // memory, (os.cpu_count() or 1) // threads))


def search_operations(checkpoint: Checkpoint, settings: SolverSettings, channels: float, words_only: bool) -> float:
    """Operations to search so many channels: each product of a vector with the vocabulary is 2 V d."""
    tokens = checkpoint.vocabulary_size * (WORDS_SHARE if words_only else 1)
    return SEARCH_OVERHEAD * channels * PRODUCTS[settings.solver] * 2 * tokens * checkpoint.hidden_size


def table_memory(checkpoint: Checkpoint) -> int:
    """Bytes of the vocabulary's tables while they are read and prepared."""
    copies = TABLES if checkpoint.tied else TABLES_UNTIED
    return copies * checkpoint.vocabulary_size * checkpoint.hidden_size * 4


def to_download(checkpoint: Checkpoint) -> int:
    """Bytes of its shards that the Hub's cache does not hold yet; 0 for a folder."""
    found = checkpoint.hub
    if found is None:
        return 0
    return sum(found.files[shard].size or 0 for shard in checkpoint.headers if not hub.is_here(found, shard))


def parameters(checkpoint: Checkpoint) -> int:
    """How many numbers its tensors hold."""
    return sum(stored.elements for stored in checkpoint.stored.values())


def seconds(cost: Cost, output: Path, device: str = "cpu") -> float:
    """How long a job takes at the speeds that this machine shows now: a product of matrices and a file, measured."""
    calculated = cost.operations / product_speed(device) if cost.operations else 0.0
    written = cost.disk / disk_speed(output) if cost.disk else 0.0
    return cost.start + calculated + cost.read / READING + written


def product_speed(device: str = "cpu") -> float:
    """Floating-point operations a second of float32 products on a device, the best of a third of a second."""
    import torch

    left, right = torch.ones(192, 1024, device=device), torch.ones(1024, 2048, device=device)
    best, begun = float("inf"), time.perf_counter()
    while time.perf_counter() - begun < PROBE_SECONDS:
        started = time.perf_counter()
        float((left @ right)[0, 0])
        best = min(best, time.perf_counter() - started)
    return 2 * 192 * 1024 * 2048 / best


def disk_speed(output: Path) -> float:
    """Bytes a second that the disk of `output` takes, measured with a small file that is flushed and removed."""
    parent = output.absolute().parent
    while not parent.is_dir():
        parent = parent.parent
    try:
        with tempfile.TemporaryFile(dir=parent) as stream:
            content = os.urandom(PROBE)
            begun = time.perf_counter()
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
            return PROBE / (time.perf_counter() - begun)
    except OSError as error:
        raise BadInput(f"the output {output} cannot be written ({error.strerror}); choose another one.") from error


def available_memory() -> int:
    """Bytes of memory that a new job may take, the limit of a container included."""
    names = getattr(os, "sysconf_names", {})
    # macOS says only how much there is in all.
    pages = next((os.sysconf(name) for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES") if name in names), 1 << 50)
    available = pages * os.sysconf("SC_PAGE_SIZE") if names else 1 << 62
    meminfo, limit = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    if meminfo.is_file():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        available = int(fields["MemAvailable"].split()[0]) * 1024
    if limit.is_file() and limit.read_text().strip().isdigit():
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        available = min(available, int(limit.read_text()) - used)
    return available


def held_memory() -> int:
    """Bytes of memory that this process has used at most so far."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used * (1024 if sys.platform != "darwin" else 1)


def available_gpu_memory() -> int | None:
    """Bytes that the GPU has free; None where there is no GPU that says so."""
    import torch

    return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else None


def check_cost(cost: Cost, output: Path) -> None:
    """Refuse a job that does not fit the disk of `output`, the memory or the GPU. Raises BadInput."""
    check_free_space(output, cost.disk)
    available = available_memory()
    # What this process holds already is not free any more, and is part of what the job needs.
    if cost.memory - held_memory() > available:
        raise BadInput(
            f"the job needs {cost.memory / 1e9:.1f} GB of memory and {available / 1e9:.1f} GB are free; take a "
            "smaller model, a 16-bit dtype or another machine."
        )
    if cost.gpu_memory:
        free = available_gpu_memory()
        if cost.gpu_memory > (available if free is None else free):
            raise BadInput(
                f"the job needs {cost.gpu_memory / 1e9:.1f} GB of GPU memory and "
                f"{(available if free is None else free) / 1e9:.1f} GB are free; "
                "take device: cpu, a smaller model or a 16-bit dtype."
            )


def described(cost: Cost, output: Path, device: str = "cpu") -> list[list[str]]:
    """The estimate as rows of a table: what, how much of it the job takes, how much this machine has free."""
    rows = [
        ["time", f"about {_duration(seconds(cost, output, device))}", f"at this machine's speed now, on {device}"],
        ["memory", f"{cost.memory / 1e9:.2f} GB at most", f"{available_memory() / 1e9:.1f} GB free"],
    ]
    free = available_gpu_memory()
    if cost.gpu_memory or free is not None:
        has = "" if free is None else f"{free / 1e9:.1f} GB free"
        rows.append(["GPU memory", f"{cost.gpu_memory / 1e9:.2f} GB at most", has])
    else:
        rows.append(["GPU memory", "none", "no GPU is used"])
    if cost.download:
        rows.append(["download", f"{cost.download / 1e9:.3f} GB at most", "not counted in the time"])
    rows.append(["disk", f"{cost.disk / 1e9:.3f} GB", f"{free_space(output) / 1e9:.1f} GB free"])
    return rows


def _duration(length: float) -> str:
    if length < 90:
        return f"{length:.0f} seconds"
    if length < 90 * 60:
        return f"{length / 60:.0f} minutes"
    return f"{length / 3600:.0f} hours" if length < 90 * 3600 else f"{length / 86400:.0f} days"
