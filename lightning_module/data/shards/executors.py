"""Where the processes that tokenise run: this machine, SLURM by submitit, or Ray.

datatrove has such executors too. Its local one was tried (0.10.1): when a worker was killed, as for
lack of memory, it waited for ever for the lost task (of its `multiprocess.Pool`). What is needed
here is to start a function and to learn how it ended, which the standard library, submitit and Ray
do in a few lines each; what has been done is known from the files at the URL (`preparing.py`),
however a process ended.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, Protocol

import cloudpickle

from lightning_module.errors import UsageError
from lightning_module.terminal.signals import without_ctrl_c


class Job(Protocol):
    """A function that was started."""

    def done(self) -> bool:
        """Whether it has ended."""

    def exception(self) -> BaseException | None:
        """How it failed, after its end."""

    def result(self) -> Any:
        """What it returned; raises its exception."""


class Local:
    """Processes of this machine.

    Args:
        workers: How many at a time; None: as many as there are cores.
    """

    def __init__(self, workers: int | None = None):
        self.workers = workers or _cores()
        # Pools of one process each: if one is killed, the others go on.
        self._started: list[tuple[ProcessPoolExecutor, Future[Any]]] = []

    def start(self, function: Callable[..., Any], *arguments: Any) -> Job:
        """Starts a function in a process that has nothing else to do, or a new one."""
        free = [s for s in self._started if s[1].done() and s[1].exception() is None]
        if free:
            self._started.remove(free[0])
            pool = free[0][0]
        else:
            pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _end_with_parent)
        with without_ctrl_c():  # which a terminal also sends to a process that is started here
            job = pool.submit(_call, cloudpickle.dumps((function, arguments)))
        self._started.append((pool, job))
        return job

    def stop(self) -> None:
        """Ends all processes, what is still running included."""
        for pool, _ in self._started:
            for process in list((pool._processes or {}).values()):
                process.kill()
            pool.shutdown(wait=True, cancel_futures=True)
        self._started = []


class Slurm:
    """Jobs of SLURM, started with submitit (extra `slurm`); each has one CPU.

    Args:
        workers: How many jobs at a time.
        folder: For their logs; a folder that the nodes share.
        timeout_min: Time limit of a job, in minutes; what it has not done is done in another job.
        mem_gb: Memory of a job.
        partition: Of the cluster; None: its default.
        account: To charge; None: the user's default.
        cluster: `slurm`, or `local` to try it without one.
    """

    def __init__(
        self,
        workers: int,
        folder: str,
        timeout_min: int = 240,
        mem_gb: int = 4,
        partition: str | None = None,
        account: str | None = None,
        cluster: str = "slurm",
    ):
        try:
            import submitit
        except ImportError as error:
            raise UsageError(
                "executor=slurm needs submitit: pip install 'triton-gru[slurm]'"
            ) from error
        self.workers = workers
        try:
            self._executor = submitit.AutoExecutor(os.path.expanduser(folder), cluster=cluster)
        except RuntimeError as error:  # no sbatch here
            raise UsageError(f"executor=slurm cannot start jobs here: {error}") from error
        self._executor.update_parameters(
            name="triton-gru-prepare",
            timeout_min=timeout_min,
            mem_gb=mem_gb,
            cpus_per_task=1,
            tasks_per_node=1,
            slurm_partition=partition,
            slurm_account=account,
        )
        self._jobs: list[Any] = []

    def start(self, function: Callable[..., Any], *arguments: Any) -> Job:
        """Starts a function as a job."""
        job = self._executor.submit(function, *arguments)
        self._jobs.append(job)
        return job

    def stop(self) -> None:
        """Cancels what is still queued or running."""
        for job in self._jobs:
            if not job.done():
                job.cancel()
        self._jobs = []


class Ray:
    """Tasks of a Ray cluster, or of Ray on this machine (extra `ray`); each has one CPU.

    Args:
        workers: How many tasks at a time.
        address: Of the cluster; None: `RAY_ADDRESS`, or Ray started on this machine.
    """

    def __init__(self, workers: int, address: str | None = None):
        try:
            import ray
        except ImportError as error:
            raise UsageError("executor=ray needs Ray: pip install 'triton-gru[ray]'") from error
        self.workers = workers
        self._ray: Any = ray
        self._references: list[Any] = []
        ray.init(address=address, log_to_driver=False, ignore_reinit_error=True)

    def start(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Starts a function as a task, which is not repeated by Ray."""
        reference = self._ray.remote(num_cpus=1, max_retries=0)(function).remote(*arguments)
        self._references.append(reference)
        return reference.future()

    def stop(self) -> None:
        """Ends what is still running."""
        for reference in self._references:
            self._ray.cancel(reference, force=True)
        self._references = []


Executor = Local | Slurm | Ray


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _call(pickled: bytes) -> Any:
    function, arguments = cloudpickle.loads(pickled)
    return function(*arguments)


def _end_with_parent() -> None:
    """Ends this process when the one that started it has ended, even by SIGKILL."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
