"""Every engine does every job once, reports what went wrong in one sentence, and starts nothing after an error."""

import sys
import time

import pytest
import torch
from places import TESTS
from workers import device_of, die, divide, refuse, square

from rotate_edit.channels.engines import run_processes, run_ray, run_threads
from rotate_edit.errors import BadInput, Failure
from rotate_edit.machine import pick_device


@pytest.mark.parametrize("workers", [1, 3])
def test_threads_do_every_job_once(workers: int) -> None:
    results: list[int] = []
    run_threads(square, [(number,) for number in range(20)], results.append, workers=workers)
    assert sorted(results) == [number * number for number in range(20)]


def test_the_first_error_ends_the_run() -> None:
    done: list[int] = []

    def work(number: int) -> int:
        done.append(number)
        time.sleep(0.01)
        return refuse(number)

    with pytest.raises(BadInput, match="job 3"):
        run_threads(work, [(number,) for number in range(200)], lambda result: None, workers=1)
    assert len(done) < 20


def test_each_process_sees_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    results: list[tuple[int, str]] = []
    run_processes(device_of, [(number,) for number in range(8)], results.append, devices=2)
    assert sorted(number for number, _ in results) == list(range(8))
    assert {device for _, device in results} == {"4", "7"}


def test_a_dead_process_is_a_failure() -> None:
    with pytest.raises(Failure, match="run the same command again"):
        run_processes(die, [(number,) for number in range(4)], lambda result: None, devices=1)


def test_ray_is_asked_for_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BadInput, match=r"rotate-edit\[ray\]"):
        run_ray(square, [(1,)], lambda result: None, address="auto", threads=1, gpus=0)


@pytest.mark.slow
def test_ray_does_every_job_and_passes_errors_on() -> None:
    ray = pytest.importorskip("ray")
    with pytest.raises(BadInput, match="no Ray cluster"):
        run_ray(square, [(1,)], lambda result: None, address="auto", threads=1, gpus=0)
    results: list[int] = []
    # Ray's workers import the functions by name, so they must find their file.
    environment = {"env_vars": {"PYTHONPATH": str(TESTS)}}
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    try:
        run_ray(square, [(number,) for number in range(10)], results.append, address="auto", threads=1, gpus=0)
        assert sorted(results) == [number * number for number in range(10)]
        with pytest.raises(BadInput) as refused:
            run_ray(refuse, [(3,)], results.append, address="auto", threads=1, gpus=0)
        assert str(refused.value) == "job 3 cannot be done."
        with pytest.raises(Failure, match="division by zero"):
            run_ray(divide, [(0,)], results.append, address="auto", threads=1, gpus=0)
        with pytest.raises(Failure, match="run the same command again"):
            run_ray(die, [(2,)], results.append, address="auto", threads=1, gpus=0, retries=1)
        assert ray.is_initialized()
    finally:
        ray.shutdown()


def test_devices_are_named_or_refused() -> None:
    assert pick_device("cpu") == "cpu"
    assert pick_device("auto") in ("cpu", "cuda", "mps")
    with pytest.raises(BadInput, match="tpu"):
        pick_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(BadInput, match="cuda"):
            pick_device("cuda")
