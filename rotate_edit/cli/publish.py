"""The commands that publish and repeat a run: push, reproduce."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rotate_edit.cli import options
from rotate_edit.cli.options import FOLDER
from rotate_edit.console import print_line, print_table
from rotate_edit.errors import Failure, counted

if TYPE_CHECKING:
    from rotate_edit.reporting.reproduce import Difference


@click.command()
@click.argument("folder", type=FOLDER)
@click.argument("repository", metavar="REPO_ID")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--adapter", is_flag=True, help="Publish the LoRA adapter instead of the checkpoint.")
@click.option("--undo", is_flag=True, help="Publish the undo file too: it holds what was removed.")
@click.option("--base-model", help="Hub id of the base, when the run took it from a folder.")
@click.option("--overwrite", is_flag=True, help="Commit to a repository that holds files already.")
def push(
    folder: Path,
    repository: str,
    private: bool,
    adapter: bool,
    undo: bool,
    base_model: str | None,
    overwrite: bool,
) -> None:
    """Publish the model (or adapter) of run FOLDER on the Hub, with its card, its edit and how to repeat it."""
    from rotate_edit.reporting.push import push as push_run

    pushed = push_run(
        folder, repository, private=private, adapter=adapter, undo=undo, base_model=base_model, overwrite=overwrite
    )
    for name in pushed.files:
        print_line(name)
    print_line(f"{counted(len(pushed.files), 'file')} published as {pushed.repository}, commit {pushed.commit[:12]}")


@click.command()
@click.argument("description", metavar="REPRODUCE_JSON", type=FOLDER)
@options.output
@click.option("--model", help="Where the base lies here, when not where the recipe says.")
@options.allow_code
@options.overwrite
def reproduce(description: Path, output: Path | None, model: str | None, allow_code: bool, overwrite: bool) -> None:
    """Run a reproduce.json again and compare hashes and numbers; exit 1 when a difference is serious."""
    from rotate_edit.pipeline import repeat

    with options.progress_bars() as report:
        found, agreed = repeat(
            description,
            output or Path("runs/reproduced"),
            model=model,
            allow_code=allow_code,
            overwrite=overwrite,
            report=report,
        )
    print_comparison(found, agreed)


def print_comparison(found: Sequence["Difference"], agreed: int) -> None:
    """Print how a second run differs from the first.

    Args:
        found: The differences.
        agreed: How many hashes, numbers and settings agree.

    Raises:
        Failure: A difference is serious.
    """
    if found:
        rows = [[one.severity, one.what, one.before, one.now] for one in found]
        print_table(counted(len(found), "difference"), ["severity", "in", "then", "now"], rows)
    serious = sum(one.severity == "serious" for one in found)
    if serious:
        raise Failure(f"{counted(serious, 'serious difference')}: this is not the same result.")
    print_line(f"Reproduced: {counted(agreed, 'hash, number or setting', 'hashes, numbers and settings')} agree.")


COMMANDS = (push, reproduce)
