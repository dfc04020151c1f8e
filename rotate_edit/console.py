"""The terminal: tables, progress bars and errors. This is the one place that prints."""

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

# How a long step reports its progress: its name, steps done, steps in all.
Report = Callable[[str, int, int], None]


def silent(step: str, done: int, total: int) -> None:
    """Ignore a progress report.

    Args:
        step: Name of the step.
        done: Number of steps done.
        total: Number of steps in all.
    """


def plain(text: str) -> str:
    """Make text from a model, a vocabulary or a file name harmless for a terminal.

    A token may hold anything. So control characters (escape sequences, line breaks, direction marks) become their code
    in angle brackets.

    Args:
        text: The untrusted text.

    Returns:
        One line of printable text.
    """
    return "".join(
        character if character == " " or unicodedata.category(character)[0] not in "CZ" else f"<{ord(character):X}>"
        for character in text
    )


def shown(text: str) -> str:
    """Make text that rich prints as it is, square brackets included.

    Args:
        text: The untrusted text.

    Returns:
        `plain` text with rich's markup escaped.
    """
    return escape(plain(text))


def print_line(text: str, *, error: bool = False) -> None:
    """Print one line.

    Args:
        text: The line, as untrusted text.
        error: Print to standard error, for a problem.
    """
    Console(stderr=error, highlight=False, soft_wrap=True).print(shown(text))


def print_warnings(warnings: Iterable[str]) -> None:
    """Print each warning on a line of standard error.

    Args:
        warnings: The warnings, one sentence each.
    """
    for warning in warnings:
        print_line(f"Warning: {warning}", error=True)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table. Columns of numbers stand flush right, all others left.

    Args:
        title: Title above the table.
        columns: Headings of the columns. No heading is shown when all are empty.
        rows: The cells of each row. Every cell is untrusted text.
    """
    table = Table(title=shown(title), title_justify="left", show_header=any(columns))
    for place, column in enumerate(columns):
        numbers = place > 0 and all(_is_number(row[place]) for row in rows)
        table.add_column(shown(column), justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*[shown(cell) for cell in row])
    Console().print(table)


def _is_number(cell: str) -> bool:
    return cell in ("", "never") or cell.lstrip("-<")[:1].isdigit()


@contextmanager
def progress_bars() -> Iterator[Report]:
    """Draw one progress bar for each step, on standard error so that output can be piped.

    Yields:
        A report function, called with the step's name, the steps done and the steps in all.
    """
    tasks: dict[str, TaskID] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:

        def report(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(shown(step), total=total)
            bars.update(tasks[step], completed=done, total=total)

        yield report


@contextmanager
def without_foreign_bars() -> Iterator[None]:
    """Keep transformers from drawing its own progress bars among those of this package.

    Yields:
        Nothing.
    """
    from transformers.utils import logging

    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            logging.enable_progress_bar()
