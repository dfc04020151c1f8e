"""The command line: `rotate-edit`, with one module for each group of commands."""

import sys
from pathlib import Path

import click

from rotate_edit import __version__
from rotate_edit.cli import channels, chat, edits, evaluation, explore, publish, runs
from rotate_edit.cli.options import FOLDER, Feedback
from rotate_edit.console import print_line
from rotate_edit.errors import BadInput, Failure


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="rotate-edit")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option("--quiet", is_flag=True, help="No progress: nothing but results, warnings and errors.")
@click.option("--verbose", is_flag=True, help="Say the settings of a command and how long each step took.")
@click.option(
    "--plugin", "plugins", multiple=True, type=FOLDER,
    help="Dangerous: run this Python file first; it may register methods, metrics and model families.",
)  # fmt: skip
@click.pass_context
def cli(context: click.Context, debug: bool, quiet: bool, verbose: bool, plugins: tuple[Path, ...]) -> None:
    """Edit what a causal language model knows and says, neuron channel by neuron channel."""
    if quiet and verbose:
        raise BadInput("--quiet and --verbose exclude one another; give one of them.")
    context.obj = Feedback(quiet, verbose)
    for plugin in plugins:
        _run_plugin(plugin)


def _run_plugin(path: Path) -> None:
    import runpy

    if not path.is_file():
        raise BadInput(f"there is no plugin file {path}.")
    try:
        runpy.run_path(str(path), run_name=path.stem)
    except (BadInput, Failure):
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise BadInput(f"the plugin file {path} ends with an error ({reason}).") from error


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


for group in (runs, channels, edits, evaluation, chat, explore, publish):
    for command in group.COMMANDS:
        cli.add_command(command)
