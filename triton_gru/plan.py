"""From a shape and a device to a kernel, its tiles and the time a step cannot be shorter than.

Pure Python: no torch, no triton, no device. `device_from_torch` is the one place that asks one.

The arithmetic. A program keeps its slice of W_hh on chip for all steps, so a step of it costs

    floor = exchanges * latency + max(weight bytes / (128 B / clock), exchanged bytes / L2 rate)

where `weight bytes` are those of one program's slice in shared memory, read once a step, and
`exchanged bytes` what all programs together read of each other's results. What the floor leaves
out and the choice between plans must see (matrix instructions on tiles padded to 16 x 8, staging
of the vector, partial sums of the warps) is in `estimate_us`. Neither is a measurement.
"""

import dataclasses
import functools
import math

KIB = 1024
# Bytes a streaming multiprocessor reads from its shared memory a clock, on every part of the table.
SHARED_BYTES_PER_CLOCK = 128
# One exchange between programs: a store to L2, a load from it, and the check. To be measured.
EXCHANGE_LATENCY_US = 1.0
# Programs of a launch must all be resident; this share of the device is left to others.
HEADROOM = 1 / 64
# Rows of `states` and of the weights are padded to this many elements, so that rows stay aligned.
ALIGNMENT = 16
# Registers a thread may have. Said to the compiler, which otherwise rounds down to 128 or 168 for
# programs to share a multiprocessor, and spills a little: these have it to themselves.
MAX_REGISTERS = 255
# Repeated looks before a wait gives up: with L2 answering in half a microsecond or more, about a
# second, far beyond any healthy step.
POLLS = 1 << 20

# On sm_100 the compiler spills a little earlier, where a wait ends in products of the larger sizes:
# by how much less of the limits below those plans have to load.
SPARED_ON_100 = 30
# How many pieces of the weights may be in registers, and with which Triton: in 3.7 the compiler
# keeps them there as tile.py loads them, in 3.6 and 3.9 it moves them to shared memory.
MOST_IN_REGISTERS = 2
TRITON_OF_REGISTERS = "3.7."
# The least sum a matrix instruction of Triton runs over.
MATRIX_DEPTH = 16
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SENTINEL, COUNTER = "sentinel", "counter"


@dataclasses.dataclass(frozen=True)
class Device:
    """What a plan needs to know of a GPU.

    Attributes:
        name: for people.
        capability: compute capability, 10 * major + minor.
        multiprocessors: streaming multiprocessors.
        shared_bytes: shared memory one program may have.
        clock_mhz: sustained clock assumed in the arithmetic.
        l2_bytes_per_clock: what all multiprocessors together read from L2 a clock.
        most_in_registers: pieces of the weights that the compiler at hand can keep in registers.
    """

    name: str
    capability: int
    multiprocessors: int
    shared_bytes: int
    clock_mhz: int
    l2_bytes_per_clock: int
    most_in_registers: int = MOST_IN_REGISTERS

    @property
    def resident_programs(self) -> int:
        """Programs one launch may hold, one to a multiprocessor, with headroom."""
        return self.multiprocessors - math.ceil(self.multiprocessors * HEADROOM)


# Multiprocessors and shared memory are the vendor's tables; clocks are the middle of base and boost
# that a busy card holds; L2 rates are what public microbenchmarks report, rounded down.
DEVICES = {
    80: Device("A100 SXM", 80, 108, 163 * KIB, 1410, 3072),
    86: Device("RTX 3090", 86, 82, 99 * KIB, 1695, 1536),
    89: Device("L40S", 89, 142, 99 * KIB, 2250, 2048),
    90: Device("H200 SXM", 90, 132, 227 * KIB, 1755, 3072),
    100: Device("B200", 100, 148, 227 * KIB, 1850, 4096),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one scan is launched.

    Attributes:
        kernel: "single" or "group".
        direction: "forward" or "backward".
        rows: batch rows a program.
        columns: columns of the state a program.
        chunk: columns of the vector that one piece of the resident weights spans.
        chunks: how many such pieces.
        tail: columns of the last piece; as many as `chunk` or fewer.
        in_registers: how many of the last pieces stay in registers, not in shared memory.
        split: parts into which warps split a chunk; 1 where they split the columns instead.
        warps: warps a program.
        group: programs that share the columns of one batch tile.
        groups: batch tiles x directions.
        launches: how many launches it takes when not all groups are resident together.
        groups_a_launch: groups of each launch but the last.
        merge: whether the warps' partial sums of all gates meet in one reduction.
        stage_all: whether the whole vector is staged in shared memory at once, not chunk by chunk.
        by_block: whether the backward receives one gate's gradients after the other, not at once.
        protocol: "sentinel" or "counter".
        weight_bytes: of one program's slice.
        shared_bytes: estimate of what the compiler allocates.
        exchanged_bytes: read from L2 a step by all programs of a launch.
        floor_us: a step cannot be shorter, see the module's docstring.
        estimate_us: with everything counted; what plans are compared by.
    """

    kernel: str
    direction: str
    rows: int
    columns: int
    chunk: int
    chunks: int
    tail: int
    in_registers: int
    split: int
    warps: int
    group: int
    groups: int
    launches: int
    groups_a_launch: int
    merge: bool
    stage_all: bool
    by_block: bool
    protocol: str
    weight_bytes: int
    shared_bytes: int
    exchanged_bytes: int
    floor_us: float
    estimate_us: float

    @property
    def span(self) -> int:
        """Columns of the vector that the pieces cover together: hidden_size and what is padded."""
        return self.chunk * (self.chunks - 1) + self.tail

    @property
    def shared_weight_bytes(self) -> int:
        """Of one program's slice, what lies in shared memory and is read from it every step."""
        if not self.in_registers:
            return self.weight_bytes
        held = self.chunk * (self.in_registers - 1) + self.tail
        return self.weight_bytes * (self.span - held) // self.span

    def describe(self) -> str:
        """The plan in words, as the end of a sentence."""
        if self.kernel == "single":
            shape = (
                f"{self.groups} independent programs, each with all of W_hh for {self.rows} rows"
            )
        else:
            launches = f" in {self.launches} launches" if self.launches > 1 else ""
            shape = (
                f"{self.groups} groups{launches} of {self.group} programs, each with "
                f"{self.columns} columns of W_hh for {self.rows} rows, exchanging the state by "
                f"{self.protocol}"
            )
        return f"{shape}; at least {self.floor_us:.2f} us a step by arithmetic"


class DoesNotFit(ValueError):
    """No plan fits; the message says what is too large for what."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """One scan to be planned.

    Attributes:
        batch: rows.
        hidden: hidden_size.
        dtype: "float32", "bfloat16" or "float16".
        reset_after: the variant.
        direction: "forward" or "backward".
        directions: 1, or 2 for a bidirectional layer.
        tensor_cores: whether float32 products may use tf32.
    """

    batch: int
    hidden: int
    dtype: str
    reset_after: bool
    direction: str = "forward"
    directions: int = 1
    tensor_cores: bool = True


def padded_size(hidden: int) -> int:
    """hidden_size as the kernels store it."""
    return -(-hidden // ALIGNMENT) * ALIGNMENT


def best_plan(problem: Problem, device: Device) -> Plan:
    """The plan with the smallest estimate.

    Raises:
        DoesNotFit: Nothing fits; the message is a sentence without its full stop.
    """
    plans = all_plans(problem, device)
    if plans:
        return plans[0]
    raise DoesNotFit(_why_not(problem, device))


@functools.lru_cache(maxsize=1024)  # asked anew at every launch
def all_plans(problem: Problem, device: Device) -> tuple[Plan, ...]:
    """Every plan that fits, best first."""
    if problem.dtype not in ELEMENT_BYTES or problem.batch < 1 or problem.hidden < 1:
        return ()
    plans = [_single(problem, device, rows) for rows in (16, 32)]
    plans += [
        _group(problem, device, rows, columns, warps, protocol, by_block)
        for rows in (16, 32)
        for columns in (16, 32, 64)
        for warps in (4, 8)
        for protocol, by_block in _exchanges(problem.direction)
    ]
    fitting = [plan for plan in plans if plan is not None]

    # Ties go to fewer programs, then to sentinel (one trip to L2 less, see kernels/exchange.py).
    def order(plan: Plan) -> tuple:
        return round(plan.estimate_us, 3), plan.group * plan.groups, plan.protocol != SENTINEL

    return tuple(sorted(fitting, key=order))


def _exchanges(direction: str) -> tuple[tuple[str, bool], ...]:
    """Protocols, and whether the backward takes its vectors one by one."""
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
    """What would let the matrix units hold part of the weights in registers, if that is enough."""
    capable = dataclasses.replace(device, most_in_registers=MOST_IN_REGISTERS)
    if not all_plans(dataclasses.replace(problem, tensor_cores=True), capable):
        return ""
    needs = []
    if not problem.tensor_cores:
        needs.append("torch.backends.cudnn.allow_tf32 = True")
    if not device.most_in_registers:
        needs.append(f"Triton {TRITON_OF_REGISTERS}x")
    return f" (it does with {' and '.join(needs)})"


def describe(*, name: str, capability: int, multiprocessors: int, shared_bytes: int) -> Device:
    """A device that reported its own limits; clock and L2 rate of the nearest one in the table."""
    known = [c for c in DEVICES if c <= capability]
    nearest = DEVICES[max(known)] if known else DEVICES[min(DEVICES)]
    return dataclasses.replace(
        nearest,
        name=name,
        capability=capability,
        multiprocessors=multiprocessors,
        shared_bytes=shared_bytes,
    )


def for_triton(device: Device, version: str) -> Device:
    """The device as a version of Triton can use it."""
    if version.startswith(TRITON_OF_REGISTERS):
        return device
    return dataclasses.replace(device, most_in_registers=0)


# -- the two shapes of a launch ---------------------------------------------------------------

# A thread has 255 registers. What decides about spills is what lives through the wait for the
# vector, the vector itself, and then the accumulators, which weigh half as much again. In a sweep
# of 120 tiles on sm_90 (rows 16 and 32, columns 8 to 64, H 256 to 2048) these were the largest
# words + 1.5 accumulators a thread below which none spilled in the time loop. float32 operands, on
# their way through registers, take a tenth more.
REGISTER_LOAD = {  # by direction, protocol and warps
    ("forward", SENTINEL, 4): 160,
    ("forward", SENTINEL, 8): 159,
    ("forward", COUNTER, 4): 130,
    ("forward", COUNTER, 8): 140,
    ("backward", SENTINEL, 4): 168,
    ("backward", SENTINEL, 8): 176,
    ("backward", COUNTER, 4): 160,
    ("backward", COUNTER, 8): 168,
}
# The same where the backward takes its vectors one by one: three waits in a loop are worse. (H 1100
# in bfloat16 with 32 columns and 4 warps, 96, spilled 56 bytes a step.)
REGISTER_LOAD_BY_BLOCK = {  # by protocol and warps
    (SENTINEL, 4): 90,
    (SENTINEL, 8): 104,
    (COUNTER, 4): 90,
    (COUNTER, 8): 138,
}
# The same where part of the weights is in registers too, which then counts (sm_90, H 1152 to 1536
# in float32, H 1024 to 1280 in bfloat16 on sm_86 and sm_89). Where nothing stands here, all spill.
REGISTER_LOAD_WITH_WEIGHTS = {  # by direction, protocol and whether by block
    ("forward", SENTINEL, False): 172,
    ("backward", SENTINEL, True): 116,
    ("backward", COUNTER, True): 150,
}


def _single(problem: Problem, device: Device, rows: int) -> Plan | None:
    size = padded_size(problem.hidden)
    columns = max(16, 1 << (size - 1).bit_length())
    element = ELEMENT_BYTES[problem.dtype]
    warps = 8 if columns >= 128 else 4
    sums = 3 if problem.direction == "forward" else 1
    if sums * rows * columns / (32 * warps) > 64:
        return None
    weight = 3 * columns * columns * element
    shared = weight + rows * columns * (
        element + (8 + element if problem.direction == "backward" else 0)
    )
    if shared > device.shared_bytes:
        return None
    groups = problem.directions * -(-problem.batch // rows)
    return _priced(
        problem,
        device,
        kernel="single",
        rows=rows,
        columns=columns,
        chunk=columns,
        chunks=1,
        tail=columns,
        in_registers=0,
        split=1,
        warps=warps,
        group=1,
        groups=groups,
        launches=1,
        groups_a_launch=groups,
        merge=False,
        stage_all=True,
        by_block=False,
        protocol=SENTINEL,
        weight_bytes=weight,
        shared_bytes=shared,
    )


def _group(
    problem: Problem,
    device: Device,
    rows: int,
    columns: int,
    warps: int,
    protocol: str,
    by_block: bool,
) -> Plan | None:
    size = padded_size(problem.hidden)
    element = ELEMENT_BYTES[problem.dtype]
    group = -(-size // columns)
    if group == 1 or group > device.resident_programs:
        return None
    forward = problem.direction == "forward"
    sums = 3 if forward else 1
    sum_bytes = warps * rows * columns * 4
    merged = (3 if problem.reset_after else 2) if forward else 1
    vectors = 1 if forward or by_block else (3 if problem.reset_after else 2)

    for in_registers in range(1 + device.most_in_registers):
        chunk, chunks, tail = _chunks(size, warps, element, (64,) if in_registers else (64, 128))
        span = chunk * (chunks - 1) + tail
        weight = 3 * columns * span * element
        held = 3 * columns * (chunk * (in_registers - 1) + tail) * element if in_registers else 0
        # In order of preference: all chunks staged at once and all sums merged, else less of
        # either.
        for stage_all, merge in ((True, True), (True, False), (False, False)):
            staging = rows * element * (span if stage_all else chunk)
            shared = weight - held + max(staging, sum_bytes * (merged if merge else 1))
            if shared <= device.shared_bytes:
                break
        else:
            continue
        break
    else:
        return None

    # Registers: see REGISTER_LOAD.
    vector = vectors * rows * span * element / 4 / (32 * warps)
    load = vector + 1.5 * sums * rows * columns / 32
    if in_registers:
        # The operand is found in registers only as tile.py loads it, and only by matrix units.
        if columns != 16 or not (element == 2 or problem.tensor_cores):
            return None
        load += held / 4 / (32 * warps)
        limit = REGISTER_LOAD_WITH_WEIGHTS.get((problem.direction, protocol, by_block), 0)
    else:
        load *= 1.1 if element == 4 else 1
        limit = REGISTER_LOAD[problem.direction, protocol, warps]
        if by_block:
            limit = REGISTER_LOAD_BY_BLOCK[protocol, warps]
    if device.capability >= 100 and (in_registers or by_block):
        limit -= SPARED_ON_100
    if load > limit:
        return None

    groups = problem.directions * -(-problem.batch // rows)
    groups_a_launch = min(groups, device.resident_programs // group)
    return _priced(
        problem,
        device,
        kernel="group",
        rows=rows,
        columns=columns,
        chunk=chunk,
        chunks=chunks,
        tail=tail,
        in_registers=in_registers,
        split=warps,
        warps=warps,
        group=group,
        groups=groups,
        launches=-(-groups // groups_a_launch),
        groups_a_launch=groups_a_launch,
        merge=merge,
        stage_all=stage_all,
        by_block=by_block,
        protocol=protocol,
        weight_bytes=weight,
        shared_bytes=shared,
        held=held,
    )


def _chunks(size: int, warps: int, element: int, parts: tuple[int, ...]) -> tuple[int, int, int]:
    """The chunks that cover `size` with the least waste, and of these the fewest.

    A warp takes so many bytes of each column of a chunk as `parts` offers. With 32 bytes of 16-bit
    weights the compiler moves them to registers before the loop, which one chunk of such, the last,
    may do but not all; chunks beyond 512 bytes of a column cost registers too.

    Returns:
        Columns a chunk, number of chunks, columns of the last.
    """
    widths = [warps * part // element for part in parts]
    widths = [width for width in widths if width * element <= 512] or widths[:1]
    found = []
    for width in widths:
        chunks = -(-size // width)
        left = size - width * (chunks - 1)
        tail = width
        while chunks > 1 and tail // 2 >= max(left, MATRIX_DEPTH * warps):
            tail //= 2
        found.append((width, chunks, tail))
    return min(found, key=lambda c: (c[0] * (c[1] - 1) + c[2], c[1]))


def _priced(problem: Problem, device: Device, held: int = 0, **plan) -> Plan:
    """Completes a plan by what it costs; `held` bytes of its weights are in registers."""
    forward = problem.direction == "forward"
    element = ELEMENT_BYTES[problem.dtype]
    rows, columns = plan["rows"], plan["columns"]
    span = plan["chunk"] * (plan["chunks"] - 1) + plan["tail"]
    programs = plan["group"] * min(plan["groups"], plan["groups_a_launch"])
    vectors = 3 if not forward else (1 if problem.reset_after else 2)
    exchanged = exchanges = 0
    if plan["kernel"] == "group":
        exchanged = programs * rows * padded_size(problem.hidden) * element * vectors
        exchanges = 1 if problem.reset_after else 2

    clocks_us = device.clock_mhz
    weights = (plan["weight_bytes"] - held) / SHARED_BYTES_PER_CLOCK
    over_l2 = exchanged / device.l2_bytes_per_clock
    floor = exchanges * EXCHANGE_LATENCY_US + max(weights, over_l2) / clocks_us

    # Beyond the floor: the vector is written to shared memory and read from it again; the warps'
    # partial sums likewise; the matrix units see whole 16 x 8 tiles, float32 at half the rate.
    multiplied = 3 * rows * columns * span
    if problem.dtype == "float32" and not problem.tensor_cores:
        arithmetic = multiplied / 128
    else:
        rate = MATRIX_RATE.get(device.capability, 1024) * (0.5 if element == 4 else 1)
        arithmetic = multiplied / rate
    staged = 2 * rows * span * element * vectors / SHARED_BYTES_PER_CLOCK
    sums = 3 if forward else (1 if problem.reset_after else 2)
    summed = 2 * sums * plan["split"] * rows * columns * 4 / SHARED_BYTES_PER_CLOCK
    if plan["split"] == 1:
        summed = 0
    latency = exchanges * (EXCHANGE_LATENCY_US + (COUNTER_EXTRA_US if _counts(plan) else 0))
    if plan["by_block"]:
        latency += (vectors - 1) * BLOCK_EXTRA_US
    busy = max(weights + staged, arithmetic, over_l2) + summed + FIXED_CLOCKS
    waves = plan["launches"]
    if plan["kernel"] == "single":
        # No exchange, so nothing has to be resident together: programs queue for a place.
        waves = -(-plan["groups"] // device.multiprocessors)
    return Plan(
        **plan,
        direction=problem.direction,
        exchanged_bytes=exchanged,
        floor_us=waves * floor,
        estimate_us=waves * (latency + busy / clocks_us),
    )


def _counts(plan: dict) -> bool:
    return plan["kernel"] == "group" and plan["protocol"] == COUNTER


# Multiply-adds a clock and multiprocessor that mma.sync reaches on 16-bit operands (on sm_90 and
# sm_100 that is half of what their asynchronous instructions do; a 16-row tile cannot use those).
MATRIX_RATE = {80: 1024, 86: 512, 89: 512, 90: 1024, 100: 1024}
# The counter costs the drain of the stores and one more trip to L2 than the sentinel.
COUNTER_EXTRA_US = 0.7
# A further block of the vector is there when it is asked for, but has to come from L2.
BLOCK_EXTRA_US = 0.4
# Gates, barriers and addresses of a step, from the instruction counts of the static report.
FIXED_CLOCKS = 300


# -- one step ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class StepTiles:
    """How `kernels/step.py` is launched; the same for every shape."""

    rows: int
    columns: int
    chunk: int
    warps: int
    stages: int


def step_tiles(dtype: str) -> StepTiles:
    """Narrow columns: at hidden_size 512 already 32 programs share the reading of W_hh."""
    if dtype == "float32":
        return StepTiles(rows=16, columns=16, chunk=64, warps=4, stages=3)
    return StepTiles(rows=16, columns=16, chunk=128, warps=4, stages=3)
