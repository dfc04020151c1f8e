"""What a job will take, counted from its settings before any weight is read.

Counts that only the work itself would tell (iterations of a search, groups of a concept's tokens) are those measured
on the demo model and on a model of real prose. Where a step may end early it is taken to go on to its end.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rotate_edit.channels.cost import CHANNEL_BYTES, PRODUCTS, search_operations, shard_memory
from rotate_edit.channels.locate import SearchSettings
from rotate_edit.edits.methods import EditMethod
from rotate_edit.edits.strength import Goal
from rotate_edit.edits.writing.cost import estimate_patch
from rotate_edit.evaluation.compare import Plan
from rotate_edit.evaluation.evaluate import divide, texts_about
from rotate_edit.evaluation.measures import CELLS_KEPT
from rotate_edit.evaluation.tasks import Items
from rotate_edit.machine import PROCESS_WITH_TRANSFORMERS, START_WITH_TRANSFORMERS, Cost
from rotate_edit.models.checkpoint import Checkpoint
from rotate_edit.models.cost import SMALL_MODEL, estimate_live, parameters, size_of, table_memory, to_download
from rotate_edit.models.output_head import CELLS_AT_ONCE
from rotate_edit.models.prompted_text import NEW_TOKENS

# Products with the vocabulary matrix of a search that asks for one concept: 20 to 26 measured.
PRODUCTS_ASKING = 26
# Share of the candidates that stand out: at most so many were measured.
LOCATED = 0.05
# Seconds of the demo model's forward passes over the seconds of their products alone: 1.1 to 1.9 measured on one
# thread, about 3.4 on two, which the small products around the large ones do not fill. A model of 135 million
# parameters fills them better.
FORWARD_OVERHEAD = 2.5
LARGE_OVERHEAD = 1.6
# When a concept's groups are chosen by trying, three divisions of it are tried. Together they search about so many
# times the candidates.
SEARCHES, GROUPS = 3, 6
# Forward passes over a concept's texts to find a strength, three times while divisions are tried and once at the end.
SOLVING_PASSES = 10
# Passes over the texts of a split for the metrics, of each model.
MEASURING_PASSES = 3
# About how long a prompt for written text is, in tokens.
PROMPT = 40
CHARACTERS_OF_A_TOKEN = 4
LONGEST_WORD = 12


@dataclass(frozen=True)
class Job:
    """What a job's cost is counted from.

    Attributes:
        goals: By concept what its strength is chosen by.
        plan: What is asked.
        method: The edit method.
        controls: The methods that are drawn beside it.
        matrices: The kinds of matrices that are looked at.
        search: How channels are looked for.
        words_only: Whether only beginnings of words count in the search.
        tries_groups: Whether divisions of a concept into groups are tried.
        self_text: Tokens of self-generated text.
        texts: Whether there are items or texts to measure on.
        tokens: Tokens of text for each point of a curve.
        points: How many points a curve has.
        limit: At most this many items of each task. None for all.
        checkpoint: Whether a patched checkpoint is written.
        undo: Whether what an undo needs is written.
        written_texts: How many texts the model writes about each concept, and about other things.
        sparse: Whether curves measure damage only where it is asked for.
    """

    goals: Mapping[str, Goal]
    plan: Plan
    method: EditMethod
    controls: tuple[EditMethod, ...]
    matrices: tuple[str, ...]
    search: SearchSettings
    words_only: bool
    tries_groups: bool
    self_text: int
    texts: bool
    tokens: int
    points: int
    limit: int | None
    checkpoint: bool
    undo: bool
    written_texts: int = 0
    sparse: bool = False

    def methods(self, measured: bool) -> tuple[EditMethod, ...]:
        """The methods that are built: the edit's own, and its controls when measured. None without concepts."""
        if not self.goals:
            return ()
        return (self.method, *self.controls) if measured else (self.method,)

    @property
    def candidates(self) -> int:
        """How many neurons are decomposed for each group of tokens."""
        return self.search.candidates * len(self.matrices)


def job_cost(
    job: Job, checkpoint: Checkpoint, items: Items | None, *, device: str = "cpu", measured: bool = True
) -> Cost:
    """What a job takes: locating, solving for the strength, writing and, when `measured`, curves and evaluation.

    lm-eval tasks known by name alone are not counted, since their size is not known.

    Args:
        job: What is done.
        checkpoint: The base.
        items: What is measured on. None before they are read: memory is then counted from the settings.
        device: Where it runs.
        measured: Whether the edit is evaluated.
    """
    methods, on_gpu, size = job.methods(measured), device != "cpu", size_of(checkpoint)
    reads = frozenset(need for method in methods for need in method.about.reads)
    live = measured or "self_text" in reads or job.texts
    cost = locating_cost(job, checkpoint, device=device, measured=measured)
    if "channels" in reads:
        channels = job.candidates * SEARCHES * job.search.solver.channels
        cost += Cost(disk=channels * (4 * checkpoint.hidden_size + CHANNEL_BYTES))
    if live:
        held = _locating_memory(job, checkpoint)
        model = estimate_live(checkpoint, 2 if on_gpu else 4, gpu=on_gpu)
        kept = _reference_memory(job, checkpoint)
        cost += Cost(
            operations=_forward(checkpoint) * sum(tokens_read(job, items, measured=measured).values()),
            start=model.start,
            read=model.read,
            memory=model.memory + held + (0 if on_gpu else kept),
            gpu_memory=model.gpu_memory + held + kept if on_gpu else 0,
        )
    if "activations" in reads:
        # Second moments of a layer's activations, in float64: their sum, one more for a batch, and what is solved.
        cost += Cost(memory=3 * 8 * checkpoint.neurons**2)
    for method in methods:
        own = method.cost(size, job.self_text)
        if own.operations or own.memory:
            model = estimate_live(checkpoint, 2 if on_gpu else 4, gpu=on_gpu)
            cost += Cost(
                operations=len(job.goals) * own.operations,
                memory=model.memory + (0 if on_gpu else own.memory),
                gpu_memory=model.gpu_memory + own.memory if on_gpu else 0,
            )
    if job.checkpoint:
        written = estimate_patch(checkpoint)
        cost += Cost(read=written.read, memory=written.memory, disk=written.disk)
        if job.undo:
            cost += Cost(disk=job.candidates * SEARCHES * checkpoint.hidden_size * 4)
    return cost


def locating_cost(job: Job, checkpoint: Checkpoint, *, device: str = "cpu", measured: bool = False) -> Cost:
    """What finding the concepts takes, with nothing written. Without channels it is one scan at most.

    Args:
        job: What is done.
        checkpoint: The base.
        device: Where it runs.
        measured: Whether the controls locate too.
    """
    reads = frozenset(need for method in job.methods(measured) for need in method.about.reads)
    held = _locating_memory(job, checkpoint)
    operations = len(job.goals) * _searching(job, checkpoint) if "channels" in reads else 0.0
    return Cost(
        operations=operations,
        start=START_WITH_TRANSFORMERS,
        read=(len(job.goals) + 1) * checkpoint.size,
        memory=PROCESS_WITH_TRANSFORMERS + held,
        gpu_memory=held if device != "cpu" else 0,
        download=to_download(checkpoint),
    )


def tokens_read(job: Job, items: Items | None, *, measured: bool = True) -> dict[str, int]:
    """About how many tokens the live model reads, by step."""
    names = ("self-generated text", "written text", "groups", "strengths", "curves", "items", "generations", "measures")
    steps = dict.fromkeys(names, 0)
    methods = job.methods(measured)
    if any("self_text" in method.about.reads for method in methods):
        # Every token is written once and read once.
        steps["self-generated text"] = 2 * job.self_text
    if items is None or not job.goals:
        return steps
    if job.written_texts:
        steps["written text"] = (len(job.goals) + 1) * job.written_texts * (PROMPT + NEW_TOKENS)
    for name, goal in job.goals.items():
        own, others = (min(job.tokens, _length(texts)) for texts in texts_about(items, [name]))
        if job.tries_groups:
            steps["groups"] += SEARCHES * (SOLVING_PASSES * own + others)
        if goal.kind != "strength":
            steps["strengths"] += SOLVING_PASSES * (own if goal.kind == "remaining" else others)
        if measured:
            damages = 2 if job.sparse else job.points
            steps["curves"] += len(methods) * (job.points * own + damages * others) + own + others
            # Of both models: divergence and mass, the losses outside the concept's words, and the questions once more.
            steps["measures"] += 2 * MEASURING_PASSES * (own + others)
    if measured:
        asked, _ = divide(items.tasks, job.plan)
        steps["items"] = 2 * sum(_tokens(row) for task in asked for row in task.rows[: job.limit])
        own = sum(row.get("concept") in job.goals for row in items.generation)
        prompts = min(len(items.generation), own + job.plan.generations)
        # Each prompt is continued once greedily, and sampled to see whether the concept leaks.
        steps["generations"] = 2 * prompts * (1 + job.plan.samples) * job.plan.new_tokens
    return steps


def _locating_memory(job: Job, checkpoint: Checkpoint) -> int:
    """The vocabulary's tables and the candidates of one search."""
    return table_memory(checkpoint) + shard_memory(checkpoint, job.search.solver, job.candidates)


def _searching(job: Job, checkpoint: Checkpoint) -> float:
    """Operations of a concept's search. Candidates and those of the null are searched from the concept's direction, and
    the few that stand out are decomposed. Without that start all are decomposed."""
    settings = job.search.solver
    candidates = (GROUPS if job.tries_groups else 1) * job.candidates
    tested = candidates * (1 + job.search.draws)
    if job.search.tilted_start:
        channels = tested * PRODUCTS_ASKING / PRODUCTS[settings.solver] + LOCATED * candidates * settings.channels
    else:
        channels = float(tested * settings.channels)
    return search_operations(checkpoint, settings, channels, job.words_only)


def _forward(checkpoint: Checkpoint) -> float:
    """Operations of one token's forward pass: two a parameter."""
    count = parameters(checkpoint)
    return (FORWARD_OVERHEAD if count <= SMALL_MODEL else LARGE_OVERHEAD) * 2 * count


def _reference_memory(job: Job, checkpoint: Checkpoint) -> int:
    """The base model's log-probabilities that are kept, and the logits that are computed at once with copies."""
    cells = min(CELLS_KEPT, job.tokens * checkpoint.vocabulary_size)
    return 4 * (cells + 6 * CELLS_AT_ONCE)


def _length(texts: Sequence[str]) -> int:
    return sum(map(len, texts)) // CHARACTERS_OF_A_TOKEN


def _tokens(row: Mapping[str, Any]) -> int:
    """About how many tokens are read for an item: its longest text, again for each of its choices when they are long.

    Choices of one token are read off one pass.
    """
    longest = max((len(value) for value in row.values() if isinstance(value, str)), default=0)
    choices = next((value for value in row.values() if isinstance(value, list)), [])
    again = len(choices) if any(len(str(choice)) > LONGEST_WORD for choice in choices) else 1
    return longest * again // CHARACTERS_OF_A_TOKEN
