"""What a recipe will take, counted from its settings before any weight is read.

Counts that only the work itself would tell (iterations of a search, groups of a concept's tokens) are those measured
on the demo model and `bookworm`; where a step may end early it is taken to go on to its end.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rotate_edit.channels.cost import CHANNEL_BYTES, PRODUCTS, search_operations, shard_memory
from rotate_edit.channels.solver import SolverSettings
from rotate_edit.edits.edit import SAMPLED
from rotate_edit.edits.low_rank import DRAWN, DRAWN_LATER, STEPS
from rotate_edit.edits.writing.cost import estimate_patch
from rotate_edit.evaluation.compare import Plan
from rotate_edit.evaluation.evaluate import divide, texts_about
from rotate_edit.evaluation.tasks import Items
from rotate_edit.machine import PROCESS_WITH_TRANSFORMERS, START_WITH_TRANSFORMERS, Cost
from rotate_edit.models.checkpoint import Checkpoint
from rotate_edit.models.cost import estimate_live, parameters, table_memory, to_download
from rotate_edit.models.output_head import AT_ONCE
from rotate_edit.recipe import Recipe

# Products with the vocabulary matrix of a search that asks for one concept: 20 to 26 measured.
PRODUCTS_ASKING = 26
# Seconds of the demo model's forward passes over the seconds of their products alone: 1.1 to 1.9 measured on one
# thread, about 3.4 on two, which the small products around the large ones do not fill.
FORWARD_OVERHEAD = 2.5
# The same of a fit's steps, which also take logarithms of what they predict: 2.0 measured on one thread. Operations of
# an eigendecomposition over the cube of its size.
FITTING_OVERHEAD, ROOTS = 2.0, 20
# `group_distance: auto` tries three divisions of a concept; together they search about so many times the candidates.
SEARCHES, GROUPS = 3, 6
# Forward passes over a concept's texts to find a strength, three times while divisions are tried and once at the end.
SOLVING_PASSES = 10
CHARACTERS_OF_A_TOKEN = 4
LONGEST_WORD = 12


def recipe_cost(
    recipe: Recipe, checkpoint: Checkpoint, items: Items | None, *, device: str = "cpu", measured: bool = True
) -> Cost:
    """What a recipe takes: locating, solving for the strength, writing and, when `measured`, curves and evaluation.

    items: what is measured on; lm-eval tasks known by name alone are not counted, since their size is not known.
    """
    keyed = _keyed(recipe, measured)
    # Memory is checked before the items are read, so what the recipe names counts and not what was read of it.
    live = measured or keyed or recipe.evaluate.items is not None or recipe.evaluate.text is not None
    grouped = live and _tries_groups(recipe)
    on_gpu = device != "cpu"
    channels = _candidates(recipe) * SEARCHES * recipe.decompose.channels
    cost = locating_cost(recipe, checkpoint, device=device, grouped=grouped)
    cost += Cost(disk=channels * (4 * checkpoint.hidden_size + CHANNEL_BYTES))
    if live:
        held = _locating_memory(recipe, checkpoint)
        model = estimate_live(checkpoint, 2 if on_gpu else 4, gpu=on_gpu)
        kept = _reference_memory(recipe, checkpoint)
        cost += Cost(
            operations=_forward(checkpoint) * sum(tokens_read(recipe, items, measured=measured).values()),
            start=model.start,
            read=model.read,
            memory=model.memory + held + (0 if on_gpu else kept),
            gpu_memory=model.gpu_memory + held + kept if on_gpu else 0,
        )
    if keyed:
        # Second moments of a layer's activations, in float64: their sum, one more for a batch, and what the fit solves.
        cost += Cost(memory=3 * 8 * checkpoint.neurons**2)
    if recipe.edit.method == "fitted":
        model = estimate_live(checkpoint, 2 if on_gpu else 4, gpu=on_gpu)
        fit = _fitting_memory(recipe, checkpoint)
        cost += Cost(
            operations=len(recipe.concepts) * _fitting(recipe, checkpoint),
            memory=model.memory + (0 if on_gpu else fit),
            gpu_memory=model.gpu_memory + fit if on_gpu else 0,
        )
    if recipe.save.checkpoint:
        written = estimate_patch(checkpoint)
        cost += Cost(read=written.read, memory=written.memory, disk=written.disk)
        if recipe.save.undo:
            cost += Cost(disk=_candidates(recipe) * SEARCHES * checkpoint.hidden_size * 4)
    return cost


def locating_cost(recipe: Recipe, checkpoint: Checkpoint, *, device: str = "cpu", grouped: bool = False) -> Cost:
    """What finding the concepts' channels takes, with nothing written.

    grouped: whether several divisions of each concept are tried.
    """
    settings, candidates = _settings(recipe), _candidates(recipe)
    held = _locating_memory(recipe, checkpoint)
    return Cost(
        operations=len(recipe.concepts) * _locating(recipe, checkpoint, settings, candidates, grouped=grouped),
        start=START_WITH_TRANSFORMERS,
        read=(len(recipe.concepts) + 1) * checkpoint.size,
        memory=PROCESS_WITH_TRANSFORMERS + held,
        gpu_memory=held if device != "cpu" else 0,
        download=to_download(checkpoint),
    )


def tokens_read(recipe: Recipe, items: Items | None, *, measured: bool = True) -> dict[str, int]:
    """About how many tokens the live model reads, by step."""
    steps = dict.fromkeys(("keys", "groups", "strengths", "curves", "items", "generations"), 0)
    if _keyed(recipe, measured):
        # Every token is written once and read once.
        steps["keys"] = 2 * recipe.edit.key_tokens
    if items is None:
        return steps
    evaluation = recipe.evaluate
    methods, points = 1 + len(set(evaluation.controls)), len(set(evaluation.strengths)) + 1
    for concept in recipe.concepts:
        own, others = (min(evaluation.tokens, _length(texts)) for texts in texts_about(items, [concept.name]))
        if _tries_groups(recipe):
            steps["groups"] += SEARCHES * (SOLVING_PASSES * own + others)
        if concept.strength == "auto":
            steps["strengths"] += SOLVING_PASSES * own
        if measured:
            steps["curves"] += (methods * points + 1) * (own + others)
    if measured:
        names = tuple(concept.name for concept in recipe.concepts)
        close = tuple(name for concept in recipe.concepts for name in concept.neighbours)
        plan = Plan(names, close)
        asked, _ = divide(items.tasks, plan)
        steps["items"] = 2 * sum(_tokens(row) for task in asked for row in task.rows[: evaluation.limit])
        own = sum(row.get("concept") in names for row in items.generation)
        prompts = min(len(items.generation), own + plan.generations)
        # Each prompt is continued once greedily, and sampled to see whether the concept leaks.
        steps["generations"] = 2 * prompts * (1 + plan.samples) * plan.new_tokens
    return steps


def _settings(recipe: Recipe) -> SolverSettings:
    return SolverSettings(solver=recipe.decompose.solver, channels=recipe.decompose.channels)


def _candidates(recipe: Recipe) -> int:
    return recipe.locate.candidates * len(recipe.locate.matrices)


def _locating_memory(recipe: Recipe, checkpoint: Checkpoint) -> int:
    """The vocabulary's tables and the candidates of one search."""
    return table_memory(checkpoint) + shard_memory(checkpoint, _settings(recipe), _candidates(recipe))


def _keyed(recipe: Recipe, measured: bool) -> bool:
    return any(method in SAMPLED for method in (recipe.edit.method, *(recipe.evaluate.controls if measured else ())))


def _tries_groups(recipe: Recipe) -> bool:
    return recipe.locate.group_distance == "auto" and recipe.edit.method not in SAMPLED


def _locating(
    recipe: Recipe, checkpoint: Checkpoint, settings: SolverSettings, candidates: int, *, grouped: bool
) -> float:
    searches = GROUPS if grouped else 1
    channels = searches * candidates * settings.channels
    asked = searches * candidates * PRODUCTS_ASKING / PRODUCTS[settings.solver] if recipe.decompose.tilted_start else 0
    return search_operations(checkpoint, settings, channels + asked, recipe.decompose.words_only)


def _forward(checkpoint: Checkpoint) -> float:
    """Operations of one token's forward pass: two a parameter."""
    return FORWARD_OVERHEAD * 2 * parameters(checkpoint)


def _fitting(recipe: Recipe, checkpoint: Checkpoint) -> float:
    """Operations of one fit: each step predicts its positions twice and goes back once, after two looks at all."""
    head = 2 * checkpoint.hidden_size * checkpoint.vocabulary_size
    change = 2 * checkpoint.neurons * checkpoint.hidden_size
    later = recipe.edit.fit_rounds - 1
    drawn = STEPS * (DRAWN + later * DRAWN_LATER)
    whole = STEPS * (1 + later) * 3 * 2 * checkpoint.neurons * checkpoint.hidden_size**2
    steps = drawn * (4 * head + 3 * change) + whole
    roots = ROOTS * checkpoint.neurons**3 + 2 * 2 * recipe.edit.key_tokens * checkpoint.neurons**2
    return FITTING_OVERHEAD * (steps + 2 * recipe.edit.key_tokens * head + roots)


def _fitting_memory(recipe: Recipe, checkpoint: Checkpoint) -> int:
    """The positions as they are and whitened, the head in float32, a step's predictions, and the change four times."""
    positions = recipe.edit.key_tokens * 2 * (checkpoint.neurons + checkpoint.hidden_size)
    head = checkpoint.hidden_size * checkpoint.vocabulary_size
    predictions = 6 * max(DRAWN, AT_ONCE // 2) * checkpoint.vocabulary_size
    roots = 2 * 5 * checkpoint.neurons**2
    return 4 * (positions + head + predictions + roots + 4 * checkpoint.neurons * checkpoint.hidden_size)


def _reference_memory(recipe: Recipe, checkpoint: Checkpoint) -> int:
    """The base model's log-probabilities that are kept, and the logits of one batch with two copies."""
    from rotate_edit.evaluation.measures import CELLS_KEPT
    from rotate_edit.models.batches import CELLS_IN_A_BATCH

    cells = min(CELLS_KEPT, recipe.evaluate.tokens * checkpoint.vocabulary_size)
    return 4 * (cells + 3 * CELLS_IN_A_BATCH)


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
