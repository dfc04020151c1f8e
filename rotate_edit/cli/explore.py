"""The command `explore`: a local page for channels."""

from pathlib import Path

import click

from rotate_edit.cli import options
from rotate_edit.cli.options import FOLDER
from rotate_edit.console import print_line


@click.command()
@click.argument("model")
@click.option("--atlas", metavar="FOLDER", help="A channel set of MODEL, in which words are looked up.")
@click.option("--edit", type=FOLDER, help="A run or an edit that stands beside the cart.")
@click.option("--port", type=click.IntRange(1, 65535), help="Port of the page (default: any that is free).")
@click.option("--output", type=FOLDER, default=Path("runs"), show_default=True, help="Where the page writes.")
@click.option("--no-browser", is_flag=True, help="Print the address and open nothing.")
def explore(model: str, atlas: str | None, edit: Path | None, port: int | None, output: Path, no_browser: bool) -> None:
    """Look channels of MODEL up on a local page, turn them by sliders, and write a recipe or an edit."""
    import secrets
    import webbrowser
    from threading import Timer

    from rotate_edit.cli.explorer import server

    server.without_telemetry()
    from rotate_edit.cli.explorer.page import build_page
    from rotate_edit.cli.explorer.workbench import open_workbench

    chosen = server.free_port(port)
    bench = open_workbench(model, atlas, edit)
    with options.progress_bars() as report:
        report("load the model", 0, 1)
        _ = bench.session.model
        report("load the model", 1, 1)
    token = secrets.token_urlsafe(24)
    address = f"http://{server.HOST}:{chosen}/?token={token}"
    print_line(f"Open {address} (this machine alone; Ctrl-C ends it).")
    if not no_browser:
        Timer(1.5, webbrowser.open, [address]).start()
    server.serve(build_page(bench, lambda name: _next_path(output, name)), chosen, token)


def _next_path(output: Path, name: str) -> Path:
    """The first of explore-1-NAME, explore-2-NAME and so on that does not exist."""
    number = 1
    while (path := output / f"explore-{number}-{name}").exists():
        number += 1
    return path


COMMANDS = (explore,)
