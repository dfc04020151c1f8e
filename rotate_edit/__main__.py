"""`python -m rotate_edit` is the same as the `rotate-edit` command."""

from rotate_edit.cli.main import main

main()
