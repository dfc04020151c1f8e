"""What a job will take on this machine: time, memory, GPU memory and disk.

A job that cannot fit is refused early.
"""

import os
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from rotate_edit.errors import BadInput
from rotate_edit.files import check_free_space, free_space

# What Python with torch takes before any work, with a tokenizer, and with a model of transformers, in bytes, and how
# long it takes to begin, in seconds; measured on Linux.
PROCESS, PROCESS_WITH_TOKENIZER, PROCESS_WITH_TRANSFORMERS = 350_000_000, 600_000_000, 900_000_000
START, START_WITH_TRANSFORMERS = 3.0, 12.0
# Bytes a second at which weights are read; most disks and every page cache are faster.
READING = 1e9
PROBE = 32 << 20
PROBE_SECONDS = 0.3


@dataclass(frozen=True)
class Cost:
    """What a job takes.

    Attributes:
        operations: Floating-point operations, with what surrounds the matrix products counted in.
        start: Seconds before work begins.
        read: Bytes read.
        memory: Bytes of memory, at most.
        gpu_memory: Bytes of GPU memory, at most.
        disk: Bytes that are new on the disk.
        download: Bytes that the Hub's cache does not hold yet, at most.
    """

    operations: float = 0.0
    start: float = START
    read: int = 0
    memory: int = PROCESS
    gpu_memory: int = 0
    disk: int = 0
    download: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        """Add the cost of another job that follows in the same process.

        Work and disk add up, and the larger memory counts. What the first has downloaded the second need not download.
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


@dataclass(frozen=True)
class Speeds:
    """How fast a machine works.

    Attributes:
        operations: Floating-point operations a second.
        writing: Bytes a second.
    """

    operations: float
    writing: float


def seconds(cost: Cost, output: Path, device: str = "cpu", speeds: Speeds | None = None) -> float:
    """Estimate how long a job takes.

    Args:
        cost: What the job takes.
        output: The output path, for the speed of its disk.
        device: Device of the computation.
        speeds: The machine's speeds. None measures those that a matrix product and writing a file show now.

    Returns:
        The time in seconds.

    Raises:
        BadInput: When the output's disk cannot be written.
    """
    calculated = written = 0.0
    if cost.operations:
        calculated = cost.operations / (speeds.operations if speeds else product_speed(device))
    if cost.disk:
        written = cost.disk / (speeds.writing if speeds else disk_speed(output))
    return cost.start + calculated + cost.read / READING + written


def product_speed(device: str = "cpu") -> float:
    """Measure the speed of float32 matrix products on a device, the best of a third of a second.

    Args:
        device: The device, for instance "cpu".

    Returns:
        Floating-point operations per second.
    """
    import torch

    left, right = torch.ones(192, 1024, device=device), torch.ones(1024, 2048, device=device)
    best, begun = float("inf"), time.perf_counter()
    while time.perf_counter() - begun < PROBE_SECONDS:
        started = time.perf_counter()
        float((left @ right)[0, 0])
        best = min(best, time.perf_counter() - started)
    return 2 * 192 * 1024 * 2048 / best


def disk_speed(output: Path) -> float:
    """Measure the writing speed of the disk of `output`, with a small file that is flushed and removed.

    Args:
        output: The output path. It need not exist.

    Returns:
        Bytes per second.

    Raises:
        BadInput: When the disk cannot be written.
    """
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
    """Find how much memory a new job may take, the limit of a container included.

    Returns:
        The memory in bytes.
    """
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
    """Find how much memory this process has used at most so far.

    Returns:
        The memory in bytes.
    """
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used * (1024 if sys.platform != "darwin" else 1)


def available_gpu_memory() -> int | None:
    """Find how much memory the GPU has free.

    Returns:
        The memory in bytes. None where there is no CUDA GPU.
    """
    import torch

    return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else None


def check_cost(cost: Cost, output: Path) -> None:
    """Refuse a job that does not fit the disk of `output`, the memory or the GPU.

    Args:
        cost: What the job takes.
        output: The output path.

    Raises:
        BadInput: When the job does not fit.
    """
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


def described(cost: Cost, output: Path, device: str = "cpu", speeds: Speeds | None = None) -> list[list[str]]:
    """Write the estimate as rows of a table.

    Args:
        cost: What the job takes.
        output: The output path.
        device: Device of the computation.
        speeds: The machine's speeds. None measures them.

    Returns:
        One row per resource: what it is, how much the job takes, how much this machine has free.
    """
    rows = [
        [
            "time",
            f"about {_duration(seconds(cost, output, device, speeds))}",
            f"at this machine's speed now, on {device}",
        ],
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


def pick_device(device: str) -> str:
    """Pick the device to compute on.

    Args:
        device: "auto", "cuda", "mps" or "cpu".

    Returns:
        The device. For "auto" it is the best this machine has: cuda, then mps, then cpu.

    Raises:
        BadInput: When this machine does not have the device.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return next(name for name in ("cuda", "mps", "cpu") if there[name])
    if not there.get(device, False):
        raise BadInput(f"device {device}: this machine has no such device; use auto, cpu, cuda or mps.")
    return device


def peak_memory() -> float:
    """Return the largest memory this process has used.

    Returns:
        The memory in mebibytes.
    """
    return held_memory() / 1024**2
