"""Plans of the Gluon kernels (kernels/gluon_forward.py, gluon_backward.py)."""

import math

from triton_gru.plan.costs import priced
from triton_gru.plan.devices import Device
from triton_gru.plan.plan import (
    ELEMENT_BYTES,
    GLUON,
    MAX_REGISTERS,
    SENTINEL,
    Plan,
    Problem,
    gluon_depth,
    padded_size,
)

ROWS, COLUMNS = (8, 16), (16, 32)
WARPS = 8

# Registers of a thread besides the weights, the vector and the accumulators: addresses, gates and
# masks, and of them those for each element that a thread owns.
OTHER_REGISTERS, REGISTERS_AN_ELEMENT = 30, 8


def gluon_plans(problem: Problem, device: Device) -> list[Plan]:
    """Every plan that fits, but those with weights in shared memory that save no launch.

    They take one more barrier in a step (benchmarks/NOTES.md), which `costs.py` does not know.
    """
    if not device.gluon or not _takes(problem):
        return []
    plans = (_plan(problem, device, rows, columns) for rows in ROWS for columns in COLUMNS)
    fitting = [plan for plan in plans if plan is not None]
    whole = [plan for plan in fitting if plan.in_registers == plan.k_blocks]
    launches = min((plan.launches for plan in whole), default=math.inf)
    return whole + [p for p in fitting if p not in whole and p.launches < launches]


def _takes(problem: Problem) -> bool:
    """16 bit, and float32 with tf32: the products are matrix instructions."""
    return problem.dtype != "float32" or problem.tensor_cores


def _plan(problem: Problem, device: Device, rows: int, columns: int) -> Plan | None:
    size = padded_size(problem.hidden)
    group = -(-size // columns)
    if group == 1 or group > device.resident_programs:
        return None
    element = ELEMENT_BYTES[problem.dtype]
    chunk = gluon_depth(element) * WARPS
    chunks = -(-size // chunk)
    in_registers = min(chunks, _most_in_registers(problem, rows, columns, chunks))
    if in_registers < 0:
        return None
    chunk_bytes = 3 * columns * chunk * element
    forward = problem.direction == "forward"
    products = 3 * (2 if problem.reset_after else 1) if forward else 2  # with a sum of their own
    sums = products * WARPS * rows * columns * 4
    shared = sums + (chunks - in_registers) * chunk_bytes
    if shared > device.shared_bytes:
        return None
    weight = 3 * columns * size * element
    groups = problem.directions * -(-problem.batch // rows)
    groups_a_launch = min(groups, device.resident_programs // group)
    return priced(
        problem,
        device,
        kernel=GLUON,
        block_m=rows,
        block_n=columns,
        block_k=chunk,
        k_blocks=chunks,
        tail=size - chunk * (chunks - 1),
        in_registers=in_registers,
        split_k=WARPS,
        warps=WARPS,
        group=group,
        groups=groups,
        launches=-(-groups // groups_a_launch),
        groups_a_launch=groups_a_launch,
        stage_all=False,
        by_block=False,
        protocol=SENTINEL,
        weight_bytes=weight,
        shared_bytes=shared,
        held=min(weight, in_registers * chunk_bytes),
    )


def _most_in_registers(problem: Problem, rows: int, columns: int, chunks: int) -> int:
    """Chunks whose weights fit in registers; below 0 if not even the vector does."""
    owned = max(1, rows * columns // (32 * WARPS))
    accumulators = 3 * rows * columns // 32
    left = MAX_REGISTERS - OTHER_REGISTERS - REGISTERS_AN_ELEMENT * owned - accumulators
    vectors = 1 if problem.direction == "forward" else 4  # with the three planes of factors
    left -= vectors * chunks * rows // 2
    return left // (3 * columns // 2)
