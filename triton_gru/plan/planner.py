"""From a shape and a device to the plans that fit, best first, or to the reason why none does.

Each tile is tested against shared memory, the number of resident programs and registers.
docs/kernels.md shows what rows, columns, chunks and groups are.
"""

import dataclasses
import functools

from triton_gru.plan.costs import priced
from triton_gru.plan.devices import KIB, MOST_IN_REGISTERS, TRITON_OF_REGISTERS, Device
from triton_gru.plan.gluon import gluon_plans
from triton_gru.plan.plan import COUNTER, ELEMENT_BYTES, SENTINEL, Plan, Problem, padded_size

# The smallest sum of one of Triton's matrix instructions, in columns.
MATRIX_DEPTH = 16


class DoesNotFit(ValueError):
    """No plan fits; the message names the limit."""


def best_plan(problem: Problem, device: Device) -> Plan:
    """The plan with the smallest estimate.

    Raises:
        DoesNotFit: Nothing fits; the message is a sentence without its full stop.
    """
    plans = all_plans(problem, device)
    if plans:
        return plans[0]
    raise DoesNotFit(_why_not(problem, device))


@functools.lru_cache(maxsize=1024)  # called at every launch
def all_plans(problem: Problem, device: Device) -> tuple[Plan, ...]:
    """Every plan that fits, best first."""
    if problem.dtype not in ELEMENT_BYTES or problem.batch < 1 or problem.hidden < 1:
        return ()
    plans = [_single(problem, device, block_m) for block_m in (16, 32)]
    plans += [
        _group(problem, device, block_m, block_n, warps, protocol, by_block)
        for block_m in (16, 32)
        for block_n in (16, 32, 64)
        for warps in (4, 8)
        for protocol, by_block in _exchanges(problem.direction)
    ]
    fitting = [plan for plan in plans if plan is not None] + gluon_plans(problem, device)

    # Ties go to fewer programs, then to sentinel (one L2 round trip less, see kernels/exchange.py).
    def order(plan: Plan) -> tuple:
        return round(plan.estimate_us, 3), plan.group * plan.groups, plan.protocol != SENTINEL

    return tuple(sorted(fitting, key=order))


def _exchanges(direction: str) -> tuple[tuple[str, bool], ...]:
    """Protocols, and whether the backward receives its vectors one by one."""
    if direction == "forward":
        return (SENTINEL, False), (COUNTER, False)
    return (SENTINEL, False), (SENTINEL, True), (COUNTER, False), (COUNTER, True)


def _why_not(problem: Problem, device: Device) -> str:
    if problem.dtype not in ELEMENT_BYTES:
        return f"the kernels compute {', '.join(ELEMENT_BYTES)}, not {problem.dtype}"
    if problem.batch < 1 or problem.hidden < 1:
        return f"batch {problem.batch} x hidden_size {problem.hidden} is empty"
    size = padded_size(problem.hidden)
    total = 3 * size * size * ELEMENT_BYTES[problem.dtype]
    room = device.resident_programs * device.shared_bytes
    return (
        f"W_hh of hidden_size={problem.hidden} in {problem.dtype} is {total / 2**20:.1f} MiB and "
        f"has to stay on chip with the vectors it multiplies; the {device.resident_programs} "
        f"programs of {device.shared_bytes // KIB} KiB that {device.name} holds at once have "
        f"{room / 2**20:.1f} MiB, and no tile of ours fits" + _what_helps(problem, device)
    )


def _what_helps(problem: Problem, device: Device) -> str:
    """The settings with which part of the weights fits in registers, if they make it fit; or ""."""
    capable = dataclasses.replace(device, most_in_registers=MOST_IN_REGISTERS)
    if not all_plans(dataclasses.replace(problem, tensor_cores=True), capable):
        return ""
    needs = []
    if not problem.tensor_cores:
        needs.append("torch.backends.cudnn.allow_tf32 = True")
    if not device.most_in_registers:
        needs.append(f"Triton {TRITON_OF_REGISTERS}x")
    return f" (it does with {' and '.join(needs)})"


# -- the two shapes of a launch ---------------------------------------------------------------

# A thread has 255 registers. Spills depend on what lives through the wait for the vector, on the
# vector itself, and on the accumulators, which count 1.5 times. In a sweep of 120 tiles on sm_90
# (rows 16 and 32, columns 8 to 64, H 256 to 2048) these were the largest values of
# words + 1.5 accumulators per thread below which none spilled in the time loop. float32 operands,
# on their way through registers, take a tenth more. Without matrix units (float32, no tf32) a
# product takes more registers than this counts: all tiles but 16 x 16 spilled, 4 to 460 bytes.
REGISTER_LOAD = {  # by direction, protocol and warps
    ("forward", SENTINEL, 4): 115,
    ("forward", SENTINEL, 8): 159,
    ("forward", COUNTER, 4): 115,
    ("forward", COUNTER, 8): 140,
    ("backward", SENTINEL, 4): 168,
    ("backward", SENTINEL, 8): 176,
    ("backward", COUNTER, 4): 160,
    ("backward", COUNTER, 8): 168,
}
# The same if the backward receives its vectors one by one: three waits per loop take more. (H 1100
# in bfloat16 with 32 columns and 4 warps, 96, spilled 56 bytes per step.)
REGISTER_LOAD_BY_BLOCK = {  # by protocol and warps
    (SENTINEL, 4): 90,
    (SENTINEL, 8): 104,
    (COUNTER, 4): 90,
    (COUNTER, 8): 138,
}
# The same if part of the weights is in registers too, which then counts (sm_90, H 1152 to 1536
# in float32, H 1024 to 1280 in bfloat16 on sm_86 and sm_89). Combinations without an entry spill.
REGISTER_LOAD_WITH_WEIGHTS = {  # by direction, protocol and whether by block
    ("forward", SENTINEL, False): 172,
    ("backward", SENTINEL, True): 116,
    ("backward", COUNTER, True): 150,
}
# On sm_100 the compiler spills a little earlier, if a wait is followed by products of the larger
# sizes: the limits above are lower by this much.
SPARED_ON_100 = 30
# Before sm_90 it spills with 4 warps if the load is at the limit itself, in the forward (28 to
# 164 B per step: bfloat16 H 256 B 256 on sm_80, H 650 B 64 on sm_86) and in float32 (8 B); and from
# 100 on in a backward with weights in registers (20 B, bfloat16 H 1000). There these limits apply.
# (A forward with weights in registers and 32 rows spills 8 to 16 B on sm_86 and sm_89, but the
# other tiles take 21 to 64 % longer by the estimate.)
SPARED_BEFORE_90 = 1
BACKWARD_LOAD_WITH_WEIGHTS_BEFORE_90 = 99


def _single(problem: Problem, device: Device, block_m: int) -> Plan | None:
    size = padded_size(problem.hidden)
    block_n = max(16, 1 << (size - 1).bit_length())
    element = ELEMENT_BYTES[problem.dtype]
    warps = 8 if block_n >= 128 else 4
    sums = 3 if problem.direction == "forward" else 1
    if sums * block_m * block_n / (32 * warps) > 64:
        return None
    weight = 3 * block_n * block_n * element
    shared = weight + block_m * block_n * (
        element + (8 + element if problem.direction == "backward" else 0)
    )
    if shared > device.shared_bytes:
        return None
    groups = problem.directions * -(-problem.batch // block_m)
    return priced(
        problem,
        device,
        kernel="single",
        block_m=block_m,
        block_n=block_n,
        block_k=block_n,
        k_blocks=1,
        tail=block_n,
        in_registers=0,
        split_k=1,
        warps=warps,
        group=1,
        groups=groups,
        launches=1,
        groups_a_launch=groups,
        stage_all=True,
        by_block=False,
        protocol=SENTINEL,
        weight_bytes=weight,
        shared_bytes=shared,
    )


def _group(
    problem: Problem,
    device: Device,
    block_m: int,
    block_n: int,
    warps: int,
    protocol: str,
    by_block: bool,
) -> Plan | None:
    size = padded_size(problem.hidden)
    element = ELEMENT_BYTES[problem.dtype]
    group = -(-size // block_n)
    if group == 1 or group > device.resident_programs:
        return None
    with_matrix_units = element == 2 or problem.tensor_cores
    if not with_matrix_units and (block_m, block_n) != (16, 16):
        return None  # see REGISTER_LOAD
    forward = problem.direction == "forward"
    sums = 3 if forward else 1
    sum_bytes = warps * block_m * block_n * 4
    vectors = 1 if forward or by_block else (3 if problem.reset_after else 2)

    for in_registers in range(1 + device.most_in_registers):
        block_k, k_blocks, tail = _chunks(
            size, warps, element, (64,) if in_registers else (64, 128)
        )
        span = block_k * (k_blocks - 1) + tail
        weight = 3 * block_n * span * element
        held = 3 * block_n * (block_k * (in_registers - 1) + tail) * element if in_registers else 0
        for stage_all in (True, False):  # all chunks at once are fewer barriers
            staging = block_m * element * (span if stage_all else block_k)
            shared = weight - held + max(staging, sum_bytes)
            if shared <= device.shared_bytes:
                break
        else:
            continue
        break
    else:
        return None

    # Registers: see REGISTER_LOAD.
    vector = vectors * block_m * span * element / 4 / (32 * warps)
    load = vector + 1.5 * sums * block_m * block_n / 32
    if in_registers:
        # Only tile.py's way of loading and matrix units find the operand in registers.
        if block_n != 16 or not with_matrix_units:
            return None
        load += held / 4 / (32 * warps)
        limit = REGISTER_LOAD_WITH_WEIGHTS.get((problem.direction, protocol, by_block), 0)
        if forward and warps == 4:  # 48 and 68 B per step at H 1696 in bfloat16 on sm_80
            limit = min(limit, REGISTER_LOAD[problem.direction, protocol, warps])
    else:
        load *= 1.1 if element == 4 else 1
        limit = REGISTER_LOAD[problem.direction, protocol, warps]
        if by_block:
            limit = REGISTER_LOAD_BY_BLOCK[protocol, warps]
    if device.capability >= 100 and (in_registers or by_block):
        limit -= SPARED_ON_100
    if device.capability < 90 and warps == 4:
        if in_registers and not forward:
            limit = min(limit, BACKWARD_LOAD_WITH_WEIGHTS_BEFORE_90)
        elif not in_registers and (forward or element == 4):
            limit -= SPARED_BEFORE_90
    if load > limit:
        return None

    groups = problem.directions * -(-problem.batch // block_m)
    groups_a_launch = min(groups, device.resident_programs // group)
    return priced(
        problem,
        device,
        kernel="group",
        block_m=block_m,
        block_n=block_n,
        block_k=block_k,
        k_blocks=k_blocks,
        tail=tail,
        in_registers=in_registers,
        split_k=warps,
        warps=warps,
        group=group,
        groups=groups,
        launches=-(-groups // groups_a_launch),
        groups_a_launch=groups_a_launch,
        stage_all=stage_all,
        by_block=by_block,
        protocol=protocol,
        weight_bytes=weight,
        shared_bytes=shared,
        held=held,
    )


def _chunks(size: int, warps: int, element: int, parts: tuple[int, ...]) -> tuple[int, int, int]:
    """The chunks that cover `size` with the least waste, and of these the fewest.

    `parts` lists how many bytes of each column of a chunk a warp may take. With 32 bytes of 16-bit
    weights the compiler moves them to registers before the loop, which is possible for one such
    chunk, the last, not for all; chunks beyond 512 bytes of a column cost registers too.

    Returns:
        Columns per chunk, number of chunks, columns of the last.
    """
    widths = [warps * part // element for part in parts]
    widths = [width for width in widths if width * element <= 512] or widths[:1]
    found = []
    for width in widths:
        k_blocks = -(-size // width)
        left = size - width * (k_blocks - 1)
        tail = width
        while k_blocks > 1 and tail // 2 >= max(left, MATRIX_DEPTH * warps):
            tail //= 2
        found.append((width, k_blocks, tail))
    return min(found, key=lambda c: (c[0] * (c[1] - 1) + c[2], c[1]))
