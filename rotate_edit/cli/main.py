"""The command line: parse, validate, one call each, print. No logic."""

import json
import sys
from pathlib import Path
from typing import Any

import click

from rotate_edit import __version__
from rotate_edit.cli import files as cli_files
from rotate_edit.cli import measure as cli_measure
from rotate_edit.console import plain, print_line, print_table, print_warnings, progress_bars
from rotate_edit.errors import BadInput, Failure, counted

OUTPUT = click.option("--output", type=click.Path(path_type=Path), help="Where to write; it must not exist yet.")
OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace an output that exists.")
ESTIMATE = click.option("--estimate", is_flag=True, help="Print time, memory and disk of the job here, and stop.")
FULL_HASH = click.option("--full-hash", is_flag=True, help="Take the SHA-256 of every byte of a large base as well.")
NO_UNDO = click.option("--no-undo", is_flag=True, help="Leave out what an exact undo needs.")
FOLDER = click.Path(path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="rotate-edit")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Edit what a causal language model knows and says, neuron channel by neuron channel."""


def main() -> None:
    """Run the command line: exit 0 when it worked, 2 for bad input, 1 for a failure, 130 when interrupted."""
    try:
        cli.main(standalone_mode=False)
    except (BadInput, Failure) as error:
        if "--debug" in sys.argv:
            raise
        print_line(f"Error: {error}", error=True)
        sys.exit(2 if isinstance(error, BadInput) else 1)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        print_line("Interrupted; nothing half-written was left behind.", error=True)
        sys.exit(130)


@cli.command()
@click.argument("recipe")
@click.option("--output", type=FOLDER, help="The run folder (default runs/<recipe>-<n>).")
@ESTIMATE
@FULL_HASH
@NO_UNDO
@click.option("--allow-code", is_flag=True, help="Dangerous: run code that task definitions bring along.")
@OVERWRITE
def run(
    recipe: str,
    output: Path | None,
    estimate: bool,
    full_hash: bool,
    no_undo: bool,
    allow_code: bool,
    overwrite: bool,
) -> None:
    """Locate, edit, save, evaluate and report, as RECIPE says."""
    from rotate_edit import pipeline
    from rotate_edit import session as opened

    read = _recipe(recipe, full_hash=full_hash, no_undo=no_undo)
    where = output or _next_run(Path(recipe).stem)
    if estimate:
        _print_estimate(f"a run of {Path(recipe).name}", *opened.estimate(read), where)
        return
    with progress_bars() as report:
        result = pipeline.run(read, where, overwrite=overwrite, allow_code=allow_code, report=report)
    about_words = [text for concept in result["concepts"] for text in concept["warnings"]]
    print_warnings(result["warnings"] + about_words + result["saved"]["warnings"])
    _print_summary(result)
    print_line(f"Report: {where / 'report.html'}")


def _recipe(path: str, *, full_hash: bool, no_undo: bool) -> Any:
    from rotate_edit.recipe import read_recipe

    read = read_recipe(path)
    flags = ({"full_hash": True} if full_hash else {}) | ({"undo": False} if no_undo else {})
    return read.model_copy(update={"save": read.save.model_copy(update=flags)})


def _print_estimate(job: str, cost: Any, device: str, output: Path) -> None:
    """Print what a job takes here, then refuse it in one sentence when it does not fit."""
    from rotate_edit.machine import check_cost, described

    print_table(f"{job} takes", ["", "the job", "this machine"], described(cost, output, device))
    check_cost(cost, output)


def _next_run(stem: str) -> Path:
    number = 1
    while (path := Path("runs") / f"{stem}-{number}").exists():
        number += 1
    return path


def _print_summary(result: dict[str, Any]) -> None:
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


@cli.command()
@click.argument("recipe")
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines instead of a table.")
def locate(recipe: str, as_json: bool) -> None:
    """Show which neurons carry RECIPE's concepts; nothing is written."""
    from rotate_edit import pipeline
    from rotate_edit import recipe as recipes
    from rotate_edit.channels.locate import by_concept
    from rotate_edit.estimate import locating_cost
    from rotate_edit.machine import check_cost

    opened = pipeline.open_recipe(recipes.read_recipe(recipe))
    check_cost(locating_cost(opened.recipe, opened.checkpoint, device=opened.device), Path(recipe))
    print_warnings(opened.warnings())
    with progress_bars() as report:
        found = pipeline.locate(opened, report=report)
    for name, groups in by_concept(found).items():
        chosen = list({channel.name: channel for located in groups for channel in located.chosen}.values())
        if not as_json:
            print_line(f"{name}: {counted(len(chosen), 'channel')} for {counted(len(groups), 'group')} of its tokens.")
        _print_channels(chosen, as_json)
    if not any(located.chosen for located in found):
        raise Failure("no channel carries the concepts; lower select.share or raise locate.candidates.")


@cli.command()
@click.argument("model")
@click.option("--revision", help="Hub revision.")
@OUTPUT
@click.option("--matrix", "matrices", multiple=True, type=click.Choice(["gate", "in", "out"]), help="Default: all.")
@click.option("--layer", "layers", multiple=True, type=int, help="Default: all.")
@click.option("--top", default=10, show_default=True, help="Tokens kept on either side.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or mps.")
@OVERWRITE
def scan(
    model: str,
    revision: str | None,
    output: Path | None,
    matrices: tuple[str, ...],
    layers: tuple[int, ...],
    top: int,
    device: str,
    overwrite: bool,
) -> None:
    """Project every neuron of MODEL on the vocabulary: top tokens, kurtosis, norm, as one Parquet file."""
    from rotate_edit.channels.cost import scan_cost
    from rotate_edit.channels.scan import scan_checkpoint
    from rotate_edit.machine import check_cost, pick_device
    from rotate_edit.models.checkpoint import open_checkpoint
    from rotate_edit.vocabulary import projection

    checkpoint = open_checkpoint(model, revision)
    target = output or Path(f"{checkpoint.source.replace('/', '--')}-scan.parquet")
    check_cost(scan_cost(checkpoint, len(matrices or checkpoint.matrices), top), target)
    rules = projection.VocabularyRules(words_only=False, ignore_undertrained=False, level_rarity=False)
    vocabulary = projection.read_vocabulary(checkpoint, rules)
    tables = projection.read_projections(checkpoint, vocabulary)
    with progress_bars() as report:
        rows = scan_checkpoint(
            checkpoint,
            target,
            matrices=matrices or checkpoint.matrices,
            projection_of=lambda layer, matrix: tables.of(layer, matrix)[0],
            texts=vocabulary.texts,
            layers=list(layers) or None,
            top=top,
            device=pick_device(device),
            overwrite=overwrite,
            progress=report,
        )
    print_line(f"{rows} neuron vectors in {target}")


@cli.command()
@click.argument("model")
@click.option("--revision", help="Hub revision.")
@OUTPUT
@click.option("--all", "everything", is_flag=True, help="Every matrix of every layer (an atlas).")
@click.option("--matrix", "matrices", multiple=True, type=click.Choice(["gate", "in", "out"]), help="Default: out.")
@click.option("--layer", "layers", multiple=True, type=int, help="Default: all.")
@click.option("--channels", default=10, show_default=True, help="At most so many of a neuron.")
@click.option(
    "--solver", default="circle", show_default=True, type=click.Choice(["circle", "adamw"]),
    help="circle is exact and fast; adamw is the paper's.",
)  # fmt: skip
@click.option("--all-tokens", is_flag=True, help="Count every token, not only beginnings of words.")
@click.option("--no-vectors", is_flag=True, help="Keep the table alone.")
@click.option("--block", default=512, show_default=True, help="Neurons of one shard.")
@click.option("--threads", default=1, show_default=True, help="CPU threads of one shard.")
@click.option("--workers", type=int, help="Shards at once on the CPU (default: what cores and memory allow).")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or mps.")
@click.option(
    "--engine", default="local", show_default=True, type=click.Choice(["local", "ray"]),
    help="Threads and GPUs of this machine, or a Ray cluster.",
)  # fmt: skip
@click.option("--address", default="auto", show_default=True, help="Ray cluster (it must be a trusted network).")
@ESTIMATE
def decompose(
    model: str,
    revision: str | None,
    output: Path | None,
    everything: bool,
    matrices: tuple[str, ...],
    layers: tuple[int, ...],
    channels: int,
    solver: str,
    all_tokens: bool,
    no_vectors: bool,
    estimate: bool,
    **how: Any,
) -> None:
    """Split neurons of MODEL into vocabulary channels; a killed run goes on where it stopped."""
    from rotate_edit.channels import decompose as room
    from rotate_edit.channels.cost import decompose_cost
    from rotate_edit.channels.shards import Targets
    from rotate_edit.channels.solver import SolverSettings
    from rotate_edit.machine import pick_device
    from rotate_edit.models.checkpoint import open_checkpoint
    from rotate_edit.vocabulary import projection

    checkpoint = open_checkpoint(model, revision)
    settings = SolverSettings(solver=solver, channels=channels, claim_threshold=room.claim_threshold(checkpoint))
    chosen = checkpoint.matrices if everything else (matrices or ("out",))
    target = output or Path(f"{checkpoint.source.replace('/', '--')}-channels")
    vectors = None if no_vectors else "bfloat16"
    if estimate:
        device = pick_device(how["device"])
        cost = decompose_cost(
            checkpoint, settings, matrices=tuple(chosen), layers=tuple(layers) or None, words_only=not all_tokens,
            vectors=vectors, block=how["block"], threads=how["threads"], workers=how["workers"], device=device,
        )  # fmt: skip
        _print_estimate(f"decomposing {checkpoint.source}", cost, device, target)
        return
    vocabulary = projection.read_vocabulary(checkpoint, projection.VocabularyRules(words_only=not all_tokens))
    with progress_bars() as report:
        found = room.decompose(
            checkpoint,
            target,
            targets=Targets(tuple(chosen), tuple(layers) or None),
            vocabulary=vocabulary,
            settings=settings,
            vectors=vectors,
            progress=report,
            **how,
        )
    size = sum(file["bytes"] for file in found.files.values())
    print_line(
        f"{found.channels} channels in {target}, {size / 1e6:.1f} MB, {size / max(found.channels, 1):.0f} bytes each"
    )


@cli.command()
@click.argument("folder", type=FOLDER)
@click.option("--token", help="Channels with this token among their strongest.")
@click.option("--substring", is_flag=True, help="The token only has to contain the text.")
@click.option("--neuron", help="Channels of one neuron, such as L3.N12.")
@click.option("--matrix", type=click.Choice(["gate", "in", "out"]), help="Channels of this matrix.")
@click.option("--min-support", type=float, help="Channels with at least this support.")
@click.option("--min-kurtosis", type=float, help="Channels at least this sharp.")
@click.option("--limit", default=20, show_default=True, help="At most so many channels.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines instead of a table.")
def channels(folder: Path, as_json: bool, **conditions: Any) -> None:
    """Print and search a channel set (a run folder works too)."""
    from rotate_edit.channels.channel_set import search

    inner = folder / "channels"
    _print_channels(search(inner if inner.is_dir() else folder, **conditions), as_json)


def _print_channels(found: Any, as_json: bool) -> None:
    if as_json:
        for channel in found:
            entry = {key: value for key, value in vars(channel).items() if key != "vector"}
            click.echo(json.dumps({"name": channel.name, **entry}))
        return
    columns = ["channel", "support", "kurtosis", "cosine", "strongest tokens"]
    rows = []
    for channel in found:
        figures = [f"{channel.support:.1f}", f"{channel.kurtosis:.1f}", f"{channel.cosine:.2f}"]
        rows.append([channel.name, *figures, " ".join(plain(token.strip()) for token in channel.tokens)])
    print_table(counted(len(rows), "channel"), columns, rows)


@cli.command()
@click.argument("recipe")
@OUTPUT
@click.option("--no-checkpoint", is_flag=True, help="Write the edit alone.")
@click.option("--adapter", is_flag=True, help="Also write the LoRA adapter.")
@ESTIMATE
@FULL_HASH
@NO_UNDO
@OVERWRITE
def edit(
    recipe: str,
    output: Path | None,
    no_checkpoint: bool,
    adapter: bool,
    estimate: bool,
    full_hash: bool,
    no_undo: bool,
    overwrite: bool,
) -> None:
    """Build RECIPE's edit and write it (edit/, model/, adapter/), without evaluating it."""
    from rotate_edit import pipeline
    from rotate_edit import session as opened

    read = _recipe(recipe, full_hash=full_hash, no_undo=no_undo)
    where = output or _next_run(f"{Path(recipe).stem}-edit")
    if estimate:
        kept = read.save.model_copy(update={"checkpoint": not no_checkpoint})
        read = read.model_copy(update={"save": kept})
        _print_estimate(f"the edit of {Path(recipe).name}", *opened.estimate(read, measured=False), where)
        return
    with progress_bars() as report:
        made, warnings = pipeline.edit_only(
            read,
            where,
            checkpoint=not no_checkpoint,
            adapter=adapter,
            overwrite=overwrite,
            report=report,
        )
    print_warnings(warnings)
    rows = sum(len(change.rows) for change in made.changes if change.layer is None)
    vectors = counted(len(made.vectors), "neuron vector") if made.vectors or not rows else counted(rows, "token row")
    matrices = counted(len(made.changes), "matrix", "matrices")
    print_line(f"{vectors} changed in {matrices}; written to {where}")


@cli.command()
@click.argument("base")
@click.argument("edited", nargs=-1, required=True)
@click.option("--prompt", "prompts", multiple=True, required=True, help="What both continue; may be repeated.")
@click.option("--new-tokens", default=40, show_default=True, help="How long a continuation is.")
@click.option("--seed", type=int, help="Sample with this seed instead of taking the likeliest token.")
def compare(base: str, edited: tuple[str, ...], prompts: tuple[str, ...], new_tokens: int, seed: int | None) -> None:
    """Continue the same prompts with BASE and each EDITED (a run, edit, adapter or checkpoint), side by side."""
    from rotate_edit.evaluation.commands import continue_prompts

    for prompt, texts in continue_prompts(base, edited, prompts, new_tokens=new_tokens, seed=seed):
        print_table(prompt, ["model", "continuation"], [[name, text] for name, text in texts.items()])


@cli.command()
@click.argument("run_folder", type=FOLDER)
def report(run_folder: Path) -> None:
    """Write report.md and report.html of a run folder again."""
    from rotate_edit.reporting.report import write_report

    write_report(run_folder)
    print_line(f"Report: {run_folder / 'report.html'}")


for command in (*cli_files.COMMANDS, *cli_measure.COMMANDS):
    cli.add_command(command)
