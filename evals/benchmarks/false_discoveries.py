"""The false-discovery rate of locating, measured where the truth is known.

python evals/benchmarks/false_discoveries.py [--draws 100] [--json FILE]

Every draw is a checkpoint of three layers of 300 Gaussian neurons, each layer with a mean and a covariance of its own.
A concept is planted in some of them. Locating runs whole: scan, candidates, search, null, p-values, rate.
"""

import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import torch
from measure import machine, parser, show, write_figures

from rotate_edit.channels.locate import SearchSettings, carries, choose_channels
from rotate_edit.channels.solver import SolverSettings

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from planted_neurons import locate_planted, write_planted

RATES = (0.05, 0.1, 0.2)
STRENGTHS = (0.0, 0.4, 0.6, 0.8, 1.0)
PLANTED = 10


def main() -> None:
    """Print the share of false neurons and of found ones at every strength and rate."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--draws", type=int, default=100)
    choice = options.parse_args()
    torch.set_num_threads(choice.threads or 1)
    rows, small = [], []
    for strength in STRENGTHS:
        shares: dict[float, list[float]] = {rate: [] for rate in RATES}
        found: dict[float, list[int]] = {rate: [] for rate in RATES}
        for seed in range(choice.draws):
            with tempfile.TemporaryDirectory() as place:
                os.environ["XDG_CACHE_HOME"] = place
                truth = write_planted(
                    Path(place) / "m", layers=3, neurons=300, planted=PLANTED, strength=strength, seed=seed
                )
                group = locate_planted(Path(place) / "m", candidates=60, seed=seed)
            if not strength:
                truth = set()
                small += [
                    one.p_value if carries(one, group.tokens, group.ids, SearchSettings(SolverSettings())) else 1.0
                    for one in group.channels
                    if one.index >= 1000
                ]
            for rate in RATES:
                settings = replace(SearchSettings(SolverSettings()), fdr=rate)
                chosen = choose_channels(group.channels, group.tokens, group.ids, settings)
                neurons = {(one.layer, one.neuron) for one in chosen}
                shares[rate].append(len(neurons - truth) / max(1, len(neurons)))
                found[rate].append(len(neurons & truth))
        for rate in RATES:
            error = stdev(shares[rate]) / choice.draws**0.5
            rows.append([strength, rate, mean(shares[rate]), error, mean(found[rate]) / PLANTED])
    title = f"Share of false neurons among those located, {choice.draws} draws"
    columns = ["strength", "rate asked", "false", "standard error", "planted ones found"]
    show(f"{title}\n{machine(choice.device)}", columns, rows)
    levels = {level: sum(p <= level for p in small) / len(small) for level in (0.1, 0.05, 0.01, 0.001)}
    print("Without anything planted, candidates with a p-value of at most:", levels, f"({len(small)} candidates)")
    write_figures(choice.json, {"machine": machine(choice.device), "rows": rows, "calibration": levels})


if __name__ == "__main__":
    main()
