"""The scan of all neurons against the bare matrix product: what top tokens and moments cost beside it.

The ratio is to one `torch.mm` over everything, or, where its result would be too large, to the product in the
scan's own tiles, which is printed in any case. These tiles and the scan of bare vectors are imported from
`channels.scan`, which is no part of the public API.

python evals/benchmarks/scan.py [--neurons 4096] [--size 1024] [--vocabulary 32768] [--json FILE]
"""

import torch
from measure import machine, parser, show, side_by_side, write_figures
from torch import Tensor

from rotate_edit.channels.scan import CPU_COLUMNS, TILE, scan_vectors


def main() -> None:
    """Time both in turns and print their ratio."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--neurons", type=int, default=4096)
    options.add_argument("--size", type=int, default=1024)
    options.add_argument("--vocabulary", type=int, default=32768)
    options.add_argument("--top", type=int, default=10)
    options.add_argument("--repeats", type=int, default=5)
    choice = options.parse_args()
    if choice.threads:
        torch.set_num_threads(choice.threads)
    device = choice.device
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(choice.neurons, choice.size, generator=generator).to(device, dtype)
    unembedding = torch.randn(choice.vocabulary, choice.size, generator=generator).to(device, dtype)
    block, chunk = TILE.get(device, TILE["cpu"])
    chunk = CPU_COLUMNS if device == "cpu" else chunk
    tile = torch.empty(block, chunk, dtype=dtype, device=device)

    def tiled() -> None:
        for first in range(0, choice.vocabulary, chunk):
            tokens = unembedding[first : first + chunk].T
            for start in range(0, choice.neurons, block):
                rows = vectors[start : start + block]
                torch.mm(rows, tokens, out=tile[: len(rows), : tokens.shape[1]])

    calls = {
        "bare product in tiles": tiled,
        "scan: moments and top tokens": lambda: scan_vectors(vectors, unembedding, top=choice.top, product=dtype),
    }
    if choice.neurons * choice.vocabulary * dtype.itemsize < 4e9:
        whole: Tensor = torch.empty(choice.neurons, choice.vocabulary, dtype=dtype, device=device)
        calls["bare product at once"] = lambda: torch.mm(vectors, unembedding.T, out=whole)
    times = side_by_side(calls, choice.repeats, device)
    product = times.get("bare product at once", times["bare product in tiles"])
    ratio = times["scan: moments and top tokens"] / product
    work = 2 * choice.neurons * choice.size * choice.vocabulary / 1e9
    title = f"Scan of {choice.neurons:,} vectors, d {choice.size:,}, V {choice.vocabulary:,}, top {choice.top}, {dtype}"
    rows = [[name, time, work / time, time / product] for name, time in times.items()]
    show(f"{title}\n{machine(device)}", ["what", "seconds", "GFLOP/s of the product", "ratio to product"], rows)
    write_figures(
        choice.json,
        {
            "machine": machine(device),
            "neurons": choice.neurons,
            "size": choice.size,
            "vocabulary": choice.vocabulary,
            "seconds": times,
            "ratio_to_product": ratio,
        },
    )


if __name__ == "__main__":
    main()
