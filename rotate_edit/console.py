"""The terminal: tables, progress bars and errors. This is the one place that prints."""

import threading
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

# How a long step reports its progress: its name, steps done, steps in all.
Report = Callable[[str, int, int], None]
# What stands before something found, where it is reported like a step.
FOUND = "found: "
# Seconds between two lines of progress without a terminal.
INTERVAL = 30.0


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


def tell_found(report: Report, text: str) -> None:
    """Show what a long job has found, as soon as it is known.

    Args:
        report: How the job reports its progress.
        text: What was found, as untrusted text.
    """
    report(f"{FOUND}{text}", 1, 1)


@contextmanager
def progress_bars(
    *, quiet: bool = False, verbose: bool = False, interval: float = INTERVAL, terminal: bool | None = None
) -> Iterator[Report]:
    """Show on standard error how far each step is, so that output can be piped.

    In a terminal every step has a bar with an estimate of the time left, and one row shows that the job goes on.
    Without a terminal a line says the same, one every `interval` seconds, also while a step reports nothing.

    Args:
        quiet: Show nothing.
        verbose: Say also how long each step took.
        interval: Seconds between two lines without a terminal.
        terminal: Whether to draw bars. By default, whether standard error is a terminal.

    Yields:
        A report function, called with the step's name, the steps done and the steps in all.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if quiet:
        yield silent
    elif console.is_terminal if terminal is None else terminal:
        with _bars(console, verbose) as report:
            yield report
    else:
        with _lines(console, verbose, interval) as report:
            yield report


@contextmanager
def _bars(console: Console, verbose: bool) -> Iterator[Report]:
    tasks: dict[str, TaskID] = {}
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as bars:
        # It moves while a step reports nothing.
        bars.add_task("working", total=None)

        def report(step: str, done: int, total: int) -> None:
            if step.startswith(FOUND):
                bars.console.print(shown(step.removeprefix(FOUND)))
                return
            if step not in tasks:
                tasks[step] = bars.add_task(shown(step), total=total)
            before = bars.tasks[bars.task_ids.index(tasks[step])].finished
            bars.update(tasks[step], completed=done, total=total)
            task = bars.tasks[bars.task_ids.index(tasks[step])]
            if verbose and task.finished and not before:
                bars.console.print(shown(f"{step}: done in {_duration(task.elapsed or 0)}"))

        yield report


@contextmanager
def _lines(console: Console, verbose: bool, interval: float) -> Iterator[Report]:
    began = time.monotonic()
    now = _Step("working", 0, 0, began)
    stop = threading.Event()

    def say(text: str) -> None:
        console.print(shown(text))

    def report(step: str, done: int, total: int) -> None:
        nonlocal now
        if step.startswith(FOUND):
            say(step.removeprefix(FOUND))
            return
        # What comes after the first report counts for the estimate, so a step begins with it.
        now = _Step(step, done, total, now.began if now.name == step else time.monotonic())
        if verbose and done == total:
            say(f"{step}: done in {_duration(time.monotonic() - now.began)}")

    def keep_telling() -> None:
        due = began + interval
        while not stop.wait(max(0.0, due - time.monotonic())):
            say(now.line(time.monotonic()))
            due += interval

    # A daemon, so that it never keeps a process alive that ends in another way.
    teller = threading.Thread(target=keep_telling, name="progress", daemon=True)
    teller.start()
    try:
        yield report
    finally:
        stop.set()
        teller.join()


@dataclass(frozen=True)
class _Step:
    """The step that goes on, and when it began on the monotonic clock in seconds."""

    name: str
    done: int
    total: int
    began: float

    def line(self, now: float) -> str:
        """What is known of it, in words."""
        gone = now - self.began
        if self.total and self.done >= self.total:
            return f"{self.name}: done; working on what comes next"
        how_far = f"{self.done} of {self.total}, " if self.done else ""
        left = f", about {_duration(gone / self.done * (self.total - self.done))} left" if self.done else ""
        return f"{self.name}: {how_far}{_duration(gone)} so far{left}"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    return (
        f"{whole // 60} min {whole % 60:02d} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    )


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
