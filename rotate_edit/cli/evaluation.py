"""The commands that measure models: evaluate, compare, check, relearn, faithfulness."""

from pathlib import Path
from typing import Any

import click

from rotate_edit.cli import options
from rotate_edit.cli.options import FOLDER, progress_bars
from rotate_edit.console import print_line, print_table
from rotate_edit.errors import BadInput, Failure, counted


@click.command()
@click.argument("base")
@options.edited_models
@options.concepts
@click.option("--neighbour", "neighbours", multiple=True, help="Concepts close to them.")
@click.option("--word", "words", multiple=True, help="Words of the concept, for probability mass and leak rate.")
@click.option("--items", help="A folder of items, or the name of a bundled one (demo, local).")
@click.option("--data", type=FOLDER, help="Where the items' data lie, for --items local (then the default).")
@click.option("--task", "tasks", multiple=True, help="lm-eval tasks by name (they need a network).")
@click.option("--limit", type=click.IntRange(min=1), help="At most so many items of each part and each lm-eval task.")
@click.option("--batch-size", default="64", show_default=True, help="Sequences at once, or auto.")
@click.option("--num-fewshot", type=click.IntRange(min=0), help="Examples before each item (default: the task's own).")
@click.option("--chat-template", is_flag=True, help="Put every item in the tokenizer's chat template.")
@options.device
@click.option(
    "--dtype", default="float32", show_default=True, type=click.Choice(["float32", "bfloat16", "float16"]),
    help="In which the models are loaded.",
)  # fmt: skip
@click.option("--backend", default="hf", show_default=True, help="One of lm-eval's; vllm takes checkpoints only.")
@click.option("--backend-option", "options", multiple=True, metavar="KEY=VALUE", help="For another backend than hf.")
@options.json_output
@options.allow_code
def evaluate(
    base: str,
    edited: tuple[Path, ...],
    concepts: tuple[str, ...],
    neighbours: tuple[str, ...],
    tasks: tuple[str, ...],
    limit: int | None,
    batch_size: str,
    num_fewshot: int | None,
    chat_template: bool,
    options: tuple[str, ...],
    **how: Any,
) -> None:
    """Evaluate EDITED models (runs, edits, adapters, checkpoints) against BASE on the same items."""
    from rotate_edit.evaluation.commands import evaluate_models
    from rotate_edit.evaluation.compare import Plan
    from rotate_edit.evaluation.harness import Settings

    settings = Settings(_batch_size(batch_size), num_fewshot, limit, chat_template)
    plan = Plan(concepts, neighbours, tasks, items=limit, settings=settings, words=how["words"])
    given = dict(_key_and_value(option) for option in options)
    with progress_bars() as report:
        result = evaluate_models(base, edited, plan, options=given, report=report, **how)
    for name, variant in result["variants"].items():
        rows = [
            [row["title"], str(row["n"]), *(f"{row[key]['value']:.4g}" for key in ("base", "edited", "difference")),
             f"{row['p_holm']:.3g}" if row["p_holm"] is not None else ""]
            for row in variant["rows"]
        ]  # fmt: skip
        print_table(name, ["items", "n", "base", "edited", "difference", "p (Holm)"], rows)
        found = {**variant["summary"], **variant["measures"]}
        told = [
            [measure.replace("_", " "), _with_interval(value), str(value["n"]), _figure(value.get("baseline"))]
            for measure, value in found.items()
            if value["value"] is not None
        ]
        if told:
            print_table(f"{name}, 95 % intervals", ["measure", "value", "n", "base"], told)
        for sentence in variant["words"]:
            print_line(sentence)


def _batch_size(text: str) -> int | str:
    if text.isdigit() and int(text) > 0:
        return int(text)
    if text.split(":")[0] == "auto":
        return text
    raise BadInput(f"--batch-size {text} is neither a positive number nor auto.")


def _key_and_value(option: str) -> tuple[str, str]:
    key, equals, value = option.partition("=")
    if not key or not equals or key in ("pretrained", "trust_remote_code", "load_format"):
        raise BadInput(f"--backend-option {option} cannot be used; write KEY=VALUE, and name the models as arguments.")
    return key, value


@click.command()
@click.argument("run_folder", type=FOLDER)
@click.option(
    "--gate", "gates", multiple=True, metavar="METRIC=BOUND",
    help="At least so much of a metric where more is better, at most where less is, such as efficacy=0.9.",
)  # fmt: skip
def check(run_folder: Path, gates: tuple[str, ...]) -> None:
    """Fail (exit 1) when a run's numbers do not pass the gates: for use in automatic checks."""
    from rotate_edit.evaluation.commands import check_run

    bounds = dict(_gate(gate) for gate in gates)
    failures = check_run(run_folder, bounds)
    if failures:
        raise Failure(" ".join(failures))
    print_line(f"{counted(len(bounds), 'gate')} passed.")


def _gate(text: str) -> tuple[str, float]:
    name, _, bound = text.partition("=")
    try:
        return name, float(bound)
    except ValueError as error:
        raise BadInput(f"--gate {text} is no gate; write METRIC=BOUND, for instance efficacy=0.9.") from error


@click.command()
@click.argument("base")
@click.argument("edited", nargs=-1, required=True)
@click.option("--prompt", "prompts", multiple=True, required=True, help="What both continue; may be repeated.")
@click.option("--new-tokens", default=40, show_default=True, help="How long a continuation is.")
@click.option("--seed", type=int, help="Sample with this seed instead of taking the likeliest token.")
@click.option("--plain", is_flag=True, help="Continue the bare text even where the tokenizer has a chat template.")
def compare(
    base: str, edited: tuple[str, ...], prompts: tuple[str, ...], new_tokens: int, seed: int | None, plain: bool
) -> None:
    """Continue the same prompts with BASE and each EDITED (a run, edit, adapter or checkpoint), side by side."""
    from rotate_edit.evaluation.commands import continue_prompts

    with progress_bars() as report:
        found = continue_prompts(base, edited, prompts, new_tokens=new_tokens, seed=seed, plain=plain, report=report)
    if found.chat:
        print_line("Prompts stand in the tokenizer's chat template; --plain continues the bare text.", error=True)
    for prompt, texts in found.rows:
        print_table(prompt, ["model", "continuation"], [[name, text] for name, text in texts.items()])


@click.command()
@click.argument("base")
@options.edited_models
@options.concepts
@click.option("--items", default="demo", show_default=True, help="Items with paragraphs about the concepts.")
@options.json_output
def relearn(base: str, edited: tuple[Path, ...], concepts: tuple[str, ...], items: str, output: Path | None) -> None:
    """Fine-tune EDITED models on text about their concepts and see how much comes back."""
    from rotate_edit.evaluation.commands import relearn_models

    with progress_bars() as report:
        result = relearn_models(base, edited, concepts, items, output, report)
    epochs = [f"after epoch {number + 1}" for number in range(result["training"]["epochs"])]
    rows = [
        [name, *(_with_interval(asked) for asked in (model["before"], *model["epochs"]))]
        for name, model in result["models"].items()
    ]
    print_table("Share of the items about the concept answered correctly", ["", "before", *epochs], rows)


@click.command()
@click.argument("model")
@click.argument("channels", type=FOLDER)
@click.option("--text", required=True, help="A text file, a folder or a dataset of the Hub.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the neurons of the first so many channels.")
@click.option("--output", type=FOLDER, help="Write NAME.json and NAME.png.")
def faithfulness(model: str, channels: Path, text: str, limit: int | None, output: Path | None) -> None:
    """Test whether CHANNELS of MODEL do what their tokens say, against controls."""
    from rotate_edit.evaluation.commands import measure_faithfulness

    with progress_bars() as report:
        rows = measure_faithfulness(model, options.inside(channels, "channels"), text, output, limit, report)
    columns = ["", "taken out", "n", "own", "others", "selectivity", "wins", "p (Holm)"]
    print_table("Response or promotion lost, in standard deviations", columns, [_tested(row) for row in rows])


def _tested(row: dict[str, Any]) -> list[str]:
    effects = [_figure(row["own"]["value"]), _figure(row["others"]["value"]), _with_interval(row["selectivity"])]
    wins = f"{row['wins']['value']:.0%}" if "wins" in row else ""
    p = f"{row['p_holm']:.3g}" if "p_holm" in row else ""
    return [row["matrix"], row["condition"], str(row["channels"]), *effects, wins, p]


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _with_interval(measure: dict[str, Any]) -> str:
    if measure["value"] is None:
        return ""
    interval = "" if measure["low"] is None else f" ({measure['low']:.3g} to {measure['high']:.3g})"
    return f"{measure['value']:.3g}{interval}"


COMMANDS = (evaluate, compare, check, relearn, faithfulness)
