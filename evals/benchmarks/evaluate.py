"""Evaluation of a base and five variants in one process, against one load and six scoring passes on their own.

python evals/benchmarks/evaluate.py [--model demo] [--items 240] [--variants 5] [--json FILE]

It times the parts of an evaluation one by one, so it imports them from where they are: `evaluation.harness`,
`evaluation.items` and `evaluation.evaluate` are no part of the public API.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from measure import machine, parser, seconds, show, write_figures

from rotate_edit import (
    Checkpoint,
    Edit,
    Items,
    MatrixChange,
    Plan,
    Variant,
    load_model,
    load_tokenizer,
    open_checkpoint,
    open_items,
    read_matrix,
)
from rotate_edit.evaluation import harness as scoring
from rotate_edit.evaluation.evaluate import evaluate
from rotate_edit.evaluation.items import divide


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


Time = tuple[float, float]


def timed(device: str, call: Callable[[], object], repeats: int = 1) -> Time:
    """The shortest time of a call, and the least processor time: a busy machine makes only the first longer."""
    both = []
    for _ in range(repeats):
        begin = time.process_time()
        both.append((seconds(call, device), time.process_time() - begin))
    return min(wall for wall, _ in both), min(busy for _, busy in both)


def measure(model_name: str, device: str, count: int, most: int) -> tuple[dict[str, Time], int]:
    """Every part and every whole, timed, and the number of items; `count` variants, at most `most` items a part."""
    checkpoint, items = open_checkpoint(model_name), open_items("demo")
    plan = Plan(concepts=("dogs",), neighbours=("cats", "horses", "wildlife"), items=most)
    variants = [Variant(f"variant {number}", slight_edit(checkpoint, number)) for number in range(count)]
    tasks = divide(items.tasks, plan)[0]
    harness = scoring.open_harness(tasks, plan.settings)
    tokenizer = load_tokenizer(checkpoint)
    # The first of everything warms up: imports, memory, lm-eval's own tables.
    model = load_model(checkpoint, device=device)
    scoring.score(harness, model, tokenizer)

    def load() -> None:
        load_model(checkpoint, device=device)
        load_tokenizer(checkpoint)

    def whole(cache: Path | None, asked: Items = items) -> None:
        loaded = load_model(checkpoint, device=device)
        evaluate(loaded, load_tokenizer(checkpoint), variants, plan, asked, weights_hash="benchmark", cache=cache)

    found = {
        "load": timed(device, load, 2),
        "alone": timed(device, lambda: scoring.score(harness, model, tokenizer), 2),
        # A pass is everything that is measured on one model: lm-eval's items, prompts, continuations.
        "pass": timed(device, lambda: evaluate(model, tokenizer, [], plan, items), 2),
        "whole alone": timed(device, lambda: whole(None, replace(items, texts={}, prompts=(), generation=()))),
    }
    with tempfile.TemporaryDirectory() as folder:
        found["whole"] = timed(device, lambda: whole(Path(folder)))
        found["cached"] = timed(device, lambda: whole(Path(folder)))
    return found, sum(len(task.rows) for task in tasks)


def main() -> None:
    """Time the parts, then the whole, then the whole with a cached baseline."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--model", default="demo")
    options.add_argument("--items", type=int, default=240, help="at most this many items of each part")
    options.add_argument("--variants", type=int, default=5)
    choice = options.parse_args()
    if choice.threads:
        torch.set_num_threads(choice.threads)
    found, items = measure(choice.model, choice.device, choice.variants, choice.items)
    passes = choice.variants + 1

    def sum_of(part: str) -> Time:
        wall, busy = (load + passes * each for load, each in zip(found["load"], found[part]))
        return wall, busy

    lines = {
        "one load": found["load"],
        "one pass: lm-eval alone": found["alone"],
        "one pass: with prompts and continuations": found["pass"],
        f"one load and {passes} passes of lm-eval alone": sum_of("alone"),
        "evaluated in one process, lm-eval alone": found["whole alone"],
        f"one load and {passes} passes": sum_of("pass"),
        "evaluated in one process": found["whole"],
        "the same with a cached baseline": found["cached"],
    }
    wholes = {"": ("whole", "pass"), "_lm_eval_alone": ("whole alone", "alone"), "_cached_baseline": ("cached", "pass")}
    ratios = {name: [a / b for a, b in zip(found[whole], sum_of(part))] for name, (whole, part) in wholes.items()}
    figures = {
        "seconds": {name: pair[0] for name, pair in lines.items()},
        "processor_seconds": {name: pair[1] for name, pair in lines.items()},
        **{f"ratio{name}": pair[0] for name, pair in ratios.items()},
        **{f"ratio_processor{name}": pair[1] for name, pair in ratios.items()},
        "items": items,
        "variants": choice.variants,
        "machine": machine(choice.device),
    }
    rows = [[name, *(f"{figure:.2f}" for figure in pair)] for name, pair in lines.items()]
    rows += [[f"ratio{name.replace('_', ' ')}", *(f"{figure:.3f}" for figure in pair)] for name, pair in ratios.items()]
    show(
        f"Base and {choice.variants} variants of {choice.model}, {items} items ({figures['machine']})",
        ["what", "seconds", "processor seconds"],
        rows,
    )
    write_figures(choice.json, figures)


if __name__ == "__main__":
    main()
