"""The default solver against the published AdamW procedure: first channel, same mask, neurons and threads.

python evals/benchmarks/solver.py [--model FOLDER ...] [--planted 8192 ...] [--neurons 64] [--json FILE]

Without --model and --planted: planted vocabularies of 8,192 and 32,768 tokens (d 256) and the demo model. Every start
of the default solver is counted. Its runs lie between those of AdamW, so that a busy machine slows both; with one
thread the time is that of the processor, which other programs do not lengthen. AdamW takes minutes for a large
vocabulary: FILE is written after every problem, and a problem that stands in it already is not measured again.
"""

import json
import sys
from functools import partial
from itertools import permutations
from pathlib import Path
from statistics import mean, median

import torch
from measure import busy_seconds, machine, parser, show, write_figures
from torch import Tensor

from rotate_edit import (
    FoundChannels,
    SolverSettings,
    find_channels,
    open_checkpoint,
    read_matrix,
    read_unembedding,
    token_weights,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from planted import planted

WORSE = 1e-3


def main() -> None:
    """Compare the solvers on every problem; print one table and write the worst figures of all problems."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--model", action="append", default=[], help="checkpoint folder, Hub id or demo; repeatable")
    options.add_argument("--planted", action="append", type=int, default=[], help="planted vocabulary size; repeatable")
    options.add_argument("--size", type=int, default=256, help="d of the planted vocabularies")
    options.add_argument("--layer", type=int, help="layer of the models' neurons (default: one past the middle)")
    options.add_argument("--neurons", type=int, default=64)
    options.add_argument("--seeds", type=int, default=3, help="runs of AdamW, each from its own seeds")
    options.add_argument("--moments", choices=["weighted", "zeroed"], default="zeroed", help="of both solvers")
    choice = options.parse_args()
    if choice.threads:
        torch.set_num_threads(choice.threads)
    if not choice.model and not choice.planted:
        choice.model, choice.planted = ["demo"], [8192, 32_768]
    how = {name: getattr(choice, name) for name in ("neurons", "moments", "layer")}
    how["machine"] = machine(choice.device)
    measured = read_problems(choice.json, how)
    problems = {f"planted V {size:,} d {choice.size}": (planted_problem, size) for size in choice.planted}
    problems |= {Path(model).name: (model_problem, model) for model in choice.model}
    for name, (make, which) in problems.items():
        if name not in measured:
            measured[name] = compare(*make(which, choice), choice)
            write_figures(choice.json, worst(measured) | how | {"problems": measured})
    columns = ["problem", "seconds", "AdamW s", "speedup", "products", "AdamW p.", "ratio", "loss", "AdamW loss"]
    columns += ["not worse", "AdamW between seeds", "kurtosis", "AdamW k.", "Jaccard", "cosine"]
    names = ["seconds", "adamw_seconds", "speedup", "products", "adamw_products", "projections_ratio", "loss"]
    names += ["adamw_loss", "loss_not_worse", "adamw_between_seeds", "kurtosis", "adamw_kurtosis", "jaccard", "cosine"]
    columns, names = [*columns, "seeds"], [*names, "seeds"]
    title = f"First channel of {choice.neurons} neurons, {choice.moments} moments"
    rows = [[name, *(figures[column] for column in names)] for name, figures in measured.items()]
    show(f"{title}\n{machine(choice.device)}", columns, rows)


def read_problems(path: Path | None, how: dict[str, object]) -> dict[str, dict[str, float]]:
    """The problems an earlier run measured in the same way; SystemExit when it measured in another."""
    if path is None or not path.is_file():
        return {}
    before = json.loads(path.read_text())
    other = [name for name in how if before.get(name) != how[name]]
    if other:
        raise SystemExit(f"{path} was measured with another {', '.join(other)}; name another file.")
    return before["problems"]


def worst(measured: dict[str, dict[str, float]]) -> dict[str, float]:
    """The worst of each named figure over all problems."""
    figures = {
        name: min(one[name] for one in measured.values()) for name in ("speedup", "projections_ratio", "loss_not_worse")
    }
    return figures | {"adamw_between_seeds": max(one["adamw_between_seeds"] for one in measured.values())}


def planted_problem(vocabulary: int, choice) -> tuple[Tensor, Tensor]:
    """Neurons [N, d] and vocabulary matrix [V, d] with planted concepts."""
    truth = planted(neurons=choice.neurons, size=choice.size, vocabulary=vocabulary, clusters=vocabulary // 40)
    return truth.neurons, truth.unembedding


def model_problem(model: str, choice) -> tuple[Tensor, Tensor]:
    """The first `out` vectors [N, d] of one layer of a checkpoint and its unembedding [V, d]."""
    checkpoint = open_checkpoint(model)
    layer = checkpoint.layers // 2 + 1 if choice.layer is None else choice.layer
    return read_matrix(checkpoint, layer, "out")[: choice.neurons].contiguous(), read_unembedding(checkpoint)


def compare(neurons: Tensor, unembedding: Tensor, choice) -> dict[str, float]:
    """Time, work and quality of both solvers on one problem; figures of AdamW are means over its seeds.

    loss_not_worse: share of neurons whose loss is no more than 1e-3 above that of AdamW's candidate, mean over seeds;
    adamw_between_seeds: share of neurons for which one run of AdamW is worse than another by more, mean over pairs.
    """
    neurons, unembedding = neurons.to(choice.device), unembedding.to(choice.device)
    weights = token_weights(unembedding)
    circle = SolverSettings(channels=1, moments=choice.moments)
    found, circle_times, adamw_times = [], [], []
    find_channels(neurons, unembedding, weights, circle)
    for seed in range(choice.seeds):
        adamw = SolverSettings(channels=1, moments=choice.moments, solver="adamw", seed=seed * len(neurons))
        for settings, times in ((circle, circle_times), (adamw, adamw_times), (circle, circle_times)):
            run = partial(find_channels, neurons, unembedding, weights, settings)
            times.append(busy_seconds(lambda run=run: found.append(run()), choice.device))
    ours, theirs = found[0], found[1::3]
    between = [share_worse(one, other) for one, other in permutations(theirs, 2)]
    return {
        "seconds": median(circle_times),
        "adamw_seconds": mean(adamw_times),
        "speedup": mean(adamw_times) / median(circle_times),
        "products": ours.products / len(neurons),
        "adamw_products": mean(run.products for run in theirs) / len(neurons),
        "projections_ratio": mean(run.products for run in theirs) / ours.products,
        "loss": float(ours.loss.mean()),
        "adamw_loss": mean(float(run.loss.mean()) for run in theirs),
        "loss_not_worse": 1 - mean(share_worse(ours, run) for run in theirs),
        "adamw_between_seeds": mean(between) if between else 0.0,
        "kurtosis": float(ours.kurtosis.median()),
        "adamw_kurtosis": mean(float(run.kurtosis.median()) for run in theirs),
        "jaccard": mean(jaccard(ours, run) for run in theirs),
        "seeds": choice.seeds,
        "cosine": mean(float(torch.cosine_similarity(ours.vectors, run.vectors, dim=2).mean()) for run in theirs),
    }


def share_worse(one: FoundChannels, other: FoundChannels) -> float:
    """Share of neurons whose first channel in `one` has a loss more than 1e-3 above that in `other`."""
    return float((one.loss[:, 0] > other.loss[:, 0] + WORSE).float().mean())


def jaccard(one: FoundChannels, other: FoundChannels) -> float:
    """Mean overlap of the top tokens of the first channels, intersection over union."""
    pairs = zip(one.token_ids[:, 0].tolist(), other.token_ids[:, 0].tolist())
    return mean(len(set(first) & set(second)) / len(set(first) | set(second)) for first, second in pairs)


if __name__ == "__main__":
    main()
