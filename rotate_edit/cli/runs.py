"""The commands that take a recipe: run, locate, edit, tune. And report, which writes a run's report again."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from rotate_edit.cli import options
from rotate_edit.cli.channels import print_channels
from rotate_edit.cli.options import FOLDER
from rotate_edit.console import plain, print_line, print_table, print_warnings
from rotate_edit.errors import counted


@click.command()
@click.argument("recipe")
@options.suppress
@options.amplify
@options.words
@click.option("--output", type=FOLDER, help="The run folder (default runs/<recipe>-<n>).")
@options.estimate
@options.full_hash
@options.no_undo
@options.allow_code
@options.overwrite
def run(
    recipe: str,
    suppress: tuple[str, ...],
    amplify: tuple[str, ...],
    words: tuple[str, ...],
    output: Path | None,
    estimate: bool,
    full_hash: bool,
    no_undo: bool,
    allow_code: bool,
    overwrite: bool,
) -> None:
    """Locate, edit, save, evaluate and report, as RECIPE says.

    Without a recipe: rotate-edit run MODEL --suppress golf --words golf,golfer,putter
    """
    from rotate_edit import pipeline, session

    read, name = options.recipe_of(recipe, suppress, amplify, words, save=_save(full_hash, no_undo))
    where = output or options.next_run(name)
    if estimate:
        options.print_estimate(f"a run of {Path(recipe).name}", *session.estimate(read), where)
        return
    with options.progress_bars() as report:
        result = pipeline.run(
            read, where, overwrite=overwrite, allow_code=allow_code, report=report, tell=print_warnings
        )
    print_warnings(result["saved"]["warnings"])
    _print_summary(result)
    print_line(f"Report: {where / 'report.html'}")


def _save(full_hash: bool, no_undo: bool) -> dict[str, bool]:
    return ({"full_hash": True} if full_hash else {}) | ({"undo": False} if no_undo else {})


def _print_summary(result: dict[str, Any]) -> None:
    from rotate_edit.reporting.content import outcome

    parts = [[part["name"], part["verdict"], part["sentence"]] for part in outcome(result)]
    if parts:
        print_table("what was done to what (95 % intervals in brackets)", ["", "", ""], parts)
    rows = []
    for name, measure in {**result.get("summary", {}), **_measures(result)}.items():
        if measure["value"] is not None:
            interval = "" if measure["low"] is None else f"{measure['low']:.4g} to {measure['high']:.4g}"
            rows.append([name.replace("_", " "), f"{measure['value']:.4g}", interval, str(measure["n"])])
    concepts = ", ".join(f"{concept['name']} at strength {concept['strength']}" for concept in result["concepts"])
    print_table(f"{concepts}", ["measure", "value", "95 % interval", "n"], rows)
    for name, table in result.get("matched", {}).items():
        print_table(
            f"{name}: damage where a tenth of the concept is left",
            ["method", "strength", "collateral KL (nats)", "times ours"],
            [
                [row["method"], *(f"{row[key]:.3g}" if row[key] is not None else "never" for key in keys)]
                for keys in [("strength", "collateral_kl", "ratio")]
                for row in table["rows"]
            ],
        )


def _measures(result: dict[str, Any]) -> dict[str, Any]:
    variants = result.get("variants") or {}
    first: dict[str, Any] = next(iter(variants.values()), {})
    known = first.get("measures", {})
    return {name: known[name] for name in ("concept_mass_fraction", "collateral_kl") if name in known}


@click.command()
@click.argument("recipe")
@options.as_json
def locate(recipe: str, as_json: bool) -> None:
    """Show which neurons carry RECIPE's concepts; nothing is written."""
    from rotate_edit.pipeline import locate_channels

    with options.progress_bars() as report:
        found = locate_channels(recipe, report, tell=print_warnings)
    for name, (groups, chosen) in found.items():
        if not as_json:
            print_line(f"{name}: {counted(len(chosen), 'channel')} for {counted(groups, 'group')} of its tokens.")
        print_channels(chosen, as_json)


@click.command()
@click.argument("recipe")
@options.suppress
@options.amplify
@options.words
@options.channel_set
@options.channel_strength
@options.channel_matrix
@options.output
@click.option("--no-checkpoint", is_flag=True, help="Write the edit alone.")
@click.option("--adapter", is_flag=True, help="Also write the LoRA adapter.")
@click.option("--text", help="A text file, folder or dataset to measure on (default: the model writes some).")
@click.option("--no-measure", is_flag=True, help="Do not measure named channels on text.")
@options.estimate
@options.full_hash
@options.no_undo
@options.overwrite
def edit(
    recipe: str,
    suppress: tuple[str, ...],
    amplify: tuple[str, ...],
    words: tuple[str, ...],
    channel_set: str | None,
    strength: float | None,
    matrix: str | None,
    output: Path | None,
    no_checkpoint: bool,
    adapter: bool,
    text: str | None,
    no_measure: bool,
    estimate: bool,
    full_hash: bool,
    no_undo: bool,
    overwrite: bool,
) -> None:
    """Build RECIPE's edit and write it (edit/, model/, adapter/), without evaluating its concepts.

    Without a recipe: rotate-edit edit MODEL --suppress golf --words golf,golfer,putter, or with chosen channels:
    rotate-edit edit MODEL --suppress L29.N808.out#0 --amplify token:beach
    """
    from rotate_edit import pipeline, session

    read, name = options.recipe_of(
        recipe, suppress, amplify, words, channel_set=channel_set, strength=strength, matrix=matrix, text=text,
        save=_save(full_hash, no_undo),
    )  # fmt: skip
    where = output or options.next_run(f"{name}-edit")
    if estimate:
        read = pipeline.with_save(read, checkpoint=not no_checkpoint)
        options.print_estimate(f"the edit of {Path(recipe).name}", *session.estimate(read, measured=False), where)
        return
    with options.progress_bars() as report:
        written = pipeline.edit_only(
            read, where, checkpoint=not no_checkpoint, adapter=adapter, measured=not no_measure, overwrite=overwrite,
            report=report, tell=print_warnings,
        )  # fmt: skip
    print_warnings(written.warnings)
    _print_neurons(written.neurons)
    _print_effects(written.channels)
    made = written.edit
    rows = sum(len(change.rows) for change in made.changes if change.layer is None)
    vectors = counted(len(made.vectors), "neuron vector") if made.vectors or not rows else counted(rows, "token row")
    matrices = counted(len(made.changes), "matrix", "matrices")
    print_line(f"{vectors} changed in {matrices}; written to {where}")


def _print_neurons(neurons: Sequence[dict[str, Any]]) -> None:
    """What became of every channel of the neurons that chosen channels are in."""
    rows = []
    for neuron in neurons:
        for channel in neuron["channels"]:
            sign = "+" if channel["sign"] > 0 else "-"
            tokens = " ".join(plain(token.strip()) for token in channel["tokens"][:6])
            strength = f"{channel['strength']:g}" if channel["strength"] else ""
            # Without the sign that rounding leaves of a zero.
            shares = [f"{round(channel[key], 3) + 0.0:.3f}" for key in ("before", "after")]
            rows.append([channel["name"], sign, tokens, strength, *shares, f"{neuron['cosine']:.3f}"])
    if rows:
        columns = ["channel", "sign", "strongest tokens", "strength", "share before", "after", "neuron's cosine"]
        print_table("share of its neuron's vector that lies along a channel", columns, rows)


def _print_effects(measured: dict[str, Any]) -> None:
    """What the chosen channels do to the running model."""
    rows = []
    for effect in measured.get("effects", ()):
        there = "the neuron fires" if effect["measure"] == "probability" else "its tokens stand"
        figures = [f"{effect[key]:.3g}" for key in ("before", "after", "before_elsewhere", "after_elsewhere")]
        nats = [f"{effect[key]:.2g}" for key in ("divergence", "divergence_elsewhere")]
        rows.append([effect["name"], effect["measure"], f"{there} ({effect['places']})", *figures, *nats])
    if rows:
        columns = ["channel", "mean", "where", "before", "after", "elsewhere", "after", "KL there", "KL elsewhere"]
        print_table(f"in the model, on {measured['tokens']} tokens", columns, rows)
    for sentence in measured.get("unmeasured", ()):
        print_line(sentence)
    rows = []
    for trial in measured.get("trials", ()):
        figures = [f"{trial['own'][name]:.2f} ({trial['others'][name]:.2f})" for name in trial["own"]]
        rows.append([trial["name"], f"{trial['before']:.2f}", *figures])
    if rows:
        columns = ["channel", "whole neuron", *measured["trials"][0]["own"]]
        print_table(
            "taken out alone: what its tokens lose, and in brackets those of the neuron's other channels "
            "(standard deviations)",
            columns,
            rows,
        )


@click.command()
@click.argument("recipe")
@click.option("--trials", default=60, show_default=True, type=click.IntRange(1), help="In all, with earlier ones.")
@click.option(
    "--output", type=FOLDER, help="The folder of the search (default runs/tune-<recipe>); it is gone on with."
)
@click.option(
    "--pick", default="knee", show_default=True, help="knee, a number of the Pareto front, or damage=0.01 (nats)."
)
@click.option("--tokens", default=1200, show_default=True, type=click.IntRange(256), help="Of text for each trial.")
@click.option("--lm-eval", is_flag=True, help="Also ask the edits of the Pareto front the recipe's items and tasks.")
@click.option("--seed", default=0, show_default=True, help="Of the search.")
def tune(recipe: str, output: Path | None, **how: Any) -> None:
    """Search for the settings of RECIPE that remove most for least damage, and write the chosen recipe."""
    from rotate_edit.recipe import read_recipe
    from rotate_edit.search.tune import CHOSEN, search

    where = output or Path("runs") / f"tune-{Path(recipe).stem}"
    read = read_recipe(recipe)
    with options.progress_bars() as report:
        record = search(read, where, report=report, tell=print_warnings, **how)
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


@click.command()
@click.argument("run_folder", type=FOLDER)
def report(run_folder: Path) -> None:
    """Write report.md and report.html of a run folder again."""
    from rotate_edit.reporting.report import write_report

    write_report(run_folder)
    print_line(f"Report: {run_folder / 'report.html'}")


COMMANDS = (run, locate, edit, tune, report)
