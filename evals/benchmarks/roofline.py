"""How much of the solver's time lies outside its products with the vocabulary matrix.

python evals/benchmarks/roofline.py [--size 256] [--vocabulary 32768] [--neurons 64] [--channels 1] [--json FILE]

The search is timed whole, and then its products alone, replayed with the same number of rows each time; `outside_share`
is the share of the rest: setting up, line searches, moments, gradients, describing channels and claiming tokens.
It counts the rows of every step, so it imports `channels.batch`, which is no part of the public API.
"""

import sys
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
from measure import busy_seconds, machine, parser, show, write_figures

from rotate_edit import SolverSettings, find_channels, token_weights
from rotate_edit.channels import batch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from planted import planted


def main() -> None:
    """Time searches over planted vocabularies and their products alone; print the share of the rest."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--size", type=int, default=256, help="d")
    options.add_argument("--vocabulary", type=int, action="append", default=[], help="tokens; repeatable")
    options.add_argument("--neurons", type=int, default=64)
    options.add_argument("--channels", type=int, default=1)
    options.add_argument("--rows", type=int, default=SolverSettings.rows)
    options.add_argument("--repeats", type=int, default=5)
    choice = options.parse_args()
    if choice.threads:
        torch.set_num_threads(choice.threads)
    wide = choice.device == "cuda"
    measured = {size: share(size, choice) for size in choice.vocabulary or ([128_256] if wide else [8192, 32_768])}
    rows = [[size, *figures.values()] for size, figures in measured.items()]
    title = f"{choice.neurons} neurons x {choice.channels} channels, d {choice.size}"
    columns = ["vocabulary", "seconds", "products", "outside_share"]
    show(f"{title}\n{machine(choice.device)}", columns, rows)
    worst = max(figures["outside_share"] for figures in measured.values())
    write_figures(choice.json, {"outside_share": worst, "machine": machine(choice.device), "vocabularies": measured})


def share(vocabulary: int, choice) -> dict[str, float]:
    """Seconds of a search, of its products alone, and the share of the rest, for one vocabulary size."""
    truth = planted(neurons=choice.neurons, size=choice.size, vocabulary=vocabulary, clusters=vocabulary // 40)
    neurons, unembedding = truth.neurons.to(choice.device), truth.unembedding.to(choice.device)
    weights = token_weights(unembedding)
    settings = SolverSettings(channels=choice.channels, rows=choice.rows, unsupported_limit=choice.channels)
    counts: list[int] = []
    step = batch.step

    def counted(search, *others) -> None:
        counts.append(search.count)
        step(search, *others)

    batch.step = counted
    found = find_channels(neurons, unembedding, weights, settings)
    batch.step = step
    # What is projected once a channel, to begin and to describe it, comes in blocks of the size of a chunk.
    block = max(batch.PRODUCT_ROWS, batch.CPU_CHUNK // vocabulary) if choice.device == "cpu" else choice.neurons
    single = [block] * ((found.products - 2 * sum(counts)) // block)
    projections = torch.empty(max(counts), vocabulary, device=choice.device)
    directions = torch.randn(max(counts), choice.size, device=choice.device)

    def products() -> None:
        for rows in counts:
            torch.mm(directions[:rows], unembedding.T, out=projections[:rows])
            torch.mm(projections[:rows], unembedding)
        for rows in single:
            torch.mm(directions[:rows], unembedding.T, out=projections[:rows])

    def search() -> None:
        find_channels(neurons, unembedding, weights, settings)

    whole, alone = [], []
    for _ in range(choice.repeats + 1):
        with tf32(choice.device == "cuda"):
            alone.append(busy_seconds(products, choice.device))
        whole.append(busy_seconds(search, choice.device))
    # The first of each warms up.
    whole, alone = median(whole[1:]), median(alone[1:])
    return {"seconds": whole, "products": alone, "outside_share": 1 - alone / whole}


@contextmanager
def tf32(wanted: bool):
    """The products alone are timed in the precision in which the solver makes them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if wanted else before)
    yield
    torch.set_float32_matmul_precision(before)


if __name__ == "__main__":
    main()
