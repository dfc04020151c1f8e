"""Where the shards of a large job run: threads of this process, one process for each GPU, or a Ray cluster.

Every engine takes the same function and the same list of jobs. It calls the function once for each job and gives the
results to `receive` in whatever order they come. Jobs and results are plain texts, numbers and bytes.
"""

import concurrent.futures
import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from rotate_edit.errors import BadInput, Failure

Work = Callable[..., Any]
Receive = Callable[[Any], None]

DIED = (
    "a worker process died (for instance killed for memory); finished shards are kept, so run the same command again, "
    "with fewer workers if memory is short."
)


def run_threads(work: Work, jobs: Sequence[tuple[Any, ...]], receive: Receive, *, workers: int) -> None:
    """Run jobs in threads of this process.

    The first error ends the run after the jobs that are running.

    Args:
        work: Function that does one job, called as `work(*job)`.
        jobs: Arguments of each job.
        receive: Function that takes each result.
        workers: Number of threads.
    """
    with ThreadPoolExecutor(workers) as pool:
        _collect(pool, [pool.submit(work, *job) for job in jobs], receive)


def run_processes(work: Work, jobs: Sequence[tuple[Any, ...]], receive: Receive, *, devices: int) -> None:
    """Run jobs in one process for each GPU.

    Each process sees only its own GPU, as device "cuda".

    Args:
        work: Function that does one job, called as `work(*job)`.
        jobs: Arguments of each job.
        receive: Function that takes each result.
        devices: Number of GPUs.

    Raises:
        Failure: If a process dies.
    """
    context = multiprocessing.get_context("spawn")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(index) for index in range(devices)]
    queue = context.Queue()
    for name in names[:devices]:
        queue.put(name)
    with ProcessPoolExecutor(devices, context, initializer=_take_device, initargs=(queue,)) as pool:
        try:
            _collect(pool, [pool.submit(work, *job) for job in jobs], receive)
        except BrokenProcessPool as error:
            raise Failure(DIED) from error


def run_ray(
    work: Work,
    jobs: Sequence[tuple[Any, ...]],
    receive: Receive,
    *,
    address: str,
    threads: int,
    gpus: int,
    memory: int = 0,
    retries: int = 5,
) -> None:
    """Run jobs as tasks of a Ray cluster.

    A task whose worker died is started again. Ray runs whatever its network asks it to run, so a cluster must be on a
    trusted network.

    Args:
        work: Function that does one job, called as `work(*job)`.
        jobs: Arguments of each job.
        receive: Function that takes each result.
        address: "auto" for the cluster this machine belongs to, "local" for one started here, or host:port.
        threads: CPUs of each task.
        gpus: GPUs of each task.
        memory: Memory of each task in bytes.
        retries: How often a task whose worker died is started again.

    Raises:
        BadInput: If Ray or the cluster is missing.
        Failure: If a task fails, or its worker keeps dying.
    """
    try:
        import ray
    except ImportError as error:
        raise BadInput("the engine ray is not installed; get it with: pip install 'rotate-edit[ray]'.") from error
    mine = not ray.is_initialized()
    try:
        ray.init(address=address, ignore_reinit_error=True, log_to_driver=False)
    except ConnectionError as error:
        raise BadInput(f"there is no Ray cluster at {address}; start one with `ray start --head`.") from error
    try:
        remote = ray.remote(num_cpus=threads, num_gpus=gpus, memory=memory, max_retries=retries)(work)
        waiting = list(reversed(jobs))
        running: list[Any] = []
        # A few tasks more than the cluster runs at once keep it busy without results piling up in its memory.
        most = 2 * max(1, int(ray.cluster_resources().get("GPU" if gpus else "CPU", 1)) // max(1, gpus or threads))
        while waiting or running:
            while waiting and len(running) < most:
                running.append(remote.remote(*waiting.pop()))
            done, running = ray.wait(running, num_returns=1)
            receive(ray.get(done[0]))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, BadInput | Failure):
            raise error.cause from None
        reason = str(error.cause).strip().splitlines()[0]
        raise Failure(f"a task failed on a Ray worker ({reason}); does that machine have rotate_edit?") from error
    except ray.exceptions.WorkerCrashedError as error:
        raise Failure(DIED) from error
    finally:
        if mine:
            ray.shutdown()


def _collect(pool: concurrent.futures.Executor, futures: Iterable[Future[Any]], receive: Receive) -> None:
    try:
        for future in concurrent.futures.as_completed(futures):
            receive(future.result())
    except BaseException:
        # After an interrupt, as after an error, the jobs that wait must not begin.
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def _take_device(queue: Any) -> None:
    """Give a new process one GPU; this runs first in it, before CUDA is started."""
    os.environ["CUDA_VISIBLE_DEVICES"] = queue.get()
