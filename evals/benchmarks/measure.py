"""What the benchmarks share: naming the machine, timing calls side by side, printing one table, writing figures."""

import argparse
import datetime
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

Clock = Callable[[Callable[[], object], str], float]


def parser(description: str) -> argparse.ArgumentParser:
    """The options every benchmark has."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or mps")
    made.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's own choice)")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    return made


def machine(device: str) -> str:
    """The card, or how many cores and threads, and the versions a reader needs to repeat a measurement."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"{os.cpu_count()}-core CPU, {torch.get_num_threads()} threads"
        if device != "cpu":
            name = f"{device} on {name}"
    return f"{name}; torch {torch.__version__}, Python {platform.python_version()}; {datetime.date.today()}"


def seconds(call: Callable[[], object], device: str = "cpu") -> float:
    """How long one call takes, until the device has done it."""
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    wait()
    begin = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - begin


def busy_seconds(call: Callable[[], object], device: str = "cpu") -> float:
    """How long one call takes; with one thread on the CPU, the processor's own time, which other programs do not
    lengthen."""
    if device != "cpu" or torch.get_num_threads() > 1:
        return seconds(call, device)
    begin = time.process_time()
    call()
    return time.process_time() - begin


def side_by_side(
    calls: Mapping[str, Callable[[], object]], repeats: int, device: str = "cpu", clock: Clock = busy_seconds
) -> dict[str, float]:
    """The shortest time of each call; the calls take turns, so that a busy moment of the machine hits them all."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats + 1):
        for name, call in calls.items():
            # The first round warms up; keeping its times does no harm to a minimum.
            best[name] = min(best[name], clock(call, device))
    return best


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print one Markdown table under a title."""
    cells = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[place]) for row in [list(columns), *cells]) for place in range(len(columns))]
    print(f"{title}\n")
    for row in [list(columns), ["-" * width for width in widths], *cells]:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")


def write_figures(path: Path | None, figures: Mapping[str, object]) -> None:
    """Write the named figures as one JSON object, when a file was asked for."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=1) + "\n")
