"""docs/commands.md is what the command line says of itself."""

from pathlib import Path

import click
import pytest

from rotate_edit.cli import cli
from rotate_edit.cli_reference import reference

DOCS = Path(__file__).parents[1] / "docs" / "commands.md"


def test_the_reference_is_up_to_date() -> None:
    again = (
        "python -c 'from rotate_edit.cli_reference import reference; print(reference(), end=\"\")' > docs/commands.md"
    )
    assert DOCS.read_text(encoding="utf-8") == reference(), f"write it again with: {again}"


@pytest.mark.parametrize("name", cli.commands)
def test_every_command_and_option_is_explained(name: str) -> None:
    command = cli.commands[name]
    assert command.help
    assert f"\n## rotate-edit {name}\n" in reference()
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help, f"{name} --{option.name} has no help"
