"""Compiles the kernels for GPUs that need not be present, and reports on the machine code.

    python -m benchmarks.static --arch 80 86 89 90 100 --json table.json
    python -m benchmarks.static --sizes 650 768 1000 1500
    python -m benchmarks.static --every-plan --arch 90

Plans a grid of shapes for each architecture, compiles the kernel of each plan with the installed
Triton and reads the output of its wheel's cuobjdump. A row falls short when it spills inside the
time loop, needs more shared memory than the architecture has, loads weights inside the time loop,
issues no matrix instruction, loses part of a matrix operand (operands.py), or spans more programs
than can be resident. Exits with 1 if any row does. `--every-plan` checks only for lost operands, in
every plan that `tune` may choose.

Times are computed by `triton_gru.plan.costs` (bytes and operations over the rates of the table of
devices), not measured.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import sys
import time

import torch

from benchmarks import operands
from benchmarks.machine_code import (
    TRITON_VERSION,
    compile_kernel,
    scan_constants,
    scan_kernel,
    step_constants,
)
from triton_gru.kernels import step
from triton_gru.plan.costs import SHARED_BYTES_PER_CLOCK
from triton_gru.plan.devices import DEVICES, Device, for_triton
from triton_gru.plan.plan import (
    COUNTER,
    ELEMENT_BYTES,
    GLUON,
    GROUP,
    SINGLE,
    Plan,
    Problem,
    step_tiles,
)
from triton_gru.plan.planner import DoesNotFit, all_plans, best_plan

HIDDEN = (64, 128, 256, 512, 650, 768, 1000, 1024, 1536, 2048)
BATCHES = (1, 16, 64, 256)
# Compiled by continuous integration: each kernel, variant and dtype at least once per architecture.
SHORT_HIDDEN, SHORT_BATCHES = (128, 768), (16,)
# The largest hidden_size of each architecture: in bfloat16, and in float32 with tf32.
LARGEST = {80: (1696, 1024), 86: (1280, 768), 89: (1536, 768), 90: (2048, 1408), 100: (2048, 1280)}


def examine(arch: int, problem: Problem, protocol: str | None = None, uneven: bool = False) -> dict:
    """One row: the plan of a problem on an architecture, and the report on its kernel.

    Args:
        arch: compute capability as in the table of devices.
        problem: the problem to plan.
        protocol: use the best plan with this protocol instead of the best plan.
        uneven: compile with lengths and resets.
    """
    device = for_triton(DEVICES[arch], TRITON_VERSION)
    row = {"arch": arch, "uneven": uneven, **dataclasses.asdict(problem)}
    plan = _planned(problem, device, protocol)
    if plan is None:
        return row | {"kernel": "none", "short": [], "why": _why_none(problem, device)}
    dtype = getattr(torch, problem.dtype)
    compiled = compile_kernel(
        scan_kernel(plan),
        scan_constants(plan, problem, arch, uneven),
        dtype,
        arch,
        plan.warps,
        aligned=problem.hidden % 16 == 0,
    )
    row |= dataclasses.asdict(plan) | dataclasses.asdict(compiled)
    row["shared_weight_bytes"] = plan.shared_weight_bytes
    row["short"] = shortcomings(row, device)
    return row


def _planned(problem: Problem, device: Device, protocol: str | None) -> Plan | None:
    plans = all_plans(problem, device)
    if protocol is not None:
        plans = [p for p in plans if p.kernel == SINGLE or p.protocol == protocol]
    return plans[0] if plans else None


def _why_none(problem: Problem, device: Device) -> str:
    try:
        best_plan(problem, device)
    except DoesNotFit as error:
        return str(error)
    return "no plan with this protocol"


def shortcomings(row: dict, device: Device) -> list[str]:
    """The faults of a row; empty if there are none."""
    found = []
    if row["loop_spill_bytes"]:
        found.append(f"spills {row['loop_spill_bytes']} B per step")
    if row["shared"] > device.shared_bytes:
        found.append(f"needs {row['shared']} B of {device.shared_bytes} B shared memory")
    if row["shared"] < row["shared_weight_bytes"]:
        found.append("keeps more weights in registers than planned, where they crowd out the rest")
    if row["loop_weight_loads"]:
        found.append(f"loads weights {row['loop_weight_loads']} times per step")
    found += row["lost_operands"]
    if not row["loop_matrix"] and row["tensor_cores"]:
        found.append("issues no matrix instruction")
    resident = row["group"] * row["groups_a_launch"]
    if row["group"] > 1 and resident > device.resident_programs:
        found.append(f"{resident} programs, {device.resident_programs} resident")
    return found


def examine_step(arch: int, dtype: str) -> list[dict]:
    """The step kernel's three phases; it has no loop over time."""
    tiles = step_tiles(dtype)
    rows = []
    for phase in (0, 1, 2):
        compiled = compile_kernel(
            step.step_kernel,
            step_constants(tiles, phase),
            getattr(torch, dtype),
            arch,
            tiles.warps,
            aligned=True,
            stages=tiles.stages,
        )
        row = {"arch": arch, "kernel": "step", "dtype": dtype, "phase": phase}
        row |= dataclasses.asdict(tiles) | dataclasses.asdict(compiled)
        row["short"] = list(compiled.lost_operands)
        if compiled.spill_bytes:
            row["short"].append(f"spills {compiled.spill_bytes} B")
        if compiled.shared > DEVICES[arch].shared_bytes:
            row["short"].append(f"needs {compiled.shared} B shared memory")
        if not compiled.loop_matrix:
            row["short"].append("issues no matrix instruction")
        rows.append(row)
    return rows


def _rows(jobs: list[tuple]) -> list[list[dict]]:
    return [
        examine_step(*arguments) if kind == "step" else [examine(*arguments)]
        for kind, *arguments in jobs
    ]


def _same_kernel(job: tuple) -> str:
    """Jobs with equal results compile one kernel: batches differ in their launches alone."""
    kind, arch, problem, *rest = job
    if kind == "step":
        return repr(job)
    protocol, uneven = (*rest, None, False)[:2] if rest else (None, False)
    plan = _planned(problem, for_triton(DEVICES[arch], TRITON_VERSION), protocol)
    if plan is None:
        return "none"
    constants = scan_constants(plan, problem, arch, uneven)
    kernel = arch, problem.direction, problem.dtype, problem.hidden % 16 == 0, plan.warps
    return repr((kernel, constants))


def report(archs: list[int], short: bool, processes: int) -> list[dict]:
    """Every row of the grid; each kernel is compiled once, 675 of them for the whole grid."""
    hidden, batches = (SHORT_HIDDEN, SHORT_BATCHES) if short else (HIDDEN, BATCHES)
    jobs = []
    for arch in archs:
        for dtype in ("bfloat16", "float32"):
            jobs.append(("step", arch, dtype))
            for size in hidden:
                for batch in batches:
                    for reset_after in (True, False):
                        for direction in ("forward", "backward"):
                            problem = Problem(batch, size, dtype, reset_after, direction)
                            jobs.append(("scan", arch, problem))
        # Once per direction and variant: the other protocol (both are to be measured), lengths and
        # resets, both directions of a layer, float32 without tf32, and the largest size that fits.
        for reset_after in (True, False):
            for direction in ("forward", "backward"):
                make = functools.partial(Problem, 16, reset_after=reset_after, direction=direction)
                largest = dict(zip(("bfloat16", "float32"), LARGEST[arch], strict=True))
                jobs += [("scan", arch, make(size, dtype)) for dtype, size in largest.items()]
                jobs.append(("scan", arch, make(768, "bfloat16"), COUNTER))
                jobs.append(("scan", arch, make(768, "bfloat16"), None, True))
                jobs.append(("scan", arch, make(650, "bfloat16", directions=2)))
                jobs.append(("scan", arch, make(256, "float32", tensor_cores=False)))
                if not short:
                    jobs.append(("scan", arch, make(128, "bfloat16"), None, True))
                    jobs.append(("scan", arch, make(largest["float32"], "float32"), None, True))
                    jobs.append(("scan", arch, make(768, "float32", tensor_cores=False)))
    kernels: dict[str, list[int]] = {}
    for n, job in enumerate(jobs):
        kernels.setdefault(_same_kernel(job), []).append(n)
    found = {}
    with concurrent.futures.ProcessPoolExecutor(processes) as pool:
        batches = [[jobs[n] for n in numbers] for numbers in kernels.values()]
        for numbers, rows in zip(kernels.values(), pool.map(_rows, batches), strict=True):
            found |= zip(numbers, rows, strict=True)
    return [row for n in range(len(jobs)) for row in found[n]]


def sizes(arch: int, hidden: list[int], batch: int = 16) -> list[dict]:
    """Overhead of hidden sizes that are no power of two, bf16: see `sizes_table`."""
    return [
        examine(arch, Problem(batch, size, "bfloat16", reset_after, direction))
        for size in hidden
        for reset_after in (True, False)
        for direction in ("forward", "backward")
    ]


def sizes_table(rows: list[dict]) -> str:
    """As Markdown: weights held by all programs and read per step by one, against 3 H^2 and 3 H.

    `us for H` is the lower bound of a slice that holds exactly H columns of the vector.
    """
    lines = [
        "| H | scan | reset | tile | programs | chunks | weights held, MB | of 3 H^2 "
        "| read per step | shared bytes | spill | lower bound us | us for H | estimate us |",
        "|" + "---|" * 14,
    ]
    for r in rows:
        device = DEVICES[r["arch"]]
        exact = 3 * r["hidden"] ** 2 * ELEMENT_BYTES[r["dtype"]]
        slice_of = exact / r["hidden"] * r["block_n"]
        held = r["weight_bytes"] * r["group"]
        surplus = (r["weight_bytes"] - slice_of) / SHARED_BYTES_PER_CLOCK
        by_l2 = r["exchanged_bytes"] / device.l2_bytes_per_clock
        by_weights = r["weight_bytes"] / SHARED_BYTES_PER_CLOCK
        exact_bound = (
            r["lower_bound_us"] - min(surplus, max(by_weights - by_l2, 0)) / device.clock_mhz
        )
        tail = f" + {r['tail']}" if r["tail"] < r["block_k"] else ""
        whole = r["k_blocks"] - bool(tail)
        lines.append(
            f"| {r['hidden']} | {r['direction']} | {'after' if r['reset_after'] else 'before'} "
            f"| {r['block_m']} x {r['block_n']} | {r['group']} | {whole} x {r['block_k']}{tail} "
            f"| {held / 1e6:.2f} | {held / exact - 1:+.1%} "
            f"| {r['weight_bytes'] / slice_of - 1:+.1%} "
            f"| {r['shared']} | {r['loop_spill_bytes']} "
            f"| {r['lower_bound_us']:.2f} | {exact_bound:.2f} "
            f"| {r['estimate_us']:.2f} |"
        )
    return "\n".join(lines)


def _also(row: dict) -> list[str]:
    """Properties of a row that most lack: two directions, lengths and resets, no tf32."""
    exact = row["dtype"] == "float32" and not row["tensor_cores"]
    found = {"2": row["directions"] == 2, "uneven": row["uneven"], "ieee": exact}
    return [name for name, has in found.items() if has]


COLUMNS = {  # heading: (width, key or function)
    "arch": (4, "arch"),
    "dtype": (8, "dtype"),
    "H": (5, "hidden"),
    "B": (4, "batch"),
    "reset": (6, lambda r: "after" if r["reset_after"] else "before"),
    "scan": (8, "direction"),
    "also": (6, lambda r: ", ".join(_also(r)) or "-"),
    "kernel": (6, "kernel"),
    "tile": (9, lambda r: f"{r['block_m']}x{r['block_n']}/{r['warps']}w"),
    "group": (9, lambda r: f"{r['groups']}x{r['group']}"),
    "runs": (4, "launches"),
    "proto": (8, lambda r: r["protocol"] if r["group"] > 1 else "-"),
    "W regs": (6, "in_registers"),
    "shared": (7, "shared"),
    "regs": (4, "registers"),
    "spill": (5, "loop_spill_bytes"),
    "mma": (4, "loop_matrix"),
    "W loads": (7, "loop_weight_loads"),
    "instr": (5, "loop_instructions"),
    "exch B": (9, "exchanged_bytes"),
    "bound us": (8, lambda r: f"{r['lower_bound_us']:.2f}"),
    "est us": (7, lambda r: f"{r['estimate_us']:.2f}"),
}


def table(rows: list[dict]) -> str:
    """The scans as text, one line each, then the steps, then what does not fit with the reasons."""
    scans = [r for r in rows if r["kernel"] in (SINGLE, GROUP, GLUON)]
    lines = [" ".join(f"{head:>{width}}" for head, (width, _) in COLUMNS.items())]
    for row in scans:
        cells = [(w, key(row) if callable(key) else row[key]) for w, key in COLUMNS.values()]
        line = " ".join(f"{cell!s:>{width}}" for width, cell in cells)
        lines.append(line + ("  FALLS SHORT: " + "; ".join(row["short"]) if row["short"] else ""))
    for row in rows:
        if row["kernel"] == "step":
            lines.append(
                f"{row['arch']:>4} {row['dtype']:>8} step phase {row['phase']}: shared "
                f"{row['shared']}, registers {row['registers']}, spill {row['spill_bytes']}, "
                f"matrix {row['loop_matrix']}"
                + "".join(f"  FALLS SHORT: {s}" for s in row["short"])
            )
    refused: dict[str, list[str]] = {}
    for row in rows:
        if row["kernel"] == "none":
            shape = f"sm_{row['arch']} B={row['batch']} {row['direction']}"
            refused.setdefault(row["why"], []).append(shape)
    lines += [f"not planned ({len(shapes)} shapes): {why}" for why, shapes in refused.items()]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[90], choices=DEVICES)
    parser.add_argument("--short", action="store_true", help="the part that CI compiles")
    parser.add_argument("--json", help="write every row, with all values, to this file")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--sizes", type=int, nargs="+", help="only the overhead of these sizes, at B=16 in bf16"
    )
    parser.add_argument(
        "--every-plan",
        action="store_true",
        help="only whether any plan loses part of an operand; 2,000 kernels per architecture",
    )
    arguments = parser.parse_args()
    started = time.time()
    print(f"triton {TRITON_VERSION}")
    if arguments.sizes:
        rows = [row for arch in arguments.arch for row in sizes(arch, arguments.sizes)]
        print(sizes_table(rows))
    elif arguments.every_plan:
        rows = operands.report(arguments.arch, arguments.processes)
    else:
        rows = report(arguments.arch, arguments.short, arguments.processes)
        print(table(rows))
    short = [row for row in rows if row["short"]]
    print(f"{len(rows)} rows, {len(short)} fall short, {time.time() - started:.0f} s")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"triton": TRITON_VERSION, "rows": rows}, file, indent=1)
            file.write("\n")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
