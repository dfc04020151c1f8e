"""Evaluation of a base and five variants in one process, against one load and six scoring passes on their own.

python evals/benchmarks/evaluate.py [--model demo] [--items 240] [--variants 5] [--json FILE]
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from measure import machine, parser, seconds, show, write_figures

from rotate_edit import scoring
from rotate_edit.checkpoint import Checkpoint, load_model, load_tokenizer, open_checkpoint, read_matrix
from rotate_edit.comparison import Plan
from rotate_edit.edit import Edit, MatrixChange
from rotate_edit.evaluate import divide, evaluate
from rotate_edit.tasks import Items, open_items
from rotate_edit.variants import Variant


def slight_edit(checkpoint: Checkpoint, seed: int) -> Edit:
    """A random rank-one change of every `out` matrix: what it does is of no interest here, what it costs is."""
    generator = torch.Generator().manual_seed(seed)
    changes = []
    for layer in range(checkpoint.layers):
        vectors = read_matrix(checkpoint, layer, "out")
        direction = torch.randn(1, vectors.shape[1], generator=generator)
        direction /= direction.norm()
        left = -(vectors @ direction.T)
        changes.append(MatrixChange("out", layer, None, torch.arange(len(vectors)), left, direction, 1.0, "dogs"))
    return Edit("random", tuple(changes))


def main() -> None:
    """Time the parts, then the whole, then the whole with a cached baseline."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--model", default="demo")
    options.add_argument("--items", type=int, default=240, help="at most this many items of each part")
    options.add_argument("--variants", type=int, default=5)
    choice = options.parse_args()
    if choice.threads:
        torch.set_num_threads(choice.threads)
    checkpoint = open_checkpoint(choice.model)
    items = open_items("demo")
    plan = Plan(concepts=("dogs",), neighbours=("cats", "horses", "wildlife"), items=choice.items)
    edits = [slight_edit(checkpoint, seed) for seed in range(choice.variants)]
    variants = [Variant(f"variant {number}", edit) for number, edit in enumerate(edits)]
    harness = scoring.open_harness(divide(items.tasks, plan)[0], plan.settings)
    tokenizer = load_tokenizer(checkpoint)
    # The first of everything warms up: imports, memory, lm-eval's own tables.
    model = load_model(checkpoint, device=choice.device)
    scoring.score(harness, model, tokenizer)

    def load() -> None:
        load_model(checkpoint, device=choice.device)
        load_tokenizer(checkpoint)

    def whole(cache: Path | None, asked: Items = items) -> None:
        loaded = load_model(checkpoint, device=choice.device)
        evaluate(loaded, load_tokenizer(checkpoint), variants, plan, asked, weights_hash="benchmark", cache=cache)

    def timed(call: Callable[[], object], repeats: int = 1) -> tuple[float, float]:
        """The shortest time of a call, and the least processor time: a busy machine makes only the first longer."""
        both = []
        for _ in range(repeats):
            begin = time.process_time()
            both.append((seconds(call, choice.device), time.process_time() - begin))
        return min(wall for wall, _ in both), min(busy for _, busy in both)

    loading = timed(load, 2)
    # A pass is everything that is measured on one model: lm-eval's items, prompts, continuations.
    scored = timed(lambda: scoring.score(harness, model, tokenizer), 2)
    passed = timed(lambda: evaluate(model, tokenizer, [], plan, items), 2)
    passes = choice.variants + 1
    alone = timed(lambda: whole(None, replace(items, texts={}, prompts=(), generation=())))
    parts_alone = [load_time + passes * pass_time for load_time, pass_time in zip(loading, scored)]
    with tempfile.TemporaryDirectory() as folder:
        uncached = timed(lambda: whole(Path(folder)))
        cached = timed(lambda: whole(Path(folder)))
    parts = [load_time + passes * pass_time for load_time, pass_time in zip(loading, passed)]
    lines = {
        "one load": loading,
        "one pass: lm-eval alone": scored,
        "one pass: with prompts and continuations": passed,
        f"one load and {passes} passes of lm-eval alone": parts_alone,
        "evaluated in one process, lm-eval alone": alone,
        f"one load and {passes} passes": parts,
        "evaluated in one process": uncached,
        "the same with a cached baseline": cached,
    }
    figures = {
        "seconds": {name: pair[0] for name, pair in lines.items()},
        "processor_seconds": {name: pair[1] for name, pair in lines.items()},
        "ratio": uncached[0] / parts[0],
        "ratio_lm_eval_alone": alone[0] / parts_alone[0],
        "ratio_cached_baseline": cached[0] / parts[0],
        "ratio_processor": uncached[1] / parts[1],
        "ratio_processor_cached_baseline": cached[1] / parts[1],
        "items": sum(len(task.rows) for task in divide(items.tasks, plan)[0]),
        "variants": choice.variants,
        "machine": machine(choice.device),
    }
    show(
        f"Base and {choice.variants} variants of {choice.model}, {figures['items']} items ({figures['machine']})",
        ["what", "seconds", "processor seconds"],
        [
            *([name, f"{pair[0]:.2f}", f"{pair[1]:.2f}"] for name, pair in lines.items()),
            ["evaluated / parts", f"{figures['ratio']:.3f}", f"{figures['ratio_processor']:.3f}"],
            ["lm-eval alone / its parts", f"{figures['ratio_lm_eval_alone']:.3f}", f"{alone[1] / parts_alone[1]:.3f}"],
            [
                "cached baseline / parts",
                f"{figures['ratio_cached_baseline']:.3f}",
                f"{figures['ratio_processor_cached_baseline']:.3f}",
            ],
        ],
    )
    write_figures(choice.json, figures)


if __name__ == "__main__":
    main()
