"""How the support of channels is distributed where the truth is known: real channels, injected ones, and pure chance.

python evals/benchmarks/support.py [--neurons 128] [--channels 7] [--model FOLDER ...] [--json FILE]

On a planted vocabulary a channel is real when at least half of its top tokens belong to concepts that were mixed into
its neuron, else it was injected by the search. `chance` are neurons that hold no concept at all. For a model the
neurons of one layer stand beside Gaussian vectors of the same covariance, in which only chance can put a concept.
"""

import sys
from pathlib import Path

import torch
from measure import machine, parser, show, write_figures
from torch import Tensor

from rotate_edit import FoundChannels, SolverSettings, find_channels, open_checkpoint, read_matrix, token_weights

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from planted import planted

MOMENTS = ("weighted", "zeroed")
THRESHOLD = SolverSettings.support_threshold
KINDS = ("real", "injected", "chance")


def main() -> None:
    """Print the quantiles of the support in every group and its share below the threshold."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--neurons", type=int, default=128)
    options.add_argument("--size", type=int, default=256, help="d of the planted vocabulary")
    options.add_argument("--vocabulary", type=int, default=8192)
    options.add_argument("--channels", type=int, default=7)
    options.add_argument("--model", action="append", default=[], help="checkpoint folder, Hub id or demo; repeatable")
    choice = options.parse_args()
    if choice.threads:
        torch.set_num_threads(choice.threads)
    groups: dict[str, dict[str, float]] = {}
    for moments in MOMENTS:
        groups |= {f"planted, {moments}: {name}": one for name, one in planted_groups(moments, choice).items()}
    shares = {kind: [groups[f"planted, {moments}: {kind}"]["below"] for moments in MOMENTS] for kind in KINDS}
    for model in choice.model:
        groups |= {f"{Path(model).name}: {name}": one for name, one in model_groups(model, choice).items()}
    columns = ["channels", "number", "5 %", "median", "95 %", "99 %", f"share below {THRESHOLD:g}"]
    title = f"Support of {choice.channels} channels of {choice.neurons} neurons"
    show(f"{title}\n{machine(choice.device)}", columns, [[name, *one.values()] for name, one in groups.items()])
    figures = {"below_threshold": min(shares["injected"]), "chance_below_threshold": min(shares["chance"])}
    figures["real_above_threshold"] = 1 - max(shares["real"])
    write_figures(choice.json, figures | {"machine": machine(choice.device), "groups": groups})


def decompose(neurons: Tensor, unembedding: Tensor, weights: Tensor, moments: str | None, choice) -> FoundChannels:
    """All channels asked for, supported or not."""
    settings = SolverSettings(channels=choice.channels, moments=moments, unsupported_limit=choice.channels)
    device = choice.device
    return find_channels(neurons.to(device), unembedding.to(device), weights.to(device), settings)


def planted_groups(moments: str, choice) -> dict[str, dict[str, float]]:
    """The support of real and injected channels of planted neurons and of channels of neurons without a concept."""
    clusters = choice.vocabulary // 40
    truth = planted(choice.neurons, choice.size, choice.vocabulary, clusters)
    weights = token_weights(truth.unembedding)
    found = decompose(truth.neurons, truth.unembedding, weights, moments, choice)
    own = truth.clusters[truth.concepts].flatten(1)
    ids = found.token_ids.cpu()
    real = torch.stack([torch.isin(rows, tokens).float().mean(dim=1) >= 0.5 for rows, tokens in zip(ids, own)])
    noise = torch.randn(truth.neurons.shape, generator=torch.Generator().manual_seed(1))
    chance = decompose(noise, truth.unembedding, weights, moments, choice).support
    support = found.support.cpu()
    return {kind: quantiles(values) for kind, values in zip(KINDS, (support[real], support[~real], chance))}


def model_groups(model: str, choice) -> dict[str, dict[str, float]]:
    """The support of channels of a layer's neurons and of Gaussian vectors with the same mean and covariance, under
    the vocabulary rules of `rotate-edit decompose`."""
    from rotate_edit import VocabularyRules, read_projections, read_vocabulary

    checkpoint = open_checkpoint(model)
    layer = checkpoint.layers // 2 + 1
    matrix = read_matrix(checkpoint, layer, "out")
    table, weights = read_projections(checkpoint, read_vocabulary(checkpoint, VocabularyRules())).of(layer, "out")
    mean = matrix.mean(dim=0)
    # Random combinations of the centred neurons have their covariance, whatever its rank.
    mixing = torch.randn(choice.neurons, len(matrix), generator=torch.Generator().manual_seed(2)) / len(matrix) ** 0.5
    parts = {"neurons": matrix[: choice.neurons], "chance": mean + mixing @ (matrix - mean)}
    return {name: quantiles(decompose(some, table, weights, None, choice).support) for name, some in parts.items()}


def quantiles(values: Tensor) -> dict[str, float]:
    """Number of values, their 5, 50, 95 and 99 per cent quantiles, and the share below the threshold."""
    values = values.flatten().double().cpu()
    if not len(values):
        return {"n": 0} | dict.fromkeys(["low", "median", "high", "highest", "below"], float("nan"))
    low, median, high, highest = torch.quantile(values, torch.tensor([0.05, 0.5, 0.95, 0.99]).double()).tolist()
    below = float((values < THRESHOLD).double().mean())
    return {"n": len(values), "low": low, "median": median, "high": high, "highest": highest, "below": below}


if __name__ == "__main__":
    main()
