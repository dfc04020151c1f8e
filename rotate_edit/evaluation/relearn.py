"""Does an erased concept come back after fine-tuning on paragraphs about it?

The edited model is fine-tuned on the paragraphs and asked again. The paragraphs do not contain what is asked. So an
accuracy that returns was still in the weights. The settings are EMBER's (arXiv 2606.03695): at most 100 paragraphs, 2
epochs, AdamW at 1e-5, one paragraph at a time, 256 tokens.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from rotate_edit.console import Report, silent
from rotate_edit.errors import BadInput
from rotate_edit.evaluation import harness as scoring
from rotate_edit.evaluation import statistics
from rotate_edit.evaluation.compare import Plan
from rotate_edit.evaluation.evaluate import divide
from rotate_edit.evaluation.harness import Scores
from rotate_edit.evaluation.tasks import Items, Task
from rotate_edit.evaluation.variants import Variant, opened


@dataclass(frozen=True)
class Training:
    """How the model is fine-tuned.

    All parameters are trained by AdamW at a constant learning rate, one paragraph a step.

    Attributes:
        paragraphs: At most this many paragraphs are used.
        epochs: Number of passes over the paragraphs.
        learning_rate: AdamW's learning rate, constant.
        weight_decay: AdamW's weight decay.
        tokens: At most this many tokens of each paragraph are used.
        seed: Seed of the order of the paragraphs and of dropout.
    """

    paragraphs: int = 100
    epochs: int = 2
    learning_rate: float = 1e-5
    weight_decay: float = 0.01
    tokens: int = 256
    seed: int = 0


@contextmanager
def relearned(
    model: Any,
    tokenizer: Any,
    paragraphs: Sequence[str],
    training: Training,
    *,
    report: Report = silent,
    step: str = "relearn",
    after_epoch: Callable[[], None] | None = None,
) -> Iterator[list[float]]:
    """Fine-tune the model as it stands, and put its weights back bit for bit when the block ends.

    Args:
        model: The loaded model.
        tokenizer: Its tokenizer.
        paragraphs: The texts to train on.
        training: How to train.
        report: Called with progress.
        step: Name of the step in the progress.
        after_epoch: Called after each epoch, with the model in evaluation mode.

    Yields:
        The mean loss of each epoch, in nats per token.

    Raises:
        BadInput: When there is no text to train on.
    """
    device = next(model.parameters()).device
    with put_back(model):
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(training.seed)
            losses = _train(model, tokenizer, paragraphs, training, report, step, after_epoch)
        yield losses


@contextmanager
def put_back(model: Any) -> Iterator[None]:
    """Put a model's weights back bit for bit when the block ends, whatever was trained in it.

    Args:
        model: The loaded model.
    """
    saved = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    kept = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        yield
    finally:
        model.eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(saved[name])
                parameter.requires_grad_(kept[name])
                parameter.grad = None


def _train(
    model: Any,
    tokenizer: Any,
    paragraphs: Sequence[str],
    training: Training,
    report: Report,
    step: str,
    after_epoch: Callable[[], None] | None,
) -> list[float]:
    device = next(model.parameters()).device
    encoded = tokenizer(list(paragraphs[: training.paragraphs]))["input_ids"] if paragraphs else []
    rows = [torch.tensor([ids[: training.tokens]], device=device) for ids in encoded if len(ids) > 1]
    if not rows:
        raise BadInput("there are no paragraphs to relearn from; the items need relearn-CONCEPT.jsonl files.")
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay, foreach=False
    )
    shuffled = random.Random(training.seed)
    losses = []
    for epoch in range(training.epochs):
        total = 0.0
        model.train()
        for done, row in enumerate(shuffled.sample(rows, len(rows))):
            report(step, epoch * len(rows) + done, training.epochs * len(rows))
            loss = model(input_ids=row, labels=row, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach())
        losses.append(total / len(rows))
        model.eval()
        if after_epoch is not None:
            after_epoch()
    report(step, training.epochs * len(rows), training.epochs * len(rows))
    return losses


def relearn(
    model: Any,
    tokenizer: Any,
    variants: Sequence[Variant],
    plan: Plan,
    items: Items,
    *,
    training: Training | None = None,
    probe: Callable[[Any], float] | None = None,
    report: Report = silent,
) -> dict[str, Any]:
    """Ask about the edited concepts before and after relearning, on the base and on every variant.

    The base is fine-tuned too. What it gains says how much the paragraphs teach.

    Args:
        model: The loaded base model.
        tokenizer: Its tokenizer.
        variants: The edited models.
        plan: What is asked.
        items: The evaluation items, with multiple-choice tasks and paragraphs for relearning.
        training: How to train. By default EMBER's settings.
        probe: A function from the model to one number, for instance its concept mass.
        report: Called with progress.

    Returns:
        Plain JSON with `training`, `paragraphs` (how many were used) and `models` by name. Each model has `before` and
        `after`, its accuracies. `regained` is the share of what it had lost that came back. `kept` is what is left of
        the base's accuracy above chance after relearning. `losses` is the mean loss of each epoch in nats per token.
        `epochs` is the accuracy after each epoch. With a probe, `probe` has its value before relearning and after each
        epoch.

    Raises:
        BadInput: When the items hold no multiple-choice items or no paragraphs about the concepts.
    """
    training = training or Training()
    wanted = {name.casefold() for name in plan.concepts}
    paragraphs = [text for name, texts in items.relearning.items() if name.casefold() in wanted for text in texts]
    tasks = _own_items(items, plan)
    harness = scoring.open_harness(tasks, plan.settings)
    models: dict[str, Any] = {}
    base: Scores | None = None
    for variant in [Variant("base"), *variants]:
        with _as_it_is(model) if variant.name == "base" else opened(model, variant) as edited:
            asked: list[Scores] = []
            probed: list[float] = []

            def ask(name: str = variant.name, model: Any = edited, asked: Any = asked, probed: Any = probed) -> None:
                asked.append(_pooled(scoring.score(harness, model, tokenizer, report=report, step=f"ask {name}")))
                probed += [probe(model)] if probe else []

            ask()
            step = f"relearn {variant.name}"
            with relearned(
                edited, tokenizer, paragraphs, training, report=report, step=step, after_epoch=ask
            ) as losses:
                pass
        base = asked[0] if base is None else base
        described = _described(base, asked[0], asked[-1], losses, plan.seed)
        described["epochs"] = [_accuracy(scores) for scores in asked[1:]]
        models[variant.name] = described | ({"probe": probed} if probe else {})
    return {"training": asdict(training), "paragraphs": min(len(paragraphs), training.paragraphs), "models": models}


@contextmanager
def _as_it_is(model: Any) -> Iterator[Any]:
    yield model


def _own_items(items: Items, plan: Plan) -> list[Task]:
    tasks, parts = divide([task for task in items.tasks if task.kind == "accuracy"], plan)
    own = []
    for task in tasks:
        places = [place for part in parts if (part.task, part.role) == (task.name, "concept") for place in part.rows]
        if places:
            own.append(task.with_rows([task.rows[place] for place in places]))
    if not own:
        raise BadInput(f"the items hold no multiple-choice items about {', '.join(plan.concepts)}.")
    return own


def _pooled(scores: dict[str, Scores]) -> Scores:
    first = next(iter(scores.values()))
    values = tuple(value for one in scores.values() for value in one.values)
    chances = [one.chance for one in scores.values() for _ in one.values]
    return replace(first, values=values, chance=sum(chances) / len(chances))


def _described(base: Scores, before: Scores, after: Scores, losses: list[float], seed: int) -> dict[str, Any]:
    regained = statistics.regained(base.values, before.values, after.values, seed=seed)
    kept = statistics.kept_accuracy(base.values, after.values, base.chance, seed=seed)
    return {
        "before": _accuracy(before),
        "after": _accuracy(after),
        "regained": statistics.measure(regained).plain(),
        "kept": statistics.measure(kept).plain(),
        "losses": losses,
    }


def _accuracy(scores: Scores) -> dict[str, Any]:
    return statistics.wilson(round(sum(scores.values)), len(scores.values)).plain()
