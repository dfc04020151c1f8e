"""What a job will take, and the refusal of one that cannot fit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rotate_edit.errors import BadInput
from rotate_edit.machine import (
    Cost,
    Speeds,
    available_memory,
    check_cost,
    described,
    disk_speed,
    held_memory,
    peak_memory,
    pick_device,
    product_speed,
    seconds,
)


def test_costs_add_up() -> None:
    total = Cost(1e9, 3.0, 4, 10, 0, 5, 8) + Cost(2e9, 7.0, 5, 7, 3, 6, 8)
    assert total == Cost(3e9, 7.0, 9, 10, 3, 11, 8)


def test_time_is_work_over_the_speeds_of_this_machine(tmp_path: Path) -> None:
    assert product_speed() > 1e8
    speeds = Speeds(operations=1e9, writing=1e8)
    cost = Cost(5e9, 3.0, 2_000_000_000, 1, 0, 500_000_000)
    assert seconds(cost, tmp_path, speeds=speeds) == pytest.approx(3 + 5 + 2 + 5)
    # Measured where none are given: a machine does more than a product a second and less than all of them at once.
    assert 3 < seconds(replace(cost, read=0), tmp_path / "out") < 3600
    for operations, words in ((0, "3 seconds"), (600e9, "10 minutes"), (1e13, "3 hours"), (1e15, "12 days")):
        rows = described(Cost(operations, 3.0, 0, 1000, 0, 1000), tmp_path, speeds=speeds)
        assert [row[0] for row in rows] == ["time", "memory", "GPU memory", "disk"]
        assert rows[0][1] == f"about {words}"
    remote = described(Cost(download=2_500_000_000), tmp_path, speeds=speeds)
    assert ["download", "2.500 GB at most", "not counted in the time"] in remote


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    check_cost(Cost(memory=1000, disk=1000), tmp_path / "out")
    for cost, words in (
        (Cost(memory=10**15), "GB of memory"),
        (Cost(gpu_memory=10**15), "GB of GPU memory"),
        (Cost(disk=10**18), "its disk has"),
    ):
        with pytest.raises(BadInput, match=words):
            check_cost(cost, tmp_path / "out")
    assert available_memory() > 10**7
    assert disk_speed(tmp_path / "not" / "there") > 1e5
    assert list(tmp_path.iterdir()) == []


def test_what_the_process_holds_already_is_not_needed_again(tmp_path: Path) -> None:
    held, available = held_memory(), available_memory()
    # A quarter of what it holds on top of what is free, so that it only fits because that is counted.
    check_cost(Cost(memory=available + held // 4), tmp_path)
    with pytest.raises(BadInput, match="GB of memory"):
        check_cost(Cost(memory=3 * available + 2 * held), tmp_path)
    assert peak_memory() >= held / 1024**2


def test_a_device_that_is_not_here_is_refused() -> None:
    assert pick_device("cpu") == "cpu"
    assert pick_device("auto") in ("cuda", "mps", "cpu")
    for device in ("tpu", "" if torch.cuda.is_available() else "cuda"):
        with pytest.raises(BadInput, match="no such device"):
            pick_device(device)
