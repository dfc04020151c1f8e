"""How long a whole model takes, extrapolated from a sample of its neurons on a planted vocabulary of its shape.

python evals/benchmarks/atlas.py [--shape gemma-2-2b] [--neurons 1024] [--channels 10] [--json FILE]
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from measure import busy_seconds, machine, parser, show, write_figures

from rotate_edit import FoundChannels, SolverSettings, channel_size, find_channels

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from planted import planted

# Name: d_model, vocabulary, layers, neurons a layer, matrices a neuron has.
SHAPES = {
    "gemma-2-2b": (2304, 256_000, 26, 9216, 3),
    "llama-3.1-8b": (4096, 128_256, 32, 14_336, 3),
    "small": (256, 8192, 8, 1024, 3),
}


def main() -> None:
    """Time a sample with the default solver and some steps of the AdamW procedure; print the whole model's time."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--shape", choices=SHAPES, action="append", help="model shape; several may be named")
    options.add_argument("--neurons", type=int, help="sample size (default: 1024 on a GPU, 64 on a CPU)")
    options.add_argument("--channels", type=int, default=10, help="channels a neuron of the whole model")
    options.add_argument("--sample-channels", type=int, help="channels a neuron of the sample (default: 1 on a CPU)")
    options.add_argument("--adamw-steps", type=int, default=20, help="steps of the AdamW procedure that are timed")
    options.add_argument("--adamw-total", type=int, default=5000, help="steps it is taken to need for a channel")
    options.add_argument("--rows", type=int, default=SolverSettings.rows, help="searches at work at once")
    choice = options.parse_args()
    if choice.threads:
        torch.set_num_threads(choice.threads)
    small = choice.device == "cpu"
    neurons = choice.neurons or (64 if small else 1024)
    channels = choice.sample_channels or (1 if small else choice.channels)
    rows, figures = [], {"machine": machine(choice.device), "neurons": neurons, "channels": channels}
    for shape in choice.shape or ["gemma-2-2b", "llama-3.1-8b"]:
        measured = measure_shape(shape, neurons, channels, choice)
        figures[shape] = measured
        rows += [
            [shape, name, measured[f"{key}_per_channel"] * 1e3, measured[f"{key}_products"], measured[f"{key}_hours"]]
            for name, key in (("great circles", "circle"), (f"AdamW, {choice.adamw_total:,} steps", "adamw"))
        ]
    title = f"Whole models, {choice.channels} channels a vector, from {neurons} vectors x {channels} channels"
    columns = ["shape", "solver", "ms a channel", "products a channel", "hours for the model"]
    show(f"{title}\n{machine(choice.device)}", columns, rows)
    for shape in choice.shape or ["gemma-2-2b", "llama-3.1-8b"]:
        size, _, layers, width, matrices = SHAPES[shape]
        total = layers * width * matrices
        kept = [channel_size(choice.channels, size, vectors) * total / 1e9 for vectors in ("bfloat16", None)]
        print(
            f"\n{shape}: {total:,} vectors; channel set {kept[0]:.1f} GB with bf16 vectors, {kept[1]:.2f} GB without."
        )
    write_figures(choice.json, figures)


def measure_shape(shape: str, neurons: int, channels: int, choice) -> dict[str, float]:
    """Seconds a channel and hours a model for both solvers; one preparation of the vocabulary is spread over a shard.

    The AdamW procedure is timed for a few steps only and reckoned with the steps it is taken to need.
    """
    size, vocabulary, layers, width, matrices = SHAPES[shape]
    data = planted(neurons=neurons, size=size, vocabulary=vocabulary, clusters=min(2000, vocabulary // 40))
    unembedding = data.unembedding.to(choice.device)
    vectors = data.neurons.to(choice.device)
    weights = torch.ones(vocabulary, device=choice.device)
    # Every channel of the sample is searched, supported or not, so that the count is what it says.
    settings = SolverSettings(channels=channels, rows=choice.rows, unsupported_limit=channels + 1)
    found: list[FoundChannels] = []

    def decompose(how: SolverSettings, some: torch.Tensor) -> None:
        found.append(find_channels(some, unembedding, weights, how))

    warm_up = replace(settings, channels=1, iterations=2)
    preparation = busy_seconds(lambda: decompose(warm_up, vectors[:1]), choice.device)
    preparation = min(preparation, busy_seconds(lambda: decompose(warm_up, vectors[:1]), choice.device))
    taken = busy_seconds(lambda: decompose(settings, vectors), choice.device)
    circle = (taken - preparation) / (neurons * channels)
    timed = replace(settings, solver="adamw", channels=1, steps=choice.adamw_steps)
    taken = busy_seconds(lambda: decompose(timed, vectors), choice.device)
    adamw = (taken - preparation) / (neurons * choice.adamw_steps) * choice.adamw_total
    if min(circle, adamw) <= 0:
        raise SystemExit("the sample takes no longer than the preparation of the vocabulary; name more --neurons.")
    whole = layers * width * matrices * choice.channels / 3600
    return {
        "preparation": preparation,
        "circle_per_channel": circle,
        "circle_hours": circle * whole,
        "circle_loss": float(found[-2].loss.mean()),
        "speedup": adamw / circle,
        "circle_products": found[-2].products / (neurons * channels),
        "adamw_per_channel": adamw,
        "adamw_hours": adamw * whole,
        "adamw_products": 2.0 * choice.adamw_total,
    }


if __name__ == "__main__":
    main()
