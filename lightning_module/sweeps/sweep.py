"""Reading a sweep directory: the search space and the records of the jobs."""

import dataclasses
from pathlib import Path
from typing import Any

from lightning_module.sweeps.jobs import COMPLETE, FAILED, SWEEP, Job, read_description, read_jobs


@dataclasses.dataclass
class Sweep:
    """The content of a sweep directory.

    Attributes:
        directory: the sweep directory.
        objective: the metric by which jobs are compared.
        direction: "minimize" or "maximize".
        parameters: swept settings as in sweep.json: `choices`, or `low`, `high` and `log`.
        jobs: best first, then the failed, then the unfinished.
    """

    directory: Path
    objective: str
    direction: str
    parameters: dict[str, dict[str, Any]]
    jobs: list[Job]

    @property
    def complete(self) -> list[Job]:
        """The jobs that have a value, best first."""
        return [job for job in self.jobs if job.state == COMPLETE]

    def value(self, job: Job, parameter: str) -> str:
        """A job's value of a parameter, as its command line has it."""
        given = [o.partition("=")[2] for o in job.overrides if o.partition("=")[0] == parameter]
        return given[-1]


class NoSweep(ValueError):
    """A directory that does not contain a sweep."""


def read_sweep(directory: Path) -> Sweep:
    """Reads a sweep directory.

    Raises:
        NoSweep: there is no sweep in it.
        DamagedFile: a file in it is damaged.
    """
    file = directory / SWEEP
    if not file.exists():
        raise NoSweep(
            f"{directory} holds no {SWEEP}: name a sweep's directory, such as multirun/quick"
        )
    described = read_description(directory)
    sign = 1 if described["direction"] == "minimize" else -1
    states = (COMPLETE, FAILED)
    jobs = sorted(
        read_jobs(directory),
        key=lambda job: (
            states.index(job.state) if job.state in states else len(states),
            sign * (job.value or 0.0),
            job.number,
        ),
    )
    return Sweep(
        directory, described["objective"], described["direction"], described["parameters"], jobs
    )


def short(value: str) -> str:
    """A number with at most four significant digits; other text unchanged."""
    try:
        return value if value.lstrip("-").isdecimal() else f"{float(value):.4g}"
    except ValueError:
        return value
