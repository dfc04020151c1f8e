"""lm-eval on a model that is already loaded: items go in, one number per item comes out.

It runs silently and leaves no trace. lm-eval is always given the loaded model and tokenizer, never a name to load by
itself. So no remote code can run.
"""

import hashlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from rotate_edit.console import Report, silent
from rotate_edit.errors import BadInput, quoted
from rotate_edit.evaluation.tasks import KINDS, Task
from rotate_edit.files import write_atomically
from rotate_edit.models.batches import TOKENS_IN_A_BATCH, batched
from rotate_edit.models.fingerprint import tokenizer_hash
from rotate_edit.models.output_head import predictions

CACHE_VERSION = 1
TASK_NAME = re.compile(r"\w[\w.+-]*(?<!\.yaml)(?<!\.yml)", flags=re.ASCII | re.IGNORECASE)
# Metrics of lm-eval that are one number per item, the preferred ones first.
ITEM_METRICS = ("acc", "exact_match", "acc_norm", "em", "f1")


@dataclass(frozen=True)
class Settings:
    """How lm-eval asks.

    Attributes:
        batch_size: Number of sequences at once, or "auto".
        num_fewshot: Number of examples before each item. None takes the task's own number.
        limit: At most this many items of a task that lm-eval brings itself. None takes all.
        chat_template: Put each item in the tokenizer's chat template.
    """

    batch_size: int | str = 64
    num_fewshot: int | None = None
    limit: int | None = None
    chat_template: bool = False


@dataclass(frozen=True)
class Scores:
    """What one model scored on the items of one task, in their order.

    Attributes:
        task: Name of the task.
        kind: "accuracy", "probability" or "perplexity".
        metric: lm-eval's name of what the values are.
        chance: The accuracy of guessing, in [0, 1].
        values: One float per item. 0 or 1 for "accuracy". The probability of the right continuation for "probability".
            The log-likelihood in nats for "perplexity".
        weights: For "perplexity", how many words or bytes each value stands for. Empty otherwise.
        aggregates: lm-eval's own results, by task and metric.
    """

    task: str
    kind: str
    metric: str
    chance: float
    values: tuple[float, ...]
    weights: tuple[float, ...]
    aggregates: Mapping[str, float]


@dataclass(frozen=True)
class Harness:
    """lm-eval's tasks, loaded once for any number of models.

    Attributes:
        settings: How lm-eval asks.
        loaded: lm-eval's task objects, by the name they were asked under.
        local: Names of the tasks whose items this package chose itself. The limit does not apply to them again.
        chances: The accuracy of guessing as a definition states it, by task name.
    """

    settings: Settings
    loaded: Mapping[str, tuple[Any, ...]]
    local: frozenset[str]
    chances: Mapping[str, float]


def open_harness(tasks: Sequence[Task], settings: Settings) -> Harness:
    """Load tasks into lm-eval.

    Args:
        tasks: The tasks, local ones or lm-eval's own by name.
        settings: How lm-eval asks.

    Returns:
        The loaded tasks.

    Raises:
        BadInput: When a task does not exist or its data cannot be had.
    """
    from jinja2 import TemplateError
    from lm_eval.tasks import TaskManager

    for task in tasks:
        # lm-eval takes a path for a definition and runs the code it names; only its own tasks go by name.
        if task.config is None and not TASK_NAME.fullmatch(task.name):
            raise BadInput(
                f"{quoted(task.name)} is not the name of an lm-eval task; a definition of one's own goes into a folder "
                "of items."
            )
    loaded: dict[str, tuple[Any, ...]] = {}
    with _quiet(), _same_random_numbers_after():
        # Reading lm-eval's own fifteen thousand definitions takes seconds; local tasks do not need them.
        manager = TaskManager(include_defaults=any(task.config is None for task in tasks))
        for task in tasks:
            try:
                loaded[task.name] = tuple(manager.load([task.for_lm_eval()])["tasks"].values())
            except (OSError, KeyError, ValueError, ImportError, TypeError, IndexError, TemplateError) as error:
                reason = " ".join(str(error).split())[:300]
                raise BadInput(f"the task {task.name} cannot be loaded by lm-eval: {reason}.") from error
    chances = {task.name: float((task.config or {}).get("metadata", {}).get("chance", 0.0)) for task in tasks}
    local = frozenset(task.name for task in tasks if task.config is not None)
    return Harness(settings, loaded, local, chances)


def score(
    harness: Harness, model: Any, tokenizer: Any, *, report: Report = silent, step: str = ""
) -> dict[str, Scores]:
    """Score a loaded model on all tasks of the harness.

    Args:
        harness: The loaded tasks.
        model: The loaded transformers model.
        tokenizer: Its tokenizer.
        report: Called with progress.
        step: Name of the step in the progress.

    Returns:
        The scores by task name.

    Raises:
        BadInput: When a chat template is asked of a tokenizer that has none, or a task has no metric per item.
    """
    if harness.settings.chat_template and not getattr(tokenizer, "chat_template", None):
        raise BadInput("the tokenizer has no chat template; leave the chat template off.")
    with _quiet():
        language_model = _language_model(model, tokenizer, harness.settings.batch_size)
    return _score(harness, language_model, report, step)


def _language_model(model: Any, tokenizer: Any, batch_size: int | str) -> Any:
    """lm-eval's own wrapper of a loaded model, which scores continuations by `continuation_scores`."""
    from lm_eval.models.huggingface import HFLM

    class Scorer(HFLM):  # type: ignore[misc]
        def _loglikelihood_tokens(self, requests: Sequence[Any], *_: Any, **__: Any) -> list[tuple[float, bool]]:
            asked = [(list(context), list(continuation)) for _, context, continuation in requests]
            answers = continuation_scores(model, asked, longest=self.max_length, rows_at_once=batch_size)
            for (text, *_), answer in zip(requests, answers, strict=True):
                if text is not None:
                    self.cache_hook.add_partial("loglikelihood", text, answer)
            return answers

    return Scorer(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def continuation_scores(
    model: Any, asked: Sequence[tuple[list[int], list[int]]], *, longest: int, rows_at_once: int | str
) -> list[tuple[float, bool]]:
    """Compute the log-likelihood of continuations.

    Rows that are alike run once: the same question asked again, and all continuations of one token of a context. The
    head reads the positions before the continuations' tokens alone.

    Args:
        model: The loaded transformers model.
        asked: Pairs of a context's and a continuation's token ids. Neither is empty.
        longest: Most tokens of a row; what stands before them is cut off.
        rows_at_once: Most rows of a batch; "auto" for as many as fit.

    Returns:
        For each pair the log-likelihood in nats, and whether the continuation is what greedy decoding gives.
    """
    found: list[list[float]] = [[] for _ in asked]
    greedy = [True] * len(asked)
    readers: dict[tuple[int, ...], list[int]] = {}
    for number, (context, continuation) in enumerate(asked):
        readers.setdefault(tuple((context + continuation)[-(longest + 1) : -1]), []).append(number)
    rows = list(readers)
    if not rows:
        return []
    size = model.config.get_text_config().vocab_size
    limit = TOKENS_IN_A_BATCH
    if isinstance(rows_at_once, int):
        limit = min(limit, rows_at_once * max(map(len, rows)))
    texts = batched(rows, size, tokens_at_once=limit)
    wanted, needed = [], [max(len(asked[number][1]) for number in readers[row]) for row in rows]
    for batch, lengths, order in zip(texts.batches, texts.lengths, texts.order):
        places = torch.arange(batch.shape[1])[None, :]
        first = lengths - torch.tensor([needed[index] for index in order.tolist()])
        wanted.append((places >= first[:, None]) & (places < lengths[:, None]))
    for order, chosen, pieces in zip(texts.order, wanted, predictions(model, texts, wanted), strict=True):
        targets = [
            [(number, asked[number][1]) for number in readers[rows[order[row]]]] for row, _ in chosen.nonzero().tolist()
        ]
        # How far from its row's end each chosen position is: a continuation of n tokens begins at n.
        left = (chosen.flip(1).cumsum(1).flip(1))[chosen].tolist()
        for part, values in pieces:
            best = values.argmax(-1).tolist()
            cells = [
                (number, row, continuation[-left[place]])
                for row, place in enumerate(range(part.start, part.stop))
                for number, continuation in targets[place]
                if left[place] <= len(continuation)
            ]
            likelihoods = values[[row for _, row, _ in cells], [token for *_, token in cells]].tolist()
            for (number, row, token), value in zip(cells, likelihoods, strict=True):
                found[number].append(value)
                greedy[number] = greedy[number] and best[row] == token
    # In float32, as lm-eval adds them up.
    return [(float(torch.tensor(values).sum()), alike) for values, alike in zip(found, greedy)]


def score_checkpoint(
    harness: Harness,
    folder: Path,
    backend: str,
    options: Mapping[str, Any],
    *,
    report: Report = silent,
    step: str = "",
) -> dict[str, Scores]:
    """Score a checkpoint's folder on one of lm-eval's own backends, without remote code.

    Args:
        harness: The loaded tasks.
        folder: The checkpoint's folder, with safetensors in it.
        backend: lm-eval's name of the backend, for instance "vllm".
        options: Further arguments of the backend.
        report: Called with progress.
        step: Name of the step in the progress.

    Returns:
        The scores by task name.

    Raises:
        BadInput: When the backend is unknown, not installed, or cannot load the checkpoint.
    """
    if backend == "vllm" and importlib.util.find_spec("vllm") is None:
        raise BadInput("the backend vllm is not installed; install lm-eval[vllm], or leave --backend out.")
    with _quiet(), _same_random_numbers_after():
        from lm_eval.api.registry import get_model

        if not any(folder.glob("*.safetensors")):
            raise BadInput(f"{folder.name} holds no safetensors; other formats are not opened.")
        arguments = {**options, "pretrained": str(folder), "trust_remote_code": False}
        if backend == "vllm":
            arguments["load_format"] = "safetensors"
        try:
            language_model = get_model(backend).create_from_arg_obj(
                arguments, {"batch_size": harness.settings.batch_size}
            )
        except (ImportError, KeyError, ValueError, OSError, RuntimeError, TypeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise BadInput(f"lm-eval's backend {backend} cannot be used for {folder.name}: {reason}.") from error
    return _score(harness, language_model, report, step)


def _score(harness: Harness, language_model: Any, report: Report, step: str) -> dict[str, Scores]:
    settings = harness.settings
    scores: dict[str, Scores] = {}
    with _quiet(), _same_random_numbers_after():
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        language_model.set_cache_hook(_Progress(report, step, harness))
        for local in (True, False):
            names = [name for name in harness.loaded if (name in harness.local) == local]
            if not names:
                continue
            found = simple_evaluate(
                model=language_model,
                tasks=[task for name in names for task in harness.loaded[name]],
                task_manager=TaskManager(include_defaults=False),
                num_fewshot=settings.num_fewshot,
                limit=None if local else settings.limit,
                apply_chat_template=settings.chat_template,
                bootstrap_iters=0,
                log_samples=True,
            )
            assert found is not None  # lm-eval returns None on the other ranks of a distributed run only
            for name in names:
                scores[name] = _scores(name, harness.loaded[name], found, harness.chances[name])
    return scores


def _scores(name: str, group: Sequence[Any], found: Mapping[str, Any], chance: float) -> Scores:
    values: list[float] = []
    weights: list[float] = []
    options: list[float] = []
    metrics: list[str] = []
    kinds = {KINDS[task.OUTPUT_TYPE] for task in group}
    if len(kinds) > 1:
        raise BadInput(f"the tasks of {name} do not measure one thing; name its parts instead.")
    kind = kinds.pop()
    for task in group:
        samples = found["samples"][task.task_name]
        samples = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
        metric = _item_metric(task, samples[0], kind)
        metrics.append(metric)
        for sample in samples:
            if kind == "accuracy":
                values.append(float(sample[metric]))
                options.append(len(sample["filtered_resps"]))
            elif kind == "probability":
                values.append(math.exp(sample["filtered_resps"][0][0]))
            else:
                values.append(float(sample[metric][0]))
                weights.append(float(sample[metric][1]))
    if kind == "accuracy" and group[0].OUTPUT_TYPE == "multiple_choice":
        chance = float(np.mean([1 / count for count in options]))
    aggregates = {
        f"{task.task_name}/{key}": float(value)
        for task in group
        for key, value in sorted(found["results"][task.task_name].items())
        if isinstance(value, int | float) and key != "sample_len"
    }
    return Scores(name, kind, metrics[0], chance, tuple(values), tuple(weights), aggregates)


def _item_metric(task: Any, sample: Mapping[str, Any], kind: str) -> str:
    have = list(sample["metrics"])
    if kind == "perplexity":
        wanted = [name for name in ("word_perplexity", "byte_perplexity", "bits_per_byte") if name in have]
    elif kind == "probability":
        wanted = ["probability"]
    else:
        own = [entry["metric"] for entry in task.config.metric_list or ()]
        wanted = [name for name in (*own[:1], *ITEM_METRICS, *have) if isinstance(sample.get(name), int | float | bool)]
    if not wanted:
        raise BadInput(f"the task {task.task_name} has no metric that is one number an item ({', '.join(have)}).")
    return str(wanted[0])


class _Progress:
    """Counts answered requests for the progress bar. lm-eval calls it for each one (its cache hook)."""

    def __init__(self, report: Report, step: str, harness: Harness) -> None:
        self.report, self.step, self.done = report, step, 0
        self.total = 0
        for name, group in harness.loaded.items():
            for task in group:
                items = len(task.eval_docs)
                if harness.settings.limit is not None and name not in harness.local:
                    items = min(items, harness.settings.limit)
                asked = len(task.doc_to_choice(task.eval_docs[0])) if task.OUTPUT_TYPE == "multiple_choice" else 1
                self.total += items * asked

    def add_partial(self, *_: Any) -> None:
        self.done += 1
        self.total = max(self.total, self.done)
        self.report(self.step, self.done, self.total)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's log lines, progress bars and prints off the terminal.

    The caller has its own.
    """
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.evaluator
    import lm_eval.models.huggingface
    from tqdm import tqdm

    logger = logging.getLogger("lm_eval")
    level = logger.level

    def no_bar(*arguments: Any, **options: Any) -> Any:
        return tqdm(*arguments, **{**options, "disable": True})

    modules = (lm_eval.api.task, lm_eval.api.model, lm_eval.evaluator, lm_eval.models.huggingface)
    with ExitStack() as stack:
        for module in modules:
            if hasattr(module, "tqdm"):
                stack.enter_context(mock.patch.object(module, "tqdm", no_bar))
            if hasattr(module, "get_git_commit_hash"):
                # It asks git about the user's working folder, which must stay private, and git may fail there.
                stack.enter_context(mock.patch.object(module, "get_git_commit_hash", return_value=None))
            if hasattr(module, "add_env_info"):
                # It lists every installed package through pip, which takes seconds each time and is used by nobody.
                stack.enter_context(mock.patch.object(module, "add_env_info"))
        stack.enter_context(redirect_stdout(io.StringIO()))
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


@contextmanager
def _same_random_numbers_after() -> Iterator[None]:
    """Restore the state of every random generator at the end. lm-eval seeds them all."""
    plain, numbers, tensors = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    try:
        yield
    finally:
        random.setstate(plain)
        np.random.set_state(numbers)
        torch.random.set_rng_state(tensors)


# The base model's scores are kept between runs.


def cache_key(task: Task, settings: Settings, model: Any, weights: str, tokenizer: Any) -> str | None:
    """Hash everything that decides a task's scores.

    That is the weights, the tokenizer, the questions, the settings and the versions.

    Args:
        task: The task.
        settings: How lm-eval asks.
        model: The loaded model, for its dtype and device.
        weights: Hash of the model's weights.
        tokenizer: Its tokenizer.

    Returns:
        SHA-256 as 64 hexadecimal digits. None when code in the definition decides too.
    """
    if task.has_code:
        return None
    parts = {
        "cache": CACHE_VERSION,
        "weights": weights,
        "tokenizer": tokenizer_hash(tokenizer),
        "task": task.content_hash(),
        "version": task.version,
        "settings": asdict(settings),
        "dtype": str(next(model.parameters()).dtype),
        "device": next(model.parameters()).device.type,
        "lm_eval": importlib.metadata.version("lm_eval"),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read_cached(folder: Path, key: str) -> Scores | None:
    """Read scores that `write_cached` wrote.

    Args:
        folder: The cache's folder.
        key: What `cache_key` returned.

    Returns:
        The scores. None when there are none or the file is damaged.
    """
    try:
        content = json.loads((folder / f"{key}.json").read_text(encoding="utf-8"))
        fields = {**content, "values": tuple(content["values"]), "weights": tuple(content["weights"])}
        return Scores(**fields)
    except (OSError, ValueError, TypeError, KeyError):
        # A cache may always be missing or broken: the scores are then computed again.
        return None


def write_cached(folder: Path, key: str, scores: Scores) -> None:
    """Keep scores for the next run.

    A folder that cannot be written costs the next run time, and nothing else. It is logged as a warning.

    Args:
        folder: The cache's folder. It is made if need be.
        key: What `cache_key` returned.
        scores: The scores.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / f"{key}.json", json.dumps(asdict(scores)))
    except OSError:
        logging.getLogger(__name__).warning("the cache of baseline results cannot be written")
