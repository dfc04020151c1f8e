"""docs/commands.md is what the command line says of itself."""

import click
import pytest
from places import ROOT

from rotate_edit.cli.main import cli
from rotate_edit.cli.reference import reference

DOCS = ROOT / "docs" / "commands.md"


def test_the_reference_is_up_to_date() -> None:
    again = (
        "python -c 'from rotate_edit.cli.reference import reference; print(reference(), end=\"\")' > docs/commands.md"
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
