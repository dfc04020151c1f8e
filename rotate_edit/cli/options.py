"""What several commands share: their options, each declared once, and the folders that they mean."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from rotate_edit import console
from rotate_edit.console import Report, print_line, print_table
from rotate_edit.errors import BadInput

FOLDER: Any = click.Path(path_type=Path)
MATRIX_KINDS = ("gate", "in", "out")
# Times by which the option --amplify raises a concept's odds.
DEFAULT_ODDS = 5.0
DEVICES = "auto, cpu, cuda or mps."

output = click.option("--output", type=FOLDER, help="Where to write; it must not exist yet.")
json_output = click.option("--output", type=FOLDER, help="Write the result as JSON here.")
overwrite = click.option("--overwrite", is_flag=True, help="Replace an output that exists.")
revision = click.option("--revision", help="Hub revision.")
estimate = click.option("--estimate", is_flag=True, help="Print time, memory and disk of the job here, and stop.")
full_hash = click.option("--full-hash", is_flag=True, help="Take the SHA-256 of every byte of a large base as well.")
no_undo = click.option("--no-undo", is_flag=True, help="Leave out what an exact undo needs.")
allow_code = click.option("--allow-code", is_flag=True, help="Dangerous: run code that task definitions bring along.")
device = click.option("--device", default="auto", show_default=True, help=DEVICES)
matrices = click.option(
    "--matrix", "matrices", multiple=True, type=click.Choice(MATRIX_KINDS), help="May be repeated (default: out)."
)
all_matrices = click.option(
    "--matrix", "matrices", multiple=True, type=click.Choice(MATRIX_KINDS), help="May be repeated (default: all)."
)
layers = click.option("--layer", "layers", multiple=True, type=int, help="May be repeated (default: all).")
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
edited_models = click.argument("edited", nargs=-1, required=True, type=FOLDER)
suppress = click.option("--suppress", multiple=True, metavar="NAME", help="A concept to suppress; RECIPE is a model.")
amplify = click.option("--amplify", multiple=True, metavar="NAME", help="A concept to amplify; RECIPE is a model.")
words = click.option(
    "--words", multiple=True, metavar="A,B,C", help="The words of each concept named, in order (default: its name)."
)
concepts = click.option("--concept", "concepts", multiple=True, help="Edited concepts (default: as the edits say).")


def recipe_of(
    path: str, suppress: Sequence[str], amplify: Sequence[str], words: Sequence[str], **save: bool
) -> tuple[Any, str]:
    """The recipe that a command is given, and a name for its output.

    Args:
        path: A recipe; or a model, where concepts are named by options.
        suppress: Names of concepts to suppress.
        amplify: Names of concepts to amplify.
        words: The words of each of them, separated by commas.
        **save: What the recipe's `save` is set to.

    Raises:
        BadInput: The recipe or the options are not possible.
    """
    from rotate_edit.pipeline import with_save
    from rotate_edit.recipe import parse_recipe, read_recipe

    names = [*suppress, *amplify]
    if not names:
        if words:
            raise BadInput("--words needs the name of a concept: add --suppress NAME or --amplify NAME.")
        return with_save(read_recipe(path), **save), Path(path).stem
    if words and len(words) != len(names):
        raise BadInput(f"--words is given {len(words)} times for {len(names)} concepts; give it once for each of them.")
    if path.endswith((".yaml", ".yml")):
        raise BadInput(f"--suppress and --amplify take a model, and {path} is a recipe; leave one of them out.")
    concepts: list[dict[str, Any]] = []
    for name, own in zip(names, words or names, strict=True):
        listed = [word.strip() for word in own.split(",") if word.strip()]
        concepts.append({"name": name, "words": listed, "plurals": not words})
    for concept in concepts[len(suppress) :]:
        concept["odds"] = DEFAULT_ODDS
    read = parse_recipe({"model": path, "concepts": concepts}, "what the options say")
    return with_save(read, **save), f"{Path(path).stem}-{names[0].replace(' ', '-')}"


def next_run(stem: str) -> Path:
    """The first of runs/STEM-1, runs/STEM-2 and so on that does not exist."""
    number = 1
    while (path := Path("runs") / f"{stem}-{number}").exists():
        number += 1
    return path


@dataclass(frozen=True)
class Feedback:
    """How much a command says while it works: the root's --quiet and --verbose."""

    quiet: bool = False
    verbose: bool = False


@contextmanager
def progress_bars() -> Iterator[Report]:
    """Progress as the command line asks for it. With --verbose the command's settings stand before it."""
    context = click.get_current_context(silent=True)
    asked = (context.find_object(Feedback) if context else None) or Feedback()
    if asked.verbose and context is not None:
        given = {name: value for name, value in context.params.items() if value not in (None, (), False)}
        print_line(f"{context.info_name}: " + ", ".join(f"{key} {value}" for key, value in given.items()), error=True)
    with console.progress_bars(quiet=asked.quiet, verbose=asked.verbose) as report:
        yield report


def inside(folder: Path, name: str) -> Path:
    """The folder of that name inside a run folder; the folder itself where there is none."""
    return folder / name if (folder / name).is_dir() else folder


def edit_of(folder: Path) -> Path:
    """The edit of a run folder.

    Raises:
        BadInput: The folder holds none.
    """
    if not (folder / "edit").is_dir():
        raise BadInput(f'"{folder}" is not a run folder with its edit in edit/; name the edit\'s folder with --edit.')
    return folder / "edit"


def print_estimate(job: str, cost: Any, device: str, output: Path) -> None:
    """Print what a job takes here, then refuse it in one sentence when it does not fit."""
    from rotate_edit.machine import check_cost, described

    print_table(f"{job} takes", ["", "the job", "this machine"], described(cost, output, device))
    check_cost(cost, output)
