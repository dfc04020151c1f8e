"""Every command with its arguments and options as Markdown, read off the command line itself (docs/commands.md)."""

import click

from rotate_edit.cli.main import cli

PROGRAM = "rotate-edit"


def reference() -> str:
    """The command reference: one section a command, in the order in which the work is done."""
    lines = [
        "# Command reference",
        "",
        "Generated from the command line. Exit codes: 0 when it worked, 2 for input that cannot be used, 1 for a",
        "failure, 130 when interrupted. An error is one sentence; `rotate-edit --debug COMMAND` shows its traceback.",
        "",
    ]
    for name, command in cli.commands.items():
        lines += _section(f"{PROGRAM} {name}", command)
    return "\n".join(lines)


def _section(name: str, command: click.Command) -> list[str]:
    context = click.Context(command, info_name=name)
    usage = " ".join([name, *command.collect_usage_pieces(context)])
    lines = [f"## {name}", "", f"`{usage}`", "", " ".join((command.help or "").split()), ""]
    options = [
        option.get_help_record(context) or ("", "") for option in command.params if option.param_type_name == "option"
    ]
    if options:
        lines += ["| option | |", "|---|---|"]
        lines += [f"| `{_cell(flags)}` | {_cell(meaning)} |" for flags, meaning in options]
        lines.append("")
    return lines


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
