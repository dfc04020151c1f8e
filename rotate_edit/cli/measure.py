"""The measuring commands of the command line: parse, validate, one call each, print."""

import json
from pathlib import Path
from typing import Any

import click

from rotate_edit.console import print_line, print_table, progress_bars
from rotate_edit.errors import BadInput, Failure, counted

FOLDER = click.Path(path_type=Path)
MODELS = click.argument("edited", nargs=-1, required=True, type=FOLDER)
MOST = {"max_kl": "first_token_kl", "max_collateral_kl": "collateral_kl", "max_leak_rate": "leak_rate_asked"}
CONCEPTS = click.option("--concept", "concepts", multiple=True, help="Edited concepts (default: as the edits say).")


@click.command()
@click.argument("base")
@MODELS
@CONCEPTS
@click.option("--neighbour", "neighbours", multiple=True, help="Concepts close to them.")
@click.option("--word", "words", multiple=True, help="Words of the concept, for probability mass and leak rate.")
@click.option("--items", help="A folder of items, or the name of a bundled one (demo, local).")
@click.option("--data", type=FOLDER, help="Where the items' data lie, for --items local (then the default).")
@click.option("--task", "tasks", multiple=True, help="lm-eval tasks by name (they need a network).")
@click.option("--limit", type=click.IntRange(min=1), help="At most so many items of each part and each lm-eval task.")
@click.option("--batch-size", default="64", show_default=True, help="Sequences at once, or auto.")
@click.option("--num-fewshot", type=click.IntRange(min=0), help="Examples before each item (default: the task's own).")
@click.option("--chat-template", is_flag=True, help="Put every item in the tokenizer's chat template.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or mps.")
@click.option(
    "--dtype", default="float32", show_default=True, type=click.Choice(["float32", "bfloat16", "float16"]),
    help="In which the models are loaded.",
)  # fmt: skip
@click.option("--backend", default="hf", show_default=True, help="One of lm-eval's; vllm takes checkpoints only.")
@click.option("--backend-option", "options", multiple=True, metavar="KEY=VALUE", help="For another backend than hf.")
@click.option("--output", type=FOLDER, help="Write the result as JSON here.")
@click.option("--allow-code", is_flag=True, help="Dangerous: run code that task definitions bring along.")
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
@click.option("--min-efficacy", type=float, help="How much of the concept is gone.")
@click.option("--min-specificity", type=float, help="How much of everything else is kept.")
@click.option("--min-harmonic", type=float, help="Of both together.")
@click.option("--max-kl", type=float, help="Of the first generated token, in nats.")
@click.option("--max-collateral-kl", type=float, help="On texts without the concept, in nats.")
@click.option("--max-leak-rate", type=float, help="Of sampled answers to prompts about the concept.")
def check(run_folder: Path, **gates: float | None) -> None:
    """Fail (exit 1) when a run's numbers do not pass the gates: for use in automatic checks."""
    from rotate_edit.evaluation.compare import failed_gates
    from rotate_edit.reporting.content import variant_of

    try:
        result = json.loads((run_folder / "evaluation.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{run_folder} holds no readable evaluation.json.") from error
    least = {name.removeprefix("min_"): value for name, value in gates.items() if value is not None and "min_" in name}
    most = {MOST[name]: value for name, value in gates.items() if value is not None and name in MOST}
    if not least and not most:
        raise BadInput("check needs at least one gate, for instance --min-efficacy 0.9.")
    try:
        found = {**variant_of(result).get("measures", {}), **(result.get("summary") or {})}
        failures = failed_gates(found, minimum=least, maximum=most)
    except (AttributeError, TypeError, ValueError) as error:
        raise BadInput(
            f"evaluation.json in {run_folder} does not have the form that a run writes; run it again."
        ) from error
    if failures:
        raise Failure(" ".join(failures))
    print_line(f"{counted(len(least) + len(most), 'gate')} passed.")


@click.command()
@click.argument("base")
@MODELS
@CONCEPTS
@click.option("--items", default="demo", show_default=True, help="Items with paragraphs about the concepts.")
@click.option("--output", type=FOLDER, help="Write the result as JSON here.")
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

    folder = channels / "channels" if (channels / "channels").is_dir() else channels
    with progress_bars() as report:
        rows = measure_faithfulness(model, folder, text, output, limit, report)
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


@click.command()
@click.argument("model")
@click.option("--revision", help="Hub revision.")
@click.option("--json", "as_json", is_flag=True, help="Print all of it as JSON.")
def inspect(model: str, revision: str | None, as_json: bool) -> None:
    """Show what is recognised of MODEL and what an edit could reach."""
    from rotate_edit.models.checkpoint import open_checkpoint
    from rotate_edit.models.inspection import described, inspect_model

    found = inspect_model(open_checkpoint(model, revision))
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    print_table(str(found["source"]), ["", ""], described(found))


@click.command()
@click.argument("recipe")
@click.option("--trials", default=60, show_default=True, type=click.IntRange(1), help="In all, with earlier ones.")
@click.option(
    "--output", type=FOLDER, help="The folder of the search (default runs/tune-<recipe>); it is gone on with."
)
@click.option("--pick", default="knee", show_default=True, help="knee, a number of the front, or damage=0.01 (nats).")
@click.option("--tokens", default=1200, show_default=True, type=click.IntRange(256), help="Of text for each trial.")
@click.option("--lm-eval", is_flag=True, help="Also ask the edits of the front the recipe's items and tasks.")
@click.option("--seed", default=0, show_default=True, help="Of the search.")
def tune(recipe: str, output: Path | None, **how: Any) -> None:
    """Search for the settings of RECIPE that remove most for least damage, and write the chosen recipe."""
    from rotate_edit.recipe import read_recipe
    from rotate_edit.search.tune import CHOSEN, search

    where = output or Path("runs") / f"tune-{Path(recipe).stem}"
    read = read_recipe(recipe)
    with progress_bars() as report:
        record = search(read, where, report=report, **how)
    _print_front(record)
    if record["interrupted"]:
        print_line("Interrupted: what was found is kept, and the same command goes on.", error=True)
    print_line(f"Recipe: {where / CHOSEN}")


FRONT_MEASURES = ("efficacy", "specificity")


def _share(measure: dict[str, Any] | None) -> str:
    return "" if measure is None or measure["value"] is None else f"{measure['value']:.3f}"


def _print_front(record: dict[str, Any]) -> None:
    rows, asked = [], record.get("front_summaries")
    for number, place in enumerate(record["front"]):
        trial = record["trials"][place]
        settings = [
            f"{key.split('.')[-1]} {_short(value)}" for key, value in trial["settings"].items() if key != "target"
        ]
        strengths = ", ".join(f"{value:.2f}" for value in trial["strengths"].values())
        mark = "chosen" if number == record["chosen"] else ""
        cells = [
            str(number + 1),
            f"{trial['removal']:.3f}",
            f"{trial['damage']:.5f}",
            *(_share(asked[number][key]) for key in FRONT_MEASURES if asked),
            strengths,
            ", ".join(settings),
            mark,
        ]
        rows.append(cells)
    print_table(
        "front", ["", "removal", "collateral KL", *(FRONT_MEASURES if asked else ()), "strength", "settings", ""], rows
    )
    held = record["test"]
    line = f"On other texts the choice removes {held['removal']:.1%} at a collateral KL of {held['damage']:.5f}"
    if held["own_damage"] is not None:
        line += f"; the recipe as it was needs {held['own_damage']:.5f} for as much"
    print_line(
        f"{line}. {len(record['trials'])} trials, {len(record['failed'])} that removed nothing, {record['seconds']} s."
    )


def _short(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], int):
        return f"{value[0]}-{value[-1]}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


COMMANDS = (evaluate, check, relearn, faithfulness, inspect, tune)
