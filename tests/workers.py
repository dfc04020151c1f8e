"""Functions that other processes import by name: a test module's own cannot be found there."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from rotate_edit.errors import BadInput, Failure
from rotate_edit.files import whole_folder


def square(number: int) -> int:
    return number * number


def device_of(number: int) -> tuple[int, str]:
    # Long enough for the other process to take its share.
    time.sleep(0.3)
    return number, os.environ["CUDA_VISIBLE_DEVICES"]


def die(number: int) -> int:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def divide(number: int) -> float:
    return 1 / number


def refuse(number: int) -> int:
    if number == 3:
        raise BadInput(f"job {number} cannot be done.")
    return number


def write_together(output: Path, barrier: Any, results: Any, number: int) -> None:
    try:
        with whole_folder(output) as folder:
            (folder / "who").write_text(str(number))
            barrier.wait(30)
        results.put((number, "written"))
    except (BadInput, Failure) as error:
        results.put((number, str(error)))
