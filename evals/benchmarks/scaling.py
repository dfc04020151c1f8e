"""How the solver's time grows with neurons, d, vocabulary and channels, and what a second worker brings.

python evals/benchmarks/scaling.py [--repeats 3] [--quick] [--json FILE]

One size is changed at a time, from 64 neurons, d 256, 8,192 tokens, one channel; every channel is searched, supported
or not. `growth` is the exponent of the time between the smallest and the largest size: 1 is proportional. Workers are
threads of the local engine, one CPU thread each, over the blocks of one list of neurons, as a whole model is done.
That engine is imported from `channels.engines`, which is no part of the public API.
"""

import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import log
from pathlib import Path

import torch
from measure import machine, parser, seconds, show, side_by_side, write_figures
from torch import Tensor

from rotate_edit import FoundChannels, SolverSettings, find_channels
from rotate_edit.channels.engines import run_threads

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from planted import planted

BLOCKS, WORKERS = 8, (1, 2)


@dataclass(frozen=True)
class Sizes:
    """One problem: N neurons of d numbers, V tokens, channels a neuron."""

    neurons: int = 64
    size: int = 256
    vocabulary: int = 8192
    channels: int = 1


SERIES = {
    "neurons": (16, 64, 256, 1024),
    "size": (128, 256, 512, 1024),
    "vocabulary": (4096, 8192, 16_384, 32_768),
    "channels": (1, 2, 5, 10),
}
QUICK = Sizes(neurons=8, size=16, vocabulary=800)
QUICK_SERIES = {"neurons": (4, 8), "size": (16, 32), "vocabulary": (800, 1600), "channels": (1, 2)}


def main() -> None:
    """Time every series and the workers; print one table of each and write all figures."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--quick", action="store_true", help="sizes of a moment, to see that everything runs")
    choice = options.parse_args()
    if choice.threads:
        torch.set_num_threads(choice.threads)
    base, series = (QUICK, QUICK_SERIES) if choice.quick else (Sizes(), SERIES)
    rows, growth, figures = [], {}, []
    for name, sizes in series.items():
        measured = [measure(replace(base, **{name: size}), choice) for size in sizes]
        growth[name] = log(measured[-1]["seconds"] / measured[0]["seconds"]) / log(sizes[-1] / sizes[0])
        rows += [[name, *one.values()] for one in measured]
        figures += measured
    title = "Growth of the time with each size"
    show(f"{title}\n{machine(choice.device)}", ["changed", *figures[0]], rows)
    print("\nGrowth exponents: " + ", ".join(f"{name} {value:.2f}" for name, value in growth.items()) + ".\n")
    written = {"machine": machine(choice.device), "growth": growth, "problems": figures}
    if choice.device == "cpu":
        times = measure_workers(replace(base, neurons=BLOCKS * base.neurons), choice.repeats)
        speedup = times["1"] / times["2"]
        show(
            f"{BLOCKS} blocks of {base.neurons} neurons, workers of one thread each",
            ["workers", "seconds", "times faster"],
            [[name, time, times["1"] / time] for name, time in times.items()],
        )
        written |= {"workers_seconds": times, "workers_speedup": speedup}
    write_figures(choice.json, written)


def problem(sizes: Sizes, device: str) -> tuple[Tensor, Tensor, Tensor, SolverSettings]:
    """Planted neurons [N, d] and vocabulary [V, d], token weights [V], settings that spare no channel."""
    clusters = sizes.vocabulary // 40
    truth = planted(sizes.neurons, sizes.size, sizes.vocabulary, clusters)
    settings = SolverSettings(channels=sizes.channels, unsupported_limit=sizes.channels)
    weights = torch.ones(sizes.vocabulary, device=device)
    return truth.neurons.to(device), truth.unembedding.to(device), weights, settings


def measure(sizes: Sizes, choice) -> dict[str, float]:
    """The sizes, the seconds of a search, milliseconds a channel, products a channel and the speed of the products."""
    neurons, unembedding, weights, settings = problem(sizes, choice.device)
    found: list[FoundChannels] = []

    def search() -> None:
        found[:] = [find_channels(neurons, unembedding, weights, settings)]

    taken = side_by_side({"search": search}, choice.repeats, choice.device)["search"]
    channels = sizes.neurons * sizes.channels
    work = 2e-9 * found[0].products * sizes.vocabulary * sizes.size
    return asdict(sizes) | {
        "seconds": taken,
        "ms a channel": 1e3 * taken / channels,
        "products a channel": found[0].products / channels,
        "GFLOP/s of the products": work / taken,
    }


def measure_workers(sizes: Sizes, repeats: int) -> dict[str, float]:
    """Seconds of the same blocks of neurons done by one worker and by two, CPU only."""
    neurons, unembedding, weights, settings = problem(sizes, "cpu")
    jobs = [(block,) for block in neurons.chunk(BLOCKS)]

    def work(block: Tensor) -> int:
        torch.set_num_threads(1)
        return find_channels(block, unembedding, weights, settings).products

    threads = torch.get_num_threads()
    calls = {str(count): partial(run_threads, work, jobs, lambda products: None, workers=count) for count in WORKERS}
    # Two workers use two processors, so that only the clock on the wall tells.
    times = side_by_side(calls, repeats, clock=seconds)
    torch.set_num_threads(threads)
    return times


if __name__ == "__main__":
    main()
