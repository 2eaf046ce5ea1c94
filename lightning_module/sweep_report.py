"""What a sweep found: the command `triton-gru-sweep-report`, which a sweep also ends with.

Everything is made from the records of the jobs (see sweep_jobs.py), so the report of a sweep that
still runs, or was killed, shows what is known by then.
"""

if __name__ == "__main__":  # python -m, before the imports below, see commands.py
    from lightning_module.commands import sweep_report

    raise SystemExit(sweep_report())

import csv
import dataclasses
import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_module.commands import sweep_report as main  # noqa: F401 - console scripts installed earlier
from lightning_module.run_files import DamagedFile
from lightning_module.sweep_jobs import (
    COMPLETE,
    FAILED,
    JOBS,
    SWEEP,
    Job,
    read_description,
    read_jobs,
)

RESULTS = "results.csv"
PARALLEL = "parallel.png"
IMPORTANCE = "importance.png"
# Rows that a terminal shows; results.csv has all.
ROWS = 40
FOLDED = 10  # characters a line of text values that are folded


@dataclasses.dataclass
class Sweep:
    """A sweep directory, read.

    Attributes:
        directory: where it is.
        objective: the metric that jobs are compared by.
        direction: "minimize" or "maximize".
        parameters: what is swept, each as in sweep.json: `choices`, or `low`, `high` and `log`.
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
    """A directory that holds no sweep."""


def read_sweep(directory: Path) -> Sweep:
    """Read a sweep directory.

    Raises:
        NoSweep: it is none.
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


def report(directory: Path) -> list[Job]:
    """Print a table and the best command line; write results.csv and the two pictures.

    Returns:
        The records of all jobs, best first.
    """
    from lightning_module import sweep_plots  # matplotlib is slow to import

    sweep = read_sweep(directory)
    # Without a terminal there is no width to keep to.
    console = Console(width=None if sys.stdout.isatty() else 140)
    states = [job.state for job in sweep.jobs]
    counts = [f"{states.count(s)} {s}" for s in dict.fromkeys((COMPLETE, FAILED, *states))]
    print(f"{directory}: {', '.join(counts)}")
    anything = console.options.update(width=10_000)
    found = table(sweep)
    if console.measure(found, options=anything).maximum > console.width:
        found = table(sweep, fold=True)
        # A line longer than the terminal rather than a header or number cut short.
        console.width = max(console.width, console.measure(found, options=anything).maximum)
    console.print(found)
    if len(sweep.jobs) > ROWS:
        console.print(f"and {len(sweep.jobs) - ROWS} more in {directory / RESULTS}")
    for reason, jobs in failures(sweep).items():
        print(f"Failed, job {', '.join(str(job.number) for job in jobs)}: {reason}")
    write_csv(sweep)
    said = sweep_plots.draw_parallel(sweep, directory / PARALLEL)
    said += sweep_plots.draw_importance(sweep, directory / IMPORTANCE)
    for line in said:
        print(line)
    if sweep.complete:
        best = sweep.complete[0]
        print(f"\nThe best, job {best.number}, as a single run:\n\n  {best.command()}\n")
    print(f"Table and pictures are in {directory}, what each job printed in {directory / JOBS}")
    return sweep.jobs


def table(sweep: Sweep, fold: bool = False) -> Table:
    """The jobs, best first, at most `ROWS`; with `fold`, text values broken over lines."""
    found = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    found.add_column("job", justify="right", no_wrap=True)
    found.add_column(sweep.objective, justify="right", no_wrap=True)
    for parameter, header in short_names(sweep.parameters).items():
        described = sweep.parameters[parameter]
        if "choices" in described and not _are_numbers(described["choices"]):
            width = max(len(header), FOLDED) if fold else None
            found.add_column(header, overflow="fold", width=width, no_wrap=not fold)
        else:
            found.add_column(header, justify="right", no_wrap=True)
    found.add_column("steps", justify="right", no_wrap=True)
    found.add_column("seconds", justify="right", no_wrap=True)
    for place, job in enumerate(sweep.jobs[:ROWS]):
        complete = job.state == COMPLETE
        result = f"{job.value:.4f}" if complete else job.state
        style = "bold green" if complete and place == 0 else "" if complete else "red"
        cells = (
            str(job.number),
            result,
            *(short(sweep.value(job, parameter)) for parameter in sweep.parameters),
            str(job.metrics.get("best_step", "")),
            f"{job.seconds:.0f}",
        )
        found.add_row(*map(Text, cells), style=style)
    return found


def short_names(parameters: Iterable[str]) -> dict[str, str]:
    """Each parameter's last name (`lr` of `optimizer.lr`), or all of it where two share that."""
    last = {parameter: re.split(r"[./]", parameter)[-1] for parameter in parameters}
    shared = {name for name, count in Counter(last.values()).items() if count > 1}
    return {parameter: parameter if name in shared else name for parameter, name in last.items()}


def failures(sweep: Sweep) -> dict[str, list[Job]]:
    """The failed jobs by the reason of their failure."""
    found: dict[str, list[Job]] = {}
    for job in sweep.jobs:
        if job.state == FAILED:
            found.setdefault(job.reason, []).append(job)
    return found


def write_csv(sweep: Sweep) -> None:
    """Write `results.csv`: a row a job, best first, with every metric and the command line."""
    metrics = list(dict.fromkeys(name for job in sweep.jobs for name in job.metrics))
    fields = ["job", "state", *sweep.parameters, *metrics, "seconds", "reason", "command"]
    with (sweep.directory / RESULTS).open("w", newline="", encoding="utf-8") as file:
        rows = csv.DictWriter(file, fields)
        rows.writeheader()
        for job in sweep.jobs:
            rows.writerow(
                {
                    "job": job.number,
                    "state": job.state,
                    **{p: sweep.value(job, p) for p in sweep.parameters},
                    **job.metrics,
                    "seconds": round(job.seconds, 1),
                    "reason": job.reason,
                    "command": job.command(),
                }
            )


def short(value: str) -> str:
    """A number with at most four digits that count; other text as it is."""
    try:
        return value if value.lstrip("-").isdecimal() else f"{float(value):.4g}"
    except ValueError:
        return value


def _are_numbers(values: list[str]) -> bool:
    try:
        return all(float(value) == float(value) for value in values)
    except ValueError:
        return False


def run(directory: Path) -> None:
    """What `triton-gru-sweep-report` does; leaves with SystemExit where that failed."""
    try:
        report(directory)
    except (NoSweep, DamagedFile) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
