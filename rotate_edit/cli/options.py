"""What several commands share: their options, each declared once, and the folders that they mean."""

from collections.abc import Iterator, Mapping, Sequence
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
# What a name begins with that means the channels of some words.
TOKEN = "token:"
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
suppress = click.option(
    "--suppress", multiple=True, metavar="NAME",
    help="A concept, a channel (L9.N12.out#0) or the channels of a word (token:beach) to suppress; RECIPE is a model.",
)  # fmt: skip
amplify = click.option("--amplify", multiple=True, metavar="NAME", help="The same, to amplify it; RECIPE is a model.")
channel_set = click.option(
    "--from", "channel_set", metavar="FOLDER", help="A channel set, atlas or run folder that named channels are in."
)
channel_strength = click.option(
    "--strength", type=float, help="Of named channels: 1, the default, takes a channel out or doubles it."
)
channel_matrix = click.option(
    "--matrix", type=click.Choice(MATRIX_KINDS), help="Where the channels of a word are looked for (default: out)."
)
words = click.option(
    "--words", multiple=True, metavar="A,B,C", help="The words of each concept named, in order (default: its name)."
)
concepts = click.option("--concept", "concepts", multiple=True, help="Edited concepts (default: as the edits say).")


def recipe_of(
    path: str,
    suppress: Sequence[str],
    amplify: Sequence[str],
    words: Sequence[str],
    *,
    channel_set: str | None = None,
    strength: float | None = None,
    matrix: str | None = None,
    text: str | None = None,
    save: Mapping[str, bool] = {},
) -> tuple[Any, str]:
    """The recipe that a command is given, and a name for its output.

    Args:
        path: A recipe; or a model, where concepts or channels are named by options.
        suppress: Names of concepts and channels to suppress.
        amplify: Names of concepts and channels to amplify.
        words: The words of each concept among them, separated by commas.
        channel_set: Where named channels are. None leaves it to the recipe.
        strength: How far named channels are turned.
        matrix: Where channels of words are looked for.
        text: What is measured on, in place of the recipe's.
        save: What the recipe's `save` is set to.

    Raises:
        BadInput: The recipe or the options are not possible.
    """
    from rotate_edit.pipeline import with_save
    from rotate_edit.recipe import parse_recipe, read_recipe

    names = [*suppress, *amplify]
    if not names:
        if words:
            raise BadInput("--words needs the name of a concept: add --suppress NAME or --amplify NAME.")
        if strength is not None or matrix is not None:
            raise BadInput("--strength and --matrix are of channels that --suppress or --amplify names; add one.")
        read = read_recipe(path)
        if channel_set is not None:
            read = read.model_copy(update={"channel_set": channel_set})
        if text is not None:
            read = read.model_copy(update={"evaluate": read.evaluate.model_copy(update={"text": text})})
        return with_save(read, **save), Path(path).stem
    concepts = [name for name in names if not _is_channel(name)]
    if words and len(words) != len(concepts):
        counts = f"{len(words)} times for {len(concepts)} concepts"
        raise BadInput(f"--words is given {counts}; give it once for each of them.")
    if path.endswith((".yaml", ".yml")):
        raise BadInput(f"--suppress and --amplify take a model, and {path} is a recipe; leave one of them out.")
    listed = dict(zip(concepts, words or concepts, strict=True))
    content: dict[str, Any] = {"model": path, "channel_set": channel_set, "concepts": [], "channels": []}
    if text is not None:
        content["evaluate"] = {"text": text}
    for names_of, turned in ((suppress, 1.0), (amplify, -1.0)):
        for name in names_of:
            if _is_channel(name):
                content["channels"].append(
                    _channel_entry(name, turned * (1.0 if strength is None else strength), matrix)
                )
                continue
            own = [word.strip() for word in listed[name].split(",") if word.strip()]
            concept = {"name": name, "words": own, "plurals": not words}
            content["concepts"].append(concept | ({"odds": DEFAULT_ODDS} if turned < 0 else {}))
    read = parse_recipe(content, "what the options say")
    return with_save(read, **save), f"{Path(path).stem}-{_as_file_name(names[0])}"


def _is_channel(name: str) -> bool:
    return "#" in name or name.startswith(TOKEN)


def _channel_entry(name: str, strength: float, matrix: str | None) -> dict[str, Any]:
    """The entry of a recipe for a channel that an option names."""
    if not name.startswith(TOKEN):
        return {"channel": name, "strength": strength}
    tokens = [word.strip() for word in name.removeprefix(TOKEN).split(",") if word.strip()]
    return {"tokens": tokens, "strength": strength, "matrix": matrix or "out"}


def _as_file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name)


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
