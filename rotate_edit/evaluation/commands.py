"""One call for each measuring command: open the base, read the variants, measure, write JSON."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rotate_edit.console import Report, silent
from rotate_edit.errors import BadInput
from rotate_edit.evaluation.compare import Plan
from rotate_edit.evaluation.evaluate import evaluate, evaluate_checkpoints
from rotate_edit.evaluation.metrics import failed_gates
from rotate_edit.evaluation.provenance import provenance, weights_hash
from rotate_edit.evaluation.tasks import Items, open_items
from rotate_edit.evaluation.variants import Variant, opened, read_variants
from rotate_edit.files import cache_folder, check_output_free, check_output_outside, plain, write_atomically
from rotate_edit.machine import Cost, check_cost, pick_device
from rotate_edit.models.checkpoint import Checkpoint, load_model, load_tokenizer, open_checkpoint
from rotate_edit.models.cost import estimate_live
from rotate_edit.models.generation import as_user, generate
from rotate_edit.vocabulary.concept import find_tokens, token_texts

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def edited_concepts(variants: Sequence[Variant], named: Sequence[str], *, required: bool = True) -> tuple[str, ...]:
    """Find the concepts asked about.

    They are those named. Without any, they are those that the variants' edits or their checkpoints' records name.

    Args:
        variants: The edited models.
        named: Names of concepts. They may be empty.
        required: Whether items have to be divided by the concepts.

    Returns:
        The names of the concepts.

    Raises:
        BadInput: When there are none and they are required.
    """
    found = {change.concept for variant in variants if variant.edit for change in variant.edit.changes}
    found |= {name for variant in variants if variant.checkpoint for name in _recorded(variant.checkpoint)}
    names = tuple(named) or tuple(sorted(found))
    if required and not names:
        raise BadInput("none of the models says which concept was edited; name it with --concept.")
    return names


def _recorded(folder: Path) -> list[str]:
    """The concepts that a patched checkpoint's own record names; none where it has no record."""
    lists = [edit.get("concepts") for edit in open_checkpoint(folder).edits]
    return [name for names in lists if isinstance(names, list) for name in names if isinstance(name, str)]


def _amplified(variants: Sequence[Variant]) -> tuple[str, ...]:
    """The concepts that every variant amplifies; none where a variant is no edit, which does not tell."""
    edits = [variant.edit for variant in variants]
    strengths: dict[str, list[float]] = {}
    for edit in edits:
        for change in edit.changes if edit is not None else ():
            strengths.setdefault(change.concept, []).append(change.strength)
    return tuple(name for name, found in strengths.items() if None not in edits and max(found) < 0)


def evaluate_models(
    base: str,
    edited: Sequence[Path],
    plan: Plan,
    *,
    words: Sequence[str] = (),
    items: str | None = None,
    data: Path | None = None,
    allow_code: bool = False,
    device: str = "auto",
    dtype: str = "float32",
    backend: str = "hf",
    options: Mapping[str, str] = {},
    output: Path | None = None,
    check: Callable[[Cost, Path], None] = check_cost,
    report: Report = silent,
) -> dict[str, Any]:
    """Evaluate any number of edited models against one base in one process.

    Args:
        base: The base model.
        edited: Run folders, edit folders, adapters or checkpoints.
        plan: What is measured.
        words: Words of the concepts, for probability mass.
        items: A folder of items or a bundled name. When only `data` is given, those for one's own data.
        data: One's own data. None for none.
        allow_code: Passed on to `open_items`.
        device: "auto", "cuda", "mps" or "cpu".
        dtype: "float32", "bfloat16" or "float16".
        backend: One of lm-eval's. Anything but "hf" takes whole checkpoints and scores lm-eval's tasks alone.
        options: The backend's own options.
        output: The file to write. None writes nothing.
        check: Refuses a cost that does not fit this machine.
        report: Receives the progress.

    Returns:
        The result as JSON. It is written to `output` too.

    Raises:
        BadInput: For whatever cannot be opened, or when nothing is asked.
    """
    checkpoint = open_checkpoint(base)
    if output is not None:
        check_output_free(output)
        check_output_outside(output, checkpoint.folder)
    items = items or ("local" if data is not None else None)
    if items is None and not plan.tasks:
        raise BadInput("nothing is asked; name --items, --data or --task.")
    found = open_items(items, data=data, allow_code=allow_code) if items else None
    if backend != "hf":
        # lm-eval's own loader takes CUDA for granted; other backends choose for themselves.
        if device != "auto" or backend.startswith("hf"):
            options = {"device": pick_device(device), **options}
        result = _on_backend(checkpoint, edited, plan, found, backend, {"dtype": dtype, **options}, report)
        if output is not None:
            write_atomically(output, json.dumps(result, indent=1, allow_nan=False))
        return result
    variants = read_variants(list(edited))
    # lm-eval's own tasks are general abilities and need no concept.
    concepts = edited_concepts(variants, plan.concepts, required=found is not None)
    plan = replace(plan, concepts=concepts, amplified=_amplified(variants))
    chosen = pick_device(device)
    # A whole checkpoint is loaded beside the base, one at a time.
    at_once = 1 + any(variant.checkpoint is not None for variant in variants)
    check(estimate_live(checkpoint, at_once * DTYPES[dtype].itemsize, gpu=chosen != "cpu"), output or Path())
    tokenizer = load_tokenizer(checkpoint)
    ids = None
    if words:
        ids = find_tokens(", ".join(plan.concepts), list(words), tokenizer, token_texts(tokenizer), plurals=True).ids
    model = load_model(checkpoint, device=chosen, dtype=DTYPES[dtype])
    evaluation = evaluate(
        model, tokenizer, variants, plan, found, concept_ids=ids, weights_hash=weights_hash(checkpoint),
        cache=cache_folder(), report=report,
    )  # fmt: skip
    made_with = provenance(checkpoint, plan.seed, chosen) | {"dtype": dtype, "backend": backend}
    result = plain(evaluation.result | {"provenance": made_with})
    if output is not None:
        write_atomically(output, json.dumps(result, indent=1, allow_nan=False))
    return result


def _on_backend(
    base: Checkpoint,
    edited: Sequence[Path],
    plan: Plan,
    items: Items | None,
    backend: str,
    options: Mapping[str, str],
    report: Report,
) -> dict[str, Any]:
    folders = {}
    for folder in edited:
        checkpoint = folder / "model" if (folder / "model" / "config.json").is_file() else folder
        if not (checkpoint / "config.json").is_file():
            raise BadInput(f"{folder} holds no checkpoint, and the backend {backend} takes nothing else.")
        folders[folder.resolve().name] = checkpoint
    if len(folders) < len(edited):
        raise BadInput("two of the models have the same name; give each of them once, under a name of its own.")
    if not plan.concepts:
        concepts = edited_concepts(read_variants(list(edited)), (), required=items is not None)
        plan = replace(plan, concepts=concepts)
    evaluation = evaluate_checkpoints(
        base.folder, folders, plan, items, backend=backend, options=options, report=report
    )
    # The backend's other options may hold a folder or a token of whoever runs it.
    how = {"dtype": options["dtype"], "backend": backend}
    made_with = provenance(base, plan.seed, options.get("device", "auto")) | how
    return plain(evaluation.result | {"provenance": made_with})


@dataclass(frozen=True)
class Continuations:
    """What the models made of some prompts.

    Attributes:
        rows: For each prompt, the prompt and its continuations by model name.
        chat: Whether the prompts stood in the tokenizer's chat template.
    """

    rows: tuple[tuple[str, dict[str, str]], ...]
    chat: bool


def continue_prompts(
    base: str,
    edited: Sequence[str],
    prompts: Sequence[str],
    *,
    new_tokens: int = 40,
    seed: int | None = None,
    plain: bool = False,
    check: Callable[[Cost, Path], None] = check_cost,
    report: Report = silent,
) -> Continuations:
    """Continue prompts with the base and each edited model.

    Where the base's tokenizer has a chat template, every prompt is what a user says, and the models answer.

    Args:
        base: The base model.
        edited: Run folders, edits, adapters or checkpoints.
        prompts: The prompts.
        new_tokens: Number of tokens to generate for each prompt.
        seed: Seed of sampling. None generates greedily.
        plain: Continue the bare text, whatever the tokenizer has.
        check: Refuses a cost that does not fit this machine.
        report: Is told how many models have written.

    Returns:
        The continuations.

    Raises:
        BadInput: For whatever cannot be opened.
    """
    checkpoint = open_checkpoint(base)
    folders = [Path(name) for name in edited if Path(name).is_dir()]
    whole = len(folders) < len(edited) or any(read_variants([folder])[0].checkpoint for folder in folders)
    check(estimate_live(checkpoint, 2 * 4 if whole else 4), Path())
    tokenizer, model = load_tokenizer(checkpoint), load_model(checkpoint)
    chat = bool(getattr(tokenizer, "chat_template", None)) and not plain
    asked = as_user(tokenizer, prompts) if chat else prompts
    how: dict[str, Any] = {"new_tokens": new_tokens, "seed": seed, "special_tokens": not chat}
    texts = {"base": generate(model, tokenizer, asked, **how)}
    for number, name in enumerate(edited, start=1):
        report("continue the prompts", number, len(edited) + 1)
        if Path(name).is_dir():
            with opened(model, read_variants([Path(name)])[0]) as changed:
                texts[name] = generate(changed, tokenizer, asked, **how)
        else:
            texts[name] = generate(load_model(name), tokenizer, asked, **how)
    rows = [
        (prompt, {name: written[place][0] for name, written in texts.items()}) for place, prompt in enumerate(prompts)
    ]
    return Continuations(tuple(rows), chat)


def relearn_models(
    base: str, edited: Sequence[Path], concepts: Sequence[str], items: str, output: Path | None, report: Report = silent
) -> dict[str, Any]:
    """Fine-tune base and edited models on the items' paragraphs and ask again (`relearn.relearn`).

    Args:
        base: The base model.
        edited: The edited models.
        concepts: Names of the concepts. Without any, the edits name them.
        items: A folder of items or a bundled name.
        output: The file to write. None writes nothing.
        report: Receives the progress.

    Returns:
        The result as JSON. It is written to `output` too.

    Raises:
        BadInput: For whatever cannot be opened, when no concept is named, or when the cost does not fit this machine.
    """
    from rotate_edit.evaluation.relearn import relearn

    checkpoint = open_checkpoint(base)
    if output is not None:
        check_output_free(output)
        check_output_outside(output, checkpoint.folder)
    variants = read_variants(list(edited))
    plan = Plan(concepts=edited_concepts(variants, concepts))
    # Training holds the weights, a copy to come back to, their gradients and AdamW's two moments.
    check_cost(estimate_live(checkpoint, 5 * 4), output or Path())
    found: Items = open_items(items)
    result = plain(relearn(load_model(checkpoint), load_tokenizer(checkpoint), variants, plan, found, report=report))
    if output is not None:
        write_atomically(output, json.dumps(result, indent=1, allow_nan=False))
    return result


def measure_faithfulness(
    model: str, channels: Path, text: str, output: Path | None, limit: int | None = None, report: Report = silent
) -> list[dict[str, Any]]:
    """Test the channels of a set on a text, with controls (`faithfulness.faithfulness`).

    Args:
        model: The model.
        channels: The channel set.
        text: The text to test on.
        output: A path without its ending. The trials go to .json and the figure to .png. None writes nothing.
        limit: Only the neurons of the first so many channels. None for all.
        report: Receives the progress.

    Returns:
        The table's rows.

    Raises:
        BadInput: For whatever cannot be opened, or when the cost does not fit this machine.
    """
    from rotate_edit.channels.channel_set import load_channels
    from rotate_edit.evaluation import faithfulness
    from rotate_edit.evaluation.text_tasks import read_documents

    checkpoint = open_checkpoint(model)
    if output is not None:
        check_output_outside(output, checkpoint.folder)
    check_cost(estimate_live(checkpoint), output or Path())
    found = load_channels(channels)
    # Whole neurons: what a channel is compared with is the rest of its neuron.
    wanted = {(channel.matrix, channel.layer, channel.neuron) for channel in found[:limit]}
    found = [channel for channel in found if (channel.matrix, channel.layer, channel.neuron) in wanted]
    documents = read_documents(text)
    prompts = [" ".join(document.split()[:12]) for document in documents[: faithfulness.PROMPTS]]
    trials = faithfulness.faithfulness(
        load_model(checkpoint), load_tokenizer(checkpoint), found, documents, prompts=prompts, report=report
    )
    rows = faithfulness.table(trials)
    if output is not None:
        content = plain({"rows": rows, "trials": faithfulness.plain_trials(trials)})
        write_atomically(output.with_suffix(".json"), json.dumps(content, indent=1, allow_nan=False))
        write_atomically(output.with_suffix(".png"), faithfulness.picture(rows))
    return rows


def check_run(run_folder: Path, bounds: Mapping[str, float]) -> list[str]:
    """Find the gates that a run's numbers do not pass.

    Args:
        run_folder: The run folder.
        bounds: The bounds by the metric's name.

    Returns:
        One sentence for each gate that fails.

    Raises:
        BadInput: There is no gate, no such metric, or no evaluation.json that can be read.
    """
    if not bounds:
        raise BadInput("check needs at least one gate, for instance --gate efficacy=0.9.")
    try:
        result = json.loads((run_folder / "evaluation.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{run_folder} holds no readable evaluation.json.") from error
    try:
        variant: dict[str, Any] = next(iter((result.get("variants") or {}).values()), {})
        return failed_gates({**variant.get("measures", {}), **(result.get("summary") or {})}, bounds)
    except (AttributeError, TypeError, ValueError) as error:
        raise BadInput(
            f"evaluation.json in {run_folder} does not have the form that a run writes; run it again."
        ) from error
