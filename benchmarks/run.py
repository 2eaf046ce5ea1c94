"""Times GRU layers on a GPU: `python -m benchmarks.run --suite core|quick|full --out FILE.json`.

Needs torch, triton and numpy. Measures first the device's peak rates and the plans' predictions,
then every cell of the suite with all its implementations on the same inputs, each with its error
against float64. The file is complete after every single measurement: a run that is killed keeps
its measurements, and the same command resumes it. Measurements not reached within --minutes are
recorded as not run.

The measurements run in a separate process, which is replaced when it dies, hangs or loses its
device; the measurement in progress is then recorded as lost.

    --device cpu    a wall clock on a CPU; with TRITON_INTERPRET=1 the kernels run in the
                    interpreter of tests/interpreter (smoke only: it takes seconds per launch)
"""

import argparse
import dataclasses
import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import report
from benchmarks.measurements import NOT_RUN, ROOT, Record
from benchmarks.measuring import Measuring, failure, tf32_of
from benchmarks.suites import SUITES, Cell

DEFAULT_MINUTES = {"smoke": 2, "core": 4, "quick": 8, "full": 45}
# Seconds without output after which an implementation hangs: compiling takes most of a minute at
# worst, except for FlashRNN, which runs nvcc.
STALL_SECONDS, STALL_SECONDS_NVCC = 150, 400
# Processes that compile before anything is timed, and their time limit.
COMPILERS, COMPILE_SECONDS = 8, 90
COMPILED_STEPS = 16  # as divisible as the T of the suites, for which Triton specialises
# Exit code of a process that lost its device, so that a new one continues.
LOST_DEVICE = 3
MOST_PROCESSES = 40


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=SUITES, default="quick")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; resumed if it exists")
    parser.add_argument("--minutes", type=float, help="time budget (2, 4, 8 and 45 by suite)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--commit", help="recorded if there is no git repository")
    parser.add_argument("--no-probes", action="store_true", help="cells only")
    parser.add_argument("--worker", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--compile", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker is not None:
        return work(options)
    if options.compile is not None:
        return compile_share(options)
    minutes = DEFAULT_MINUTES[options.suite] if options.minutes is None else options.minutes
    until = time.time() + 60 * minutes
    cells = SUITES[options.suite]()
    if options.out.exists():
        record = Record.load(options.out)
        if record.data["suite"] != options.suite:
            parser.error(
                f"{options.out} holds the suite {record.data['suite']!r}; give another --out"
            )
        record.lose("an earlier run ended here")
    else:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        record = Record.new(options.out, options.suite, cells, probe_names(options))
        record.save()
    if options.device == "cuda" and options.suite != "smoke":
        compile_ahead(options)
    code = supervise(options, until)
    record = Record.load(options.out)
    print(report.text(record.data))
    return code


def probe_names(options) -> list[str]:
    if options.no_probes or (options.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"):
        return []
    from benchmarks.probes import PROBES, SHARED

    return [name for name in PROBES if options.device == "cuda" or name != SHARED]


# -- the processes that compile -----------------------------------------------------------------


def compile_ahead(options) -> None:
    """Fills Triton's cache on all cores; one process alone would need half of the time for it.

    Failures here are ignored: they occur again, and are recorded, when measured.
    """
    command = [sys.executable, "-m", "benchmarks.run", "--suite", options.suite]
    command += ["--out", str(options.out.absolute()), "--compile"]
    quiet = {"cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    begun = time.time()
    running = [subprocess.Popen([*command, str(i)], **quiet) for i in range(COMPILERS)]
    for process in running:
        try:
            process.wait(timeout=max(0.1, begun + COMPILE_SECONDS - time.time()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    print(f"compiled ahead in {time.time() - begun:.0f} s", flush=True)


def compile_share(options) -> int:
    """Launches one in COMPILERS of the kernels that the suite will time, on few steps."""
    import torch

    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    for work_item in compile_jobs(SUITES[options.suite]())[options.compile :: COMPILERS]:
        try:
            work_item(device)
        except Exception:
            if device.type == "cuda":
                torch.cuda.synchronize()  # raises if the device is lost, which ends this process
    return 0


def compile_jobs(cells: list[Cell]) -> list[Callable]:
    """A function of the device for each launch that is compiled differently."""
    from benchmarks import probes

    shapes: dict[tuple, Cell] = {}
    for cell in cells:
        if "triton_gru" in cell.implementations:
            short = dataclasses.replace(cell, T=COMPILED_STEPS, mode="train")
            shapes.setdefault(short.id, short)
    jobs = [functools.partial(_compile_cell, cell) for cell in shapes.values()]
    for rivals, shapes_ in ((False, probes.KERNELS), (True, probes.RIVALS)):
        for _, *shape in shapes_:
            for direction in ("forward", "backward"):
                few = (COMPILED_STEPS, *shape)
                jobs.append(functools.partial(probes.compile_kernels, few, direction, rivals))
    return jobs


def _compile_cell(cell: Cell, device) -> None:
    with tf32_of(cell):
        measuring = Measuring(cell, device, None)
        measuring.call(measuring.runner("triton_gru"), measuring.inputs[0])


# -- the process that watches -------------------------------------------------------------------


def supervise(options, until: float) -> int:
    """Starts processes that measure until everything is done or the time is over."""
    command = [sys.executable, "-m", "benchmarks.run", "--suite", options.suite]
    command += [
        "--out",
        str(options.out.absolute()),
        "--device",
        options.device,
        "--worker",
        str(until),
    ]
    if options.commit:
        command += ["--commit", options.commit]
    for _ in range(MOST_PROCESSES):
        with tempfile.TemporaryFile("w+") as errors:
            os.utime(options.out)  # starts the time without output
            worker = subprocess.Popen(command, stderr=errors, cwd=ROOT)
            code = _watch(worker, options.out)
            errors.seek(0)
            complaint = "".join(errors.readlines()[-12:]).strip()
        if code == 0:
            return 0
        lost = Record.load(options.out).lose(
            "hung" if code is None else f"its process ended with {code}: {complaint[-800:]}"
        )
        if lost is None and code != LOST_DEVICE:
            # It could not even start; a new one would not either.
            print(complaint, file=sys.stderr)
            return 1
        print(f"lost: {lost}; continuing in a new process", file=sys.stderr, flush=True)
    return 1


def _watch(worker: subprocess.Popen, path: Path) -> int | None:
    """The process's exit code, or None if it hung and was killed."""
    while True:
        try:
            return worker.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            flying = Record.load(path).data["in_flight"]
            limit = STALL_SECONDS_NVCC if flying and flying[2] == "flashrnn" else STALL_SECONDS
            if time.time() - path.stat().st_mtime > limit:
                worker.kill()
                worker.wait()
                return None


# -- the process that measures ------------------------------------------------------------------


def work(options) -> int:
    import torch

    from benchmarks.measurements import environment
    from benchmarks.timing import clock_for

    if options.device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        from tests.interpreter import harness

        harness.install()
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device; --device cpu runs the suite's logic on a CPU", file=sys.stderr)
        return 1
    record = Record.load(options.out)
    try:
        record.belongs_to(environment(device, options.commit))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    record.save()
    clock = clock_for(device)
    cells = {cell.id: cell for cell in SUITES[options.suite]()}
    if any(r["status"] == NOT_RUN for r in record.data["probes"].values()):
        from benchmarks.probes import PROBES
    else:
        PROBES = {}
    tiny = options.suite == "smoke"
    lost = False
    for name in [n for n in record.data["probes"] if n != "rival plans"]:
        lost = lost or run_probe(record, name, PROBES, device, clock, tiny, options.worker)
    for cell in cells.values():
        lost = lost or run_cell(record, cell, device, clock, options.worker)
    if "rival plans" in record.data["probes"]:
        lost = lost or run_probe(record, "rival plans", PROBES, device, clock, tiny, options.worker)
    return LOST_DEVICE if lost else 0


def run_probe(record, name, probes, device, clock, tiny: bool, until: float) -> bool:
    """Runs one probe if it has not run; returns whether the device was lost."""
    if record.slot("probe", name, None)["status"] != NOT_RUN or time.time() > until:
        return False
    record.data["in_flight"] = ["probe", name, None]
    record.save()
    try:
        result = {"status": "ok", **probes[name](device, clock, tiny)}
    except Exception as error:
        result = failure(error)
    return _keep(record, "probe", name, None, result, clock)


def run_cell(record: Record, cell: Cell, device, clock, until: float) -> bool:
    """Measures the implementations of a cell that have not run; True if the device was lost."""
    import torch

    results = record.data["cells"][cell.id]["results"]
    waiting = [name for name, result in results.items() if result["status"] == NOT_RUN]
    if not waiting or time.time() > until:
        return False
    record.data["in_flight"] = ["cell", cell.id, waiting[0]]
    record.save()
    with tf32_of(cell):
        try:
            measuring = Measuring(cell, device, clock)
        except Exception as error:  # not enough memory for the inputs
            keep = functools.partial(_keep, record, "cell", cell.id, clock=clock)
            lost = [keep(name, result=failure(error)) for name in waiting]
            return any(lost)
        for name in waiting:
            if time.time() > until:
                break
            record.data["in_flight"] = ["cell", cell.id, name]
            record.save()
            if _keep(record, "cell", cell.id, name, measuring.result(name), clock):
                return True
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return False


def _keep(record: Record, kind, id, implementation, result: dict, clock) -> bool:
    """Writes a result; returns whether the device was lost meanwhile."""
    try:
        clock.synchronize()
        lost = False
    except Exception as error:
        lost = True
        result = {"status": "failed", "reason": f"the device was lost: {error}", "before": result}
    record.put(kind, id, implementation, result)
    record.data["in_flight"] = None
    record.save()
    print(f"{id} {implementation or ''}: {report.one_line(result)}", flush=True)
    return lost


if __name__ == "__main__":
    raise SystemExit(main())
