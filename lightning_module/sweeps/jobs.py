"""One job of a sweep: a training in its own process, and the record of its outcome.

Whatever launches the jobs (this process, joblib, submitit, Ray) calls `run_job`, which starts
`triton-gru-train` with the job's settings as an ordinary single run, in its own process because:

- A training in several processes starts the others from its command line (Lightning) or its
  environment (SLURM). Those of a sweep would run the sweep again, in a second directory and, drawn
  again, with other parameters (lightning#11300). Those of a job run the job.
- A job that crashes or is killed, for lack of memory for example, is one failed job; the sweep
  continues.
- Process groups, signal handlers and GPU memory of one job do not affect the next.

It costs the start of Python and torch, a few seconds per job.

A sweep directory contains, beside one run directory per job:

    sweep.json      search space and objective (see hydra_plugins/triton_gru_sweepers)
    jobs/3.json     the outcome of job 3, a `Job`; written at its start and at its end
    jobs/3.log      its output
"""

import contextlib
import ctypes
import dataclasses
import importlib.util
import json
import logging
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig

from lightning_module.atomic_files import write_atomically
from lightning_module.errors import DamagedFile
from lightning_module.run_files import CHECKPOINTS, CONFIG, LAST, METRICS, read_metrics, summarize
from lightning_module.run_lock import wait_until_free

log = logging.getLogger(__name__)

SWEEP = "sweep.json"
JOBS = "jobs"
UNFINISHED, COMPLETE, FAILED = "unfinished", "complete", "failed"
# The value of a failed job for a search: finite, because samplers and their storage accept neither
# NaN nor infinity, and never better than that of a complete job, so that the search avoids regions
# where jobs fail.
WORST = 1e6
# Settings of where and how jobs run, which do not change their results.
NOT_OF_THE_JOB = ("launcher", "run_dir")
# The launchers of conf/launcher: module, and the extra that installs it.
LAUNCHERS = {
    "joblib": ("hydra_plugins.hydra_joblib_launcher", "sweep"),
    "submitit_local": ("hydra_plugins.hydra_submitit_launcher", "slurm"),
    "submitit_slurm": ("hydra_plugins.hydra_submitit_launcher", "slurm"),
    "ray": ("hydra_plugins.hydra_ray_launcher", "ray"),
}
_PARENT = "TRITON_GRU_JOB_PARENT"  # the process that runs the job of this one
SWEEP_PROCESS = "TRITON_GRU_SWEEP_PROCESS"  # the process that runs the whole sweep


@dataclasses.dataclass
class Job:
    """The record of a job of a sweep.

    Attributes:
        number: number of the job and of its directory.
        overrides: its settings as `key=value`.
        run_dir: its run directory.
        state: "unfinished", "complete" or "failed".
        value: the objective of a complete job.
        reason: reason of a failure.
        seconds: wall time of all attempts, including the start of Python.
        metrics: at the best checkpoint, see `summarize`.
    """

    number: int
    overrides: list[str]
    run_dir: str
    state: str = UNFINISHED
    value: float | None = None
    reason: str = ""
    seconds: float = 0.0
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)

    def told(self, direction: str) -> float:
        """The value for a search: finite, for a failed job the worst possible."""
        if self.state == COMPLETE and self.value is not None:
            return max(-WORST, min(self.value, WORST))
        return WORST if direction == "minimize" else -WORST

    def command(self) -> str:
        """The command line of the same single run, quoted for a shell."""
        return shlex.join(["triton-gru-train", *self.overrides])


def record_file(sweep_dir: Path, number: int) -> Path:
    """The file of the record of a job."""
    return sweep_dir / JOBS / f"{number}.json"


def read_job(sweep_dir: Path, number: int) -> Job | None:
    """The record of a job; None if it has not begun.

    Raises:
        DamagedFile: the file is not such a record.
    """
    file = record_file(sweep_dir, number)
    if not file.exists():
        return None
    try:
        return Job(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DamagedFile(
            f"{file} is damaged ({error}): remove it, then job {number} runs again"
        ) from None


def read_description(sweep_dir: Path) -> dict[str, Any]:
    """The content of sweep.json: search space and objective.

    Raises:
        DamagedFile: a sweep did not write it, or it was changed.
    """
    file = sweep_dir / SWEEP
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
        kinds = {"sweeper": str, "objective": str, "direction": str, "parameters": dict}
        for name, kind in {**kinds, "fixed": list}.items():
            if not isinstance(described[name], kind):
                raise TypeError(f"{name} is not a {kind.__name__}")
        return described
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DamagedFile(
            f"{file} is damaged ({type(error).__name__}: {error}): without it the "
            "sweep can be neither reported nor resumed"
        ) from None


def read_jobs(sweep_dir: Path) -> list[Job]:
    """The records of all jobs that have begun, by number."""
    numbers = sorted(int(f.stem) for f in (sweep_dir / JOBS).glob("*.json"))
    jobs = (read_job(sweep_dir, number) for number in numbers)
    return [job for job in jobs if job is not None]


def own_overrides(overrides: list[str]) -> list[str]:
    """The settings of a sweep's command line that change the results of a job."""
    return [o for o in overrides if o.partition("=")[0].lstrip("+~") not in NOT_OF_THE_JOB]


def run_job() -> Job:
    """Run the job that Hydra has configured in this process.

    An interrupted job resumes from its last checkpoint; a complete one is not run again. While
    another process still runs it (a job of a cluster outlives the sweep that submitted it), this
    one waits and then uses its result.

    Returns:
        The record. A training that fails raises no exception here.
    """
    import fcntl  # Unix only; single runs do not need it

    _end_worker_with_sweep()
    hydra = HydraConfig.get()
    sweep_dir = Path(hydra.runtime.cwd, hydra.sweep.dir)
    number = int(hydra.job.num)
    job = Job(
        number, own_overrides(list(hydra.overrides.task)), str(sweep_dir / hydra.sweep.subdir)
    )
    (sweep_dir / JOBS).mkdir(parents=True, exist_ok=True)
    # Under SLURM every rank of a job runs this; the first writes the record.
    rank = int(os.environ.get("SLURM_PROCID", 0)) if "SLURM_STEP_ID" in os.environ else 0
    name = f"{number}" if rank == 0 else f"{number}.rank{rank}"
    with (sweep_dir / JOBS / f"{name}.lock").open("w") as lock:
        # Some network file systems have no system locks; the run's own lock remains.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        wait_until_free(Path(job.run_dir))
        earlier = read_job(sweep_dir, number)
        if earlier is not None and earlier.state == COMPLETE:
            return earlier
        if earlier is not None and rank == 0:
            job.seconds = earlier.seconds
        interrupted = earlier is not None and earlier.state == UNFINISHED
        arguments = _arguments(job, hydra, interrupted=interrupted)
        if rank == 0:
            write_job(sweep_dir, job)
        begun = time.monotonic()
        with (sweep_dir / JOBS / f"{name}.log").open("ab") as output:
            start = output.tell()
            code = _run(arguments, hydra.runtime.cwd, output, lock.fileno())
        job.seconds += time.monotonic() - begun
        _record_outcome(job, code, hydra.sweeper.objective, Path(output.name), start)
        if rank == 0:
            write_job(sweep_dir, job)
    log.info(
        f"job {number}: {hydra.sweeper.objective} {job.value:.4f} after {job.seconds:.0f} s"
        if job.state == COMPLETE
        else f"job {number}: failed: {job.reason}"
    )
    return job


def _arguments(job: Job, hydra: HydraConf, interrupted: bool) -> list[str]:
    """The command line of a job's process."""
    run_dir = Path(job.run_dir)
    command = [sys.executable, "-m", "lightning_module.train"]
    for source in hydra.runtime.config_sources:
        if source.provider == "command-line":
            command += ["--config-dir", source.path]
    if interrupted and (run_dir / CHECKPOINTS / LAST).is_file() and (run_dir / CONFIG).is_file():
        # The user named the targets in this command; the run's config repeats them.
        named = [o.partition("=")[2] for o in job.overrides if "_target_=" in o]
        trust = [f"trust=[{','.join(named)}]"] if named else []
        return [*command, f"resume={run_dir}", *trust]
    if run_dir.exists():
        shutil.rmtree(run_dir)  # of a failed attempt, or one without a checkpoint
    return [*command, *job.overrides, f"run_dir={run_dir}"]


def _run(arguments: list[str], cwd: str, output: Any, lock: int) -> int:
    """The exit code of a process that holds the lock and ends with this one."""
    process = subprocess.Popen(
        arguments,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env={**os.environ, _PARENT: str(os.getpid())},
        pass_fds=[lock],
    )
    try:
        return process.wait()
    except BaseException:  # Ctrl-C, or a preempting cluster: the run saves and ends
        process.terminate()
        process.wait()
        raise


def end_with_sweep() -> None:
    """In the process of a job: terminates it, so that it saves, when the sweep is killed."""
    parent = os.environ.pop(_PARENT, None)  # not for the other ranks: their parent is this process
    if parent is None:
        return
    # submitit sends it to the parent when the time is nearly over; the parent ends this process.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG, man 2 prctl
    else:
        _end_with(int(parent))
    if os.getppid() != int(parent):
        raise SystemExit(128 + signal.SIGTERM)


def _end_worker_with_sweep() -> None:
    """In a worker process of the sweep (joblib): terminates it when the sweep has ended."""
    sweep = int(os.environ.get(SWEEP_PROCESS, 0))
    # Otherwise jobs run in the sweep's own process, or on machines that outlive it.
    if sweep == os.getppid():
        _end_with(sweep)


def _end_with(parent: int) -> None:
    """Starts a thread that terminates this process when its parent changes."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def refuse_missing_launcher() -> None:
    """Reports what to install for `launcher=NAME`; Hydra reports only that it is missing."""
    for argument in sys.argv[1:]:
        key, _, name = argument.partition("=")
        plugin, extra = LAUNCHERS.get(name, ("", "")) if key == "launcher" else ("", "")
        if plugin and importlib.util.find_spec(plugin) is None:
            print(
                f"error: {argument} needs a plugin of Hydra: pip install 'triton-gru[{extra}]'",
                file=sys.stderr,
            )
            raise SystemExit(1)


def _record_outcome(job: Job, code: int, objective: str, output: Path, start: int) -> None:
    """Sets the outcome of a job whose process ended with `code`."""
    job.metrics = summarize(read_metrics(Path(job.run_dir) / METRICS))
    job.state, job.value = FAILED, None
    if code != 0:
        job.reason = _reason(code, output, start)
    elif objective not in job.metrics:
        known = ", ".join(job.metrics) or "none: it ended before its first validation"
        job.reason = f"the objective {objective} is not among its metrics ({known})"
    elif not math.isfinite(job.metrics[objective]):
        job.reason = f"{objective} is {job.metrics[objective]}"
    else:
        job.state, job.value, job.reason = COMPLETE, float(job.metrics[objective]), ""


def _reason(code: int, output: Path, start: int) -> str:
    """The first error that a process printed, else its signal or exit code."""
    with output.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").splitlines()
    errors = [line[len("error: ") :] for line in lines if line.startswith("error: ")]
    if errors:
        return errors[0]
    number = -code if code < 0 else code - 128
    if number in set(signal.Signals):
        return f"ended by {signal.Signals(number).name}"
    hint_of_hydra = "Set the environment variable HYDRA_FULL_ERROR"
    said = [line.strip() for line in lines if line.strip() and not line.startswith(hint_of_hydra)]
    return f"exit code {code}: {said[-1] if said else 'it printed nothing'}"


def write_job(sweep_dir: Path, job: Job) -> None:
    """Writes a record atomically."""
    text = json.dumps(dataclasses.asdict(job), indent=1, ensure_ascii=False) + "\n"
    write_atomically(record_file(sweep_dir, job.number), text.encode())
