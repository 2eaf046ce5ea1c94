"""Times GRU layers on a GPU: `python -m benchmarks.run --suite smoke|quick|full --out FILE.json`.

Needs torch, triton and numpy. Measures first what the device can do and what the plans promised,
then every cell of the suite with all its contestants on the same inputs, each beside its error
against float64. The file is complete after every single measurement: a run that is killed keeps
what it has, and the same command goes on where it stopped. What is not reached before --minutes
are over is recorded as not run.

The measurements run in a process of their own, which is replaced when it dies, hangs or loses its
device; what it was at is then recorded as lost.

    --device cpu    a wall clock on a CPU; with TRITON_INTERPRET=1 the kernels run in the
                    interpreter of tests/interpreter (smoke only: it takes seconds a launch)
"""

import argparse
import contextlib
import dataclasses
import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import report
from benchmarks.record import NOT_RUN, ROOT, Record
from benchmarks.suites import SUITES, Cell

DEFAULT_MINUTES = {"smoke": 2, "quick": 8, "full": 45}
# A contestant that writes nothing for so long hangs; compiling takes most of a minute at worst,
# except for FlashRNN, which starts nvcc.
STALL_SECONDS, STALL_SECONDS_NVCC = 150, 400
# Processes that compile before anything is timed, and how long they may take.
COMPILERS, COMPILE_SECONDS = 8, 90
COMPILED_STEPS = 16  # as divisible as the T of the suites: Triton compiles for that
# A process that lost its device ends with this, so that a fresh one goes on.
LOST_DEVICE = 3
MOST_PROCESSES = 40
# Of all inputs together, at least this many times the L2; at most so many sets or bytes. (Inputs
# of which 64 sets fit into the L2 are small beside the weights, which all calls share anyway.)
L2_TIMES, MOST_SETS, MOST_SET_BYTES = 2, 64, 8 << 30
ROUNDS = 2
SECONDS = 0.25
# Elements of y beyond which the error is taken over fewer steps.
MOST_EXACT = 1 << 26


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=SUITES, default="quick")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; goes on if it exists")
    parser.add_argument("--minutes", type=float, help="time budget (2, 8 and 45 by suite)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--commit", help="recorded where there is no git repository")
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
    from benchmarks.probes import PROBES

    return list(PROBES)


# -- the processes that compile -----------------------------------------------------------------


def compile_ahead(options) -> None:
    """Fills Triton's cache on all cores; one process alone would spend half of the time on it.

    What fails here is left to be found, and recorded, when it is measured.
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
                torch.cuda.synchronize()  # raises where the device is lost, which ends this process
    return 0


def compile_jobs(cells: list[Cell]) -> list[Callable]:
    """A function of the device for each launch that differs in what is compiled."""
    from benchmarks import probes

    shapes: dict[tuple, Cell] = {}
    for cell in cells:
        if "triton_gru" in cell.contestants:
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
        stand = Stand(cell, device, None)
        stand.call(stand.runner("triton_gru"), stand.inputs[0])


# -- the process that watches -------------------------------------------------------------------


def supervise(options, until: float) -> int:
    """Starts processes that measure until nothing is left to do or the time is up."""
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
            os.utime(options.out)  # from here on counts how long nothing is written
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
            # It could not even start; a fresh one would not either.
            print(complaint, file=sys.stderr)
            return 1
        print(f"lost: {lost}; going on in a new process", file=sys.stderr, flush=True)
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

    from benchmarks.record import environment
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
    """Measures the contestants of a cell that have not run; returns whether the device was lost."""
    import torch

    results = record.data["cells"][cell.id]["results"]
    waiting = [name for name, result in results.items() if result["status"] == NOT_RUN]
    if not waiting or time.time() > until:
        return False
    record.data["in_flight"] = ["cell", cell.id, waiting[0]]
    record.save()
    with tf32_of(cell):
        try:
            stand = Stand(cell, device, clock)
        except Exception as error:  # no room for the inputs
            keep = functools.partial(_keep, record, "cell", cell.id, clock=clock)
            lost = [keep(name, result=failure(error)) for name in waiting]
            return any(lost)
        for name in waiting:
            if time.time() > until:
                break
            record.data["in_flight"] = ["cell", cell.id, name]
            record.save()
            if _keep(record, "cell", cell.id, name, stand.result(name), clock):
                return True
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return False


@contextlib.contextmanager
def tf32_of(cell: Cell) -> Iterator[None]:
    """float32 products as the cell says, in torch's products, cuDNN and the kernels alike."""
    import torch

    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = cell.dtype != "float32"
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


def _keep(record: Record, kind, id, contestant, result: dict, clock) -> bool:
    """Writes a result; returns whether the device was lost on the way."""
    try:
        clock.synchronize()
        lost = False
    except Exception as error:
        lost = True
        result = {"status": "failed", "reason": f"the device was lost: {error}", "before": result}
    record.put(kind, id, contestant, result)
    record.data["in_flight"] = None
    record.save()
    print(f"{id} {contestant or ''}: {report.one_line(result)}", flush=True)
    return lost


def failure(error: Exception) -> dict:
    from benchmarks.contestants import Missing, Unsupported

    status = {Missing: "missing", Unsupported: "unsupported"}.get(type(error), "failed")
    reason = str(error) if status != "failed" else f"{type(error).__name__}: {error}"
    return {"status": status, "reason": reason[:600]}


class Stand:
    """What the contestants of one cell share: weights, inputs, and the exact result."""

    def __init__(self, cell: Cell, device, clock):
        from benchmarks import contestants
        from benchmarks.timing import LEAST_REPEATS

        self.cell, self.device, self.clock = cell, device, clock
        self.least = LEAST_REPEATS if device.type == "cuda" else 1
        self.weights = contestants.make_weights(cell, device)
        first = contestants.make_inputs(cell, 0, device)
        count = set_count(first, device)
        more = [contestants.make_inputs(cell, seed, device) for seed in range(1, count)]
        self.inputs = [first, *more]
        self._exact = None

    def result(self, name: str) -> dict:
        """One contestant's times, error and memory; never raises what a contestant does wrong."""
        from benchmarks.timing import measure, summary

        try:
            runner = self.runner(name)
            calls = [lambda i=i: self.call(runner, i) for i in self.inputs]
            times = functools.partial(measure, calls, self.clock, SECONDS / ROUNDS, self.least)
            rounds = [times() for _ in range(ROUNDS)]
            result = {"status": "ok", **summary(rounds), "input_sets": len(self.inputs)}
            result["step_us"] = 1e3 * result["median_ms"] / self.cell.T
            result["peak_bytes"] = self.clock.peak_bytes(calls[0])
            result["error"] = self.error(runner) if runner.exact else None
            if name == "triton_gru":
                result["plans"] = self.plans()
        except Exception as error:
            return failure(error)
        return result

    def runner(self, name: str):
        from benchmarks.contestants import CONTESTANTS

        return CONTESTANTS[name](self.cell, self.weights)

    def call(self, runner, inputs) -> list:
        """What is timed: y, or y and the gradients by input and parameters."""
        import torch

        if self.cell.mode == "forward":
            with torch.no_grad():
                return [runner.forward(inputs)]
        y = runner.forward(inputs)
        return [y, *torch.autograd.grad(y, [inputs.leaf, *runner.parameters], inputs.dy)]

    def error(self, runner) -> dict:
        """Of y and each gradient: ||result - exact|| / ||exact||, over `shortened` inputs."""
        names = ["y", "x", *(name for name, _ in self.weights.named_parameters())]
        inputs = self.shortened()
        exact, results = self.exact(inputs), self.call(runner, inputs)
        found = {}
        for name, result, truth in zip(names, results, exact, strict=False):
            difference = (result.detach().double() - truth).norm() / truth.norm()
            found[name] = difference.item()
        if any(value != value for value in found.values()):
            raise ArithmeticError(f"the result holds NaN: {found}")
        return found

    def shortened(self):
        """The first inputs, over no more steps than float64 has room for."""
        from benchmarks import contestants

        cell, first = self.cell, self.inputs[0]
        steps = max(1, min(cell.T, MOST_EXACT // (cell.B * cell.H * cell.directions)))
        if steps == cell.T or cell.lengths != "full":
            return first
        leaf = first.leaf.detach()[:steps].requires_grad_()
        return contestants.Inputs(leaf, leaf, None, first.dy[:steps])

    def exact(self, inputs) -> list:
        """float64, computed once for all contestants of the cell."""
        from torch.nn.utils.rnn import PackedSequence

        from benchmarks import contestants

        if self._exact is None:
            leaf = inputs.leaf.detach().double().requires_grad_()
            packed = isinstance(inputs.x, PackedSequence)
            x = inputs.x._replace(data=leaf) if packed else leaf
            double = contestants.Inputs(x, leaf, inputs.lengths, inputs.dy.double())
            runner = contestants.reference(self.cell, self.weights)
            self._exact = [t.detach() for t in self.call(runner, double)]
        return self._exact

    def plans(self) -> dict:
        """What the planner chose and promised for this cell."""
        from triton_gru.plan import Problem
        from triton_gru import tuning
        from triton_gru.kernels import support

        cell, found = self.cell, {}
        for direction in ("forward", "backward")[: 1 + (cell.mode == "train")]:
            problem = Problem(
                batch=cell.B,
                hidden=cell.H,
                dtype="float32" if cell.dtype == "tf32" else cell.dtype,
                reset_after=cell.reset_after,
                direction=direction,
                directions=cell.directions,
                tensor_cores=cell.dtype != "float32",
            )
            plan = tuning.planned(problem, support.device_limits(self.device))
            found[direction] = dataclasses.asdict(plan)
        return found


def set_count(inputs, device) -> int:
    """Sets of inputs to turn through, so that none is in the L2 when its turn comes."""
    if device.type != "cuda":
        return 2
    import torch

    size = inputs.leaf.nbytes + inputs.dy.nbytes
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    wanted = 1 + -(-L2_TIMES * l2 // size)
    return max(2, min(wanted, MOST_SETS, MOST_SET_BYTES // size))


if __name__ == "__main__":
    raise SystemExit(main())
