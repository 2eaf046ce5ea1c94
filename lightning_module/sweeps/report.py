"""The results of a sweep: the command `triton-gru-sweep-report`, which also runs after a sweep.

Everything is made from the records of the jobs (see sweeps/jobs.py), so the report of a sweep that
still runs, or was killed, shows the results so far.
"""

import csv
import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_module.errors import DamagedFile
from lightning_module.sweeps.jobs import (
    COMPLETE,
    FAILED,
    JOBS,
    Job,
)
from lightning_module.sweeps.sweep import NoSweep, Sweep, read_sweep, short

RESULTS = "results.csv"
PARALLEL = "parallel.png"
IMPORTANCE = "importance.png"
# Rows shown in a terminal; results.csv has all.
ROWS = 40
FOLDED = 10  # characters per line of folded text values


def report(directory: Path) -> list[Job]:
    """Prints a table and the best command line; writes results.csv and the two plots.

    Returns:
        The records of all jobs, best first.
    """
    from lightning_module.sweeps import plots  # matplotlib is slow to import

    sweep = read_sweep(directory)
    # Without a terminal the width is not limited.
    console = Console(width=None if sys.stdout.isatty() else 140)
    states = [job.state for job in sweep.jobs]
    counts = [f"{states.count(s)} {s}" for s in dict.fromkeys((COMPLETE, FAILED, *states))]
    print(f"{directory}: {', '.join(counts)}")
    anything = console.options.update(width=10_000)
    found = table(sweep)
    if console.measure(found, options=anything).maximum > console.width:
        found = table(sweep, fold=True)
        # Rather a line longer than the terminal than a cut header or number.
        console.width = max(console.width, console.measure(found, options=anything).maximum)
    console.print(found)
    if len(sweep.jobs) > ROWS:
        console.print(f"and {len(sweep.jobs) - ROWS} more in {directory / RESULTS}")
    for reason, jobs in failures(sweep).items():
        print(f"Failed, job {', '.join(str(job.number) for job in jobs)}: {reason}")
    write_csv(sweep)
    messages = plots.draw_parallel(sweep, directory / PARALLEL)
    messages += plots.draw_importance(sweep, directory / IMPORTANCE)
    for line in messages:
        print(line)
    if sweep.complete:
        best = sweep.complete[0]
        print(f"\nThe best, job {best.number}, as a single run:\n\n  {best.command()}\n")
    print(f"Table and pictures are in {directory}, what each job printed in {directory / JOBS}")
    return sweep.jobs


def table(sweep: Sweep, fold: bool = False) -> Table:
    """The jobs, best first, at most `ROWS`; with `fold`, text values folded."""
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
    """Each parameter's last name (`lr` of `optimizer.lr`), or the full name if two share that."""
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
    """Writes `results.csv`: one row per job, best first, with every metric and the command line."""
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


def _are_numbers(values: list[str]) -> bool:
    try:
        return all(float(value) == float(value) for value in values)
    except ValueError:
        return False


def run(directory: Path) -> None:
    """Runs `triton-gru-sweep-report`; raises SystemExit on an error."""
    try:
        report(directory)
    except (NoSweep, DamagedFile) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
