"""The first measurements: peak rates, the latency of an exchange, plans against predictions.

Each probe is a function of a device and of whether to keep it tiny; it returns its entry of the
record. `PROBES` lists them in the order in which a suite runs them.
"""

import dataclasses
import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from benchmarks.timing import kernel_seconds, measure, quantile, summary
from triton_gru.kernels import launch as launches
from triton_gru.kernels.backward import scan_backward
from triton_gru.kernels.exchange import announce, publish, receive, report, unpack
from triton_gru.kernels.forward import scan_forward
from triton_gru.plan import selection
from triton_gru.plan.plan import COUNTER, POLLS, SENTINEL, Plan, Problem
from triton_gru.plan.planner import all_plans

REPEATS = 7
SHARED = "shared memory"


# -- peak rates -------------------------------------------------------------------------------


def copy_rate(device: torch.device, clock, tiny: bool) -> dict:
    """Bytes read and written per second by one large copy on the device."""
    elements = 1 << (10 if tiny else 31)  # 4 GiB in 16 bit, far more than any L2
    source = torch.empty(elements, dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    times = summary([measure([lambda: target.copy_(source)], clock, 0.2)])
    moved = 2 * source.numel() * source.element_size()
    return {**times, "bytes": moved, "GB_s": moved / times["median_ms"] / 1e6}


@triton.jit
def read_again(source, sums, elements, rounds, BLOCK: tl.constexpr):
    """Reads all of `source` `rounds` times, each program from its own place on, past L1."""
    offsets = tl.arange(0, BLOCK)
    at = tl.program_id(0) * BLOCK
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(rounds):
        total += tl.load(source + at + offsets, cache_modifier=".cg")
        at += tl.num_programs(0) * BLOCK
        at = tl.where(at + BLOCK > elements, tl.program_id(0) * BLOCK, at)
    tl.store(sums + tl.program_id(0) * BLOCK + offsets, total)


def l2_rate(device: torch.device, clock, tiny: bool) -> dict:
    """Bytes read per second of 16 MiB that stay in L2, by four programs a multiprocessor."""
    block, rounds = (64, 3) if tiny else (4096, 512)
    limits = selection.device_limits(device)
    programs = 2 if tiny else 4 * limits.multiprocessors
    elements = programs * block * max(1, (2**22) // (programs * block))
    source = torch.ones(elements, device=device)
    sums = torch.empty(programs * block, device=device)

    def call() -> None:
        read_again[(programs,)](source, sums, elements, rounds, BLOCK=block, num_warps=4)

    times = summary([measure([call], clock, 0.2)])
    if not (sums == rounds).all():
        raise RuntimeError("a read of L2 was wrong")
    moved = programs * block * 4 * rounds
    return {**times, "bytes": moved, "GB_s": moved / times["median_ms"] / 1e6}


def shared_rate(device: torch.device, clock, tiny: bool) -> dict:
    """Bytes read per second of shared memory, by two programs on every multiprocessor."""
    from benchmarks.shared_memory import read_shared  # Gluon, which the interpreter has not

    size, rounds = (1024, 7) if tiny else (4096, 1 << 14)
    programs = 2 if tiny else 2 * selection.device_limits(device).multiprocessors
    sums = torch.empty(programs * size, device=device)

    def call() -> None:
        read_shared[(programs,)](sums, rounds, SIZE=size, num_warps=8)

    times = summary([measure([call], clock, 0.2)])
    if not (sums == rounds).all():
        raise RuntimeError("a read of shared memory was wrong")
    moved = programs * size * 4 * rounds
    return {**times, "bytes": moved, "GB_s": moved / times["median_ms"] / 1e6}


def product_rate(device: torch.device, clock, tiny: bool, dtype: torch.dtype) -> dict:
    """Floating-point operations per second of one large matrix product on random data."""
    size = 32 if tiny else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        times = summary([measure([lambda: a @ b], clock, 0.2)])
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
    return {**times, "size": size, "TFLOP_s": 2 * size**3 / times["median_ms"] / 1e9}


# -- the exchange alone -----------------------------------------------------------------------


@triton.jit
def exchange_kernel(
    buffer,
    counters,
    error,
    out,
    steps,
    polls,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    SPAN: tl.constexpr,
    PROTOCOL: tl.constexpr,
):
    """Programs that only exchange WIDTH words per step.

    A step's value is 1, plus a quarter of the program's own last value, plus a quarter of the mean
    over all: it converges to 2, unless a word is missed.
    """
    member = tl.program_id(0)
    own = member * WIDTH + tl.arange(0, WIDTH)
    K: tl.constexpr = GROUP * WIDTH
    value = tl.zeros([WIDTH], tl.float32)
    for t in range(steps):
        publish(buffer + t * K + own, value, own < K, PROTOCOL)
        announce(counters, PROTOCOL)
        # fmt: off
        tiles, late = receive(buffer + t * K, 0, 0, buffer, 0, member >= 0, K,
                              counters, GROUP * (t + 1), polls, BLOCKS=1, EXTRA=0, BLOCK_K=SPAN,
                              K_BLOCKS=1, TAIL=SPAN, WORD=1, PROTOCOL=PROTOCOL)
        # fmt: on
        report(error, late, member, t)
        value = 1.0 + 0.25 * value + tl.sum(unpack(tiles[0], tl.float32)) * (0.25 / K)
    tl.store(out + own, value)


# Columns that a program of the usual group plan owns.
WIDTH = 16


def exchange_step(device: torch.device, protocol: str, group: int, steps: int) -> Callable:
    """A call that launches `exchange_kernel` on fresh buffers, and a check of the result."""
    buffer = torch.empty(steps, group * WIDTH, device=device)
    words = torch.zeros(64, dtype=torch.int32, device=device)
    out = torch.empty(group * WIDTH, device=device)

    def prepare() -> None:
        buffer.view(torch.int32).fill_(-1)
        words.zero_()

    def launch() -> None:
        exchange_kernel[(group,)](
            buffer,
            words[32:],
            words,
            out,
            steps,
            POLLS,
            GROUP=group,
            WIDTH=WIDTH,
            SPAN=triton.next_power_of_2(group * WIDTH),
            PROTOCOL=launches.PROTOCOLS[protocol],
            num_warps=4,
            launch_cooperative_grid=group > 1,
        )

    def right() -> bool:
        expected = 0.0
        for _ in range(steps):
            expected = 1 + 0.5 * expected
        return bool((out - expected).abs().max() < 1e-4) and not bool(words[:2].any())

    return prepare, launch, right


def exchange_latency(device: torch.device, clock, tiny: bool, protocol: str) -> dict:
    """Microseconds per step against the number of programs that exchange.

    Computed from the difference between a long and a short launch, without the launch itself.
    """
    limits = selection.device_limits(device)
    groups = (2, 3) if tiny else (2, 4, 8, 16, 32, 48, 64, 96, limits.resident_programs)
    short, long = (1, 3) if tiny else (256, 2048)
    rows = []
    for group in groups:
        medians = {}
        for steps in (short, long):
            prepare, launch, right = exchange_step(device, protocol, group, steps)
            times = []
            for _ in range(1 if tiny else REPEATS):
                prepare()
                times += _timed_alone(launch, device, clock)
            if not right():
                raise RuntimeError(f"{protocol}, {group} programs: words were missed or late")
            medians[steps] = quantile(times, 0.5)
        step_us = 1e6 * (medians[long] - medians[short]) / (long - short)
        rows.append({"programs": group, "step_us": step_us, "launch_ms": 1e3 * medians[short]})
    return {"protocol": protocol, "width": WIDTH, "rows": rows}


def _timed_alone(call: Callable[[], object], device: torch.device, clock) -> list[float]:
    if device.type != "cuda":
        return clock.seconds([call])
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(500_000)  # the host issues all calls while this runs
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3]


# -- kernels against their predictions --------------------------------------------------------

# (T, B, H, dtype, reset_after): one plan each, forward and backward.
KERNELS = [
    (1024, 16, 768, "bfloat16", True),
    (512, 64, 1024, "bfloat16", True),
    (512, 16, 64, "bfloat16", True),
    (512, 16, 128, "bfloat16", True),
    (512, 1, 256, "bfloat16", True),
    (512, 16, 256, "bfloat16", True),
    (512, 16, 512, "bfloat16", True),
    (512, 16, 1024, "bfloat16", True),
    (512, 128, 1024, "bfloat16", True),
    (512, 16, 2048, "bfloat16", True),
    (512, 16, 768, "bfloat16", False),
    (512, 16, 768, "tf32", True),
    (512, 16, 64, "float32", True),
]
# Shapes for which the next best plans are measured too.
RIVALS = [(512, 16, 768, "bfloat16", True), (512, 64, 1024, "bfloat16", True)]
MOST_RIVALS = 6
TINY = [(2, 2, 20, "bfloat16", True), (2, 2, 40, "float32", False)]
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "tf32": torch.float32,
    "float32": torch.float32,
}


def kernels(device: torch.device, clock, tiny: bool, rivals: bool) -> dict:
    """Measured time of each scan's launches, with lower bound and estimate of its plan."""
    rows = []
    for shape in (TINY[:1] if rivals else TINY) if tiny else (RIVALS if rivals else KERNELS):
        for direction in ("forward", "backward"):
            rows += _kernel_rows(device, clock, shape, direction, tiny, rivals)
    return {"rows": rows}


def _kernel_rows(device, clock, shape, direction: str, tiny: bool, rivals: bool) -> list[dict]:
    T, B, H, name, reset_after = shape
    dtype = DTYPES[name]
    g = torch.Generator(device).manual_seed(0)

    def normal(*sizes, scale=1.0):
        return (torch.randn(*sizes, generator=g, device=device) * scale).to(dtype)

    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = name != "float32"
    try:
        arguments = [normal(T, B, 1, 3 * H), normal(1, B, H), normal(1, 3 * H, H, scale=H**-0.5)]
        arguments.append(normal(1, 3 * H))
        problem = Problem(
            batch=B,
            hidden=H,
            dtype=selection.DTYPES[dtype],
            reset_after=reset_after,
            direction=direction,
            tensor_cores=name != "float32",
        )
        y = scan_forward(*arguments, reset_after=reset_after)
        dy = torch.randn_like(y)

        def call(plan: Plan) -> object:
            if direction == "forward":
                return scan_forward(*arguments, reset_after=reset_after, plan=plan)
            return scan_backward(dy, y, *arguments, reset_after=reset_after, plan=plan)

        plans = all_plans(problem, selection.device_limits(device))
        rows = []
        for plan in plans[1 : 2 if tiny else 1 + MOST_RIVALS] if rivals else plans[:1]:
            row = {"T": T, "B": B, "H": H, "dtype": name, "reset_after": reset_after}
            row |= {"direction": direction, "plan": dataclasses.asdict(plan)}
            rows.append(row)
            try:
                times = kernel_seconds(functools.partial(call, plan), device, 1 if tiny else 5)
                row["step_us"] = 1e6 * quantile(times, 0.5) / T
            except Exception as error:
                row["failed"] = f"{type(error).__name__}: {error}"
                clock.synchronize()  # raises if the context is lost, which ends the probe
        return rows
    finally:
        torch.backends.cudnn.allow_tf32 = before


def compile_kernels(shape: tuple, direction: str, rivals: bool, device: torch.device) -> None:
    """Launches everything that `kernels` will time, so that it is compiled."""
    from benchmarks.timing import clock_for

    _kernel_rows(device, clock_for(device), shape, direction, False, rivals)


PROBES: dict[str, Callable] = {
    "copy": copy_rate,
    "L2": l2_rate,
    SHARED: shared_rate,
    "product bfloat16": functools.partial(product_rate, dtype=torch.bfloat16),
    "product tf32": functools.partial(product_rate, dtype=torch.float32),
    "exchange sentinel": functools.partial(exchange_latency, protocol=SENTINEL),
    "exchange counter": functools.partial(exchange_latency, protocol=COUNTER),
    "kernels": functools.partial(kernels, rivals=False),
    "rival plans": functools.partial(kernels, rivals=True),
}
