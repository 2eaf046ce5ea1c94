"""Instruction counts of a time step, from executing the compiled kernels on the CPU.

    python -m benchmarks.counts --arch 90
    python -m benchmarks.counts --arch 80 --hidden 256 768 --variants after

Runs forward and backward by the planner's first plan in the emulator of `tests/ptx` (it is part of
the tests; run this from the repository's root, where `tests` can be imported), checks the results
against float64, and prints a Markdown table of what one program executes per step: instructions per
warp by class, barriers, wavefronts of shared memory and the least number that can move the same
words, sectors of global memory. Polls that find a vector incomplete are not counted: their number
depends on timing, which is not emulated. Instructions are those of PTX: ptxas removes moves and
adds its own arithmetic.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterator

os.environ.pop("TRITON_INTERPRET", None)  # read by triton as it is imported

from benchmarks.machine_code import TRITON_VERSION
from tests.ptx.cases import DTYPES, PRECISIONS, Scan
from tests.ptx.machine import Launch
from triton_gru.plan import selection
from triton_gru.plan.devices import DEVICES, for_triton
from triton_gru.plan.plan import GLUON, GROUP, Problem
from triton_gru.plan.planner import DoesNotFit, all_plans, best_plan

HIDDEN = (128, 256, 512, 650, 768)
STEPS = 4  # even: the Gluon kernel takes two at a time, and computes one too many of an odd number
# Classes of PTX operations by prefix, the first match; the rest is arithmetic, branches count as
# integer operations.
CLASSES = {
    "mma": ("mma.", "wgmma."),
    "shared": ("ld.shared", "st.shared", "ldmatrix", "stmatrix"),
    "global": ("ld.", "st.", "cp.async", "atom.", "red."),
    "barriers": ("bar.",),
    "shuffles": ("shfl", "redux", "vote"),
    "functions": ("ex2", "div.full", "rcp", "lg2", "tanh"),
    "moves": ("mov",),
}
ARITHMETIC = ("float", "integer")
FLOATS = {"f32", "f32x2", "bf16", "f16", "bf16x2", "f16x2"}
COLUMNS = ("mma", "shared", "global", "functions", *ARITHMETIC, "shuffles", "moves")


@dataclasses.dataclass(frozen=True)
class Counts:
    """Counts of one program in one step, without polls that find a vector incomplete.

    Attributes:
        classes: instructions per warp, by class.
        wavefronts: accesses of shared memory as they are served, of at most 128 bytes each.
        least: the smallest number that could serve them, without bank conflicts.
        sectors: of 32 bytes of global memory, for each warp and instruction separately.
    """

    classes: dict[str, float]
    wavefronts: float
    least: float
    sectors: float

    @property
    def instructions(self) -> float:
        return sum(self.classes.values())


def class_of(operation: str) -> str:
    """The class of a PTX operation."""
    for name, prefixes in CLASSES.items():
        if operation.startswith(prefixes):
            return name
    return ARITHMETIC[not FLOATS & set(operation.split("."))]


def counts(launch: Launch, steps: int) -> Counts:
    """Counts per step in the loop of a launch that was counted (`counting=True`)."""
    program = launch.program
    classes, wavefronts, least, sectors = {}, 0.0, 0.0, 0.0
    again = {}  # how often a segment was executed because a vector was incomplete
    for poll in program.polls:
        backwards = {a for a, b in program.edges() if {a, b} <= poll and b <= a}
        again |= dict.fromkeys(poll, max(launch.executed[a] for a in backwards))
    for number in program.loop:
        times = launch.executed[number] - again.get(number, 0)
        times /= launch.warps * launch.programs * steps
        if times <= 0:
            continue
        for i in program.segments[number].instructions:
            name = class_of(i.op)
            classes[name] = classes.get(name, 0) + times
            if i.at in launch.banks:
                warps, taken, fewest = launch.banks[i.at]
                wavefronts += times * launch.warps * taken / warps
                least += times * launch.warps * fewest / warps
            if i.at in launch.sectors:
                sectors += launch.sectors[i.at][1] / (launch.programs * steps)
    return Counts(classes, wavefronts, least, sectors)


def scans(
    arch: int, precision: str, batch: int, hidden: int, reset_after: bool
) -> Iterator[tuple[str, str, Counts]]:
    """Direction, short plan, and counts, of forward and backward by the planner's first plans.

    Where one is a Gluon kernel's, those of the Triton kernels are added.

    Raises:
        DoesNotFit: No kernel takes this shape.
        RuntimeError: A result is wrong.
    """
    dtype, tensor_cores = selection.DTYPES[DTYPES[precision]], precision != "ieee"
    problem = Problem(batch, hidden, dtype, reset_after, tensor_cores=tensor_cores)
    device = for_triton(DEVICES[arch], TRITON_VERSION)
    problems = [dataclasses.replace(problem, direction=d) for d in ("forward", "backward")]
    for one in problems:
        best_plan(one, device)
    scan = Scan((STEPS, batch, hidden), precision, "best", arch, reset_after)
    outcomes = [scan.run(weak=False, counting=True)]
    triton = [[p for p in all_plans(one, device) if p.kernel == GROUP] for one in problems]
    if any(p.kernel == GLUON for p in scan.plans) and all(triton):  # what other versions run
        scan.plans = [plans[0] for plans in triton]
        outcomes.append(scan.run(weak=False, counting=True))
    for outcome in outcomes:
        if outcome.wrong():
            raise RuntimeError(f"wrong results at H={hidden} on sm_{arch}: {outcome.wrong()}")
        launches = [launch for launch in outcome.launches if launch.name.startswith("scan_")]
        for plan, launch in zip(outcome.plans, launches, strict=True):
            exchange = f" {plan.protocol}" if plan.group > 1 else ""
            if plan.kernel == GLUON:
                exchange = f" Gluon, {plan.block_m} rows"
            shape = f"{plan.group} x {plan.block_n}, {plan.warps} warps{exchange}"
            yield plan.direction, shape, counts(launch, STEPS)


def heading() -> str:
    names = [
        "H",
        "scan",
        "reset",
        "programs x columns",
        "instructions",
        "barriers",
        *COLUMNS,
    ]
    names += ["wavefronts (least)", "sectors"]
    return f"| {' | '.join(names)} |\n|{'---|' * len(names)}"


def row(hidden: int, direction: str, reset_after: bool, shape: str, found: Counts) -> str:
    """One line of the table."""
    classes = [f"{found.classes.get(name, 0):.0f}" for name in ("barriers", *COLUMNS)]
    cells = [str(hidden), direction, "after" if reset_after else "before", shape]
    cells += [f"{found.instructions:.0f}", *classes]
    cells += [f"{found.wavefronts:.0f} ({found.least:.0f})", f"{found.sectors:.0f}"]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, default=90, choices=DEVICES)
    parser.add_argument("--precision", default="bf16", choices=PRECISIONS)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--hidden", type=int, nargs="+", default=HIDDEN)
    parser.add_argument(
        "--variants", nargs="+", default=["after", "before"], choices=["after", "before"]
    )
    arguments = parser.parse_args()
    print(heading())
    for hidden in arguments.hidden:
        for variant in arguments.variants:
            after = variant == "after"
            try:
                found = scans(arguments.arch, arguments.precision, arguments.batch, hidden, after)
                for direction, shape, one in found:
                    print(row(hidden, direction, after, shape, one), flush=True)
            except DoesNotFit as error:
                sys.exit(f"nothing to count on sm_{arguments.arch}: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
