"""`python -m rotate_edit.edits.methods`: the methods as a Markdown table, which docs/methods.md holds."""

import click

from rotate_edit.edits.methods.table import method_table

click.echo(method_table())
