"""Progress: bars in a terminal, lines without one, and no long silence."""

import threading
import time
from itertools import pairwise

import pytest

from rotate_edit.console import progress_bars, tell_found


def test_no_silence_is_longer_than_the_interval_while_a_step_goes_on(capfd: pytest.CaptureFixture[str]) -> None:
    """A step that reports once and then nothing is told of at every interval, and no more often."""
    interval, heard = 0.2, [time.monotonic()]
    lines = 0
    with progress_bars(interval=interval, terminal=False) as report:
        report("slow step", 1, 4)
        while len(heard) < 6:
            time.sleep(0.005)
            said = capfd.readouterr().err.splitlines()
            if said:
                lines += len(said)
                assert said[0].startswith("slow step: 1 of 4, ")
                assert said[0].endswith(" left")
                heard.append(time.monotonic())
    silences = [after - before for before, after in pairwise(heard)]
    assert lines <= (heard[-1] - heard[0]) / interval + 1
    # What is beyond the interval is what the machine takes to wake a thread.
    assert max(silences) < interval + 0.5
    assert "progress" not in [thread.name for thread in threading.enumerate()]


def test_before_the_first_report_and_between_steps_something_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    with progress_bars(interval=0.05, terminal=False) as report:
        time.sleep(0.2)
        report("one", 2, 2)
        time.sleep(0.2)
    said = capfd.readouterr().err
    assert "working: 0.1 s so far" in said
    assert "one: done; working on what comes next" in said


def test_what_was_found_is_shown_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    for terminal in (False, True):
        with progress_bars(terminal=terminal) as report:
            tell_found(report, "golf: strength [1.5]\x1b")
        assert "golf: strength [1.5]<1B>" in capfd.readouterr().err


@pytest.mark.parametrize("terminal", [False, True])
def test_quiet_says_nothing_and_verbose_how_long(capfd: pytest.CaptureFixture[str], terminal: bool) -> None:
    with progress_bars(quiet=True, terminal=terminal, interval=0.01) as report:
        report("one", 1, 1)
        tell_found(report, "found")
        time.sleep(0.05)
    assert capfd.readouterr().err == ""
    with progress_bars(verbose=True, terminal=terminal) as report:
        report("one", 0, 1)
        report("one", 1, 1)
    assert "one: done in 0." in capfd.readouterr().err


def test_the_teller_ends_with_an_error() -> None:
    with pytest.raises(KeyError), progress_bars(terminal=False):
        raise KeyError
    assert "progress" not in [thread.name for thread in threading.enumerate()]
