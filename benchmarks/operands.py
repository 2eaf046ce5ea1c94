"""Whether any plan loses part of a matrix operand: `python -m benchmarks.static --every-plan`.

The grid of static.py contains the best plan of each shape; `tune` may choose any plan that fits, of
any hidden_size. Here one plan of each kind is compiled, with and without lengths and resets.
"""

import concurrent.futures
import dataclasses
import itertools

import torch

from benchmarks.machine_code import (
    TRITON_VERSION,
    assemble,
    lost_operands,
    scan_constants,
    scan_kernel,
)
from triton_gru.plan.devices import DEVICES, Device, for_triton
from triton_gru.plan.plan import ALIGNMENT, ELEMENT_BYTES, GLUON, Plan, Problem
from triton_gru.plan.planner import all_plans

BATCHES = (1, 16, 64, 256)
DTYPES = (("bfloat16", True), ("float32", True), ("float32", False))  # and tensor_cores


def kinds_of_plans(device: Device, dtype: str, tensor_cores: bool) -> list[tuple[Problem, Plan]]:
    """One of each kind of plan that fits, for every hidden_size, both variants and directions.

    Plans that differ only in the batch, the number of programs or the number of chunks (beyond two)
    have the same layouts and are of one kind; the smallest hidden_size represents it.
    """
    room = device.resident_programs * device.shared_bytes / (3 * ELEMENT_BYTES[dtype])
    largest = int((2 * room) ** 0.5)  # nothing fits beyond: part of the weights may be in registers
    found: dict[tuple, tuple[Problem, Plan]] = {}
    for reset_after, direction in itertools.product((True, False), ("forward", "backward")):
        for hidden in range(ALIGNMENT, largest + 1, ALIGNMENT):
            for batch in BATCHES:
                problem = Problem(
                    batch, hidden, dtype, reset_after, direction, tensor_cores=tensor_cores
                )
                for plan in all_plans(problem, device):
                    found.setdefault(_kind(problem, plan), (problem, plan))
    return list(found.values())


def _kind(problem: Problem, plan: Plan) -> tuple:
    # Of the tail the Gluon kernel knows only whether there is one.
    tail = plan.tail < plan.block_k if plan.kernel == GLUON else plan.tail
    return (
        *(problem.reset_after, plan.direction, plan.kernel, plan.protocol, plan.by_block),
        *(plan.block_m, plan.block_n, plan.warps, plan.split_k, plan.stage_all),
        *(plan.block_k, min(plan.k_blocks, 2), tail, plan.in_registers),
    )


def examine(arch: int, problem: Problem, plan: Plan, uneven: bool) -> dict:
    """One row, "short" if the plan's kernel loses operands; `uneven`: with lengths and resets."""
    compiled = assemble(
        scan_kernel(plan),
        scan_constants(plan, problem, arch, uneven),
        getattr(torch, problem.dtype),
        arch,
        plan.warps,
        aligned=problem.hidden % 16 == 0,
    )
    row = {"arch": arch, "uneven": uneven, **dataclasses.asdict(problem)}
    return row | dataclasses.asdict(plan) | {"short": list(lost_operands(compiled))}


def _job(job: tuple) -> dict:
    return examine(*job)


def report(archs: list[int], processes: int) -> list[dict]:
    """Every row; prints a line per architecture and dtype when it is done."""
    rows = []
    with concurrent.futures.ProcessPoolExecutor(processes) as pool:
        for arch, (dtype, tensor_cores) in itertools.product(archs, DTYPES):
            kinds = kinds_of_plans(for_triton(DEVICES[arch], TRITON_VERSION), dtype, tensor_cores)
            jobs = [(arch, *kind, uneven) for kind in kinds for uneven in (False, True)]
            done = list(pool.map(_job, jobs, chunksize=4))
            short = [row for row in done if row["short"]]
            product = "bfloat16" if dtype == "bfloat16" else "tf32" if tensor_cores else "ieee"
            print(f"sm_{arch} {product}: {len(done)} kernels, {len(short)} fall short", flush=True)
            for row in short:
                print(f"FALLS SHORT: {'; '.join(row['short'])}: {row}")
            rows += done
    return rows
