"""Clocks, repeats and quantiles for timing a call."""

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence

import torch

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
WARM_UPS = 3
LEAST_REPEATS, MOST_REPEATS = 10, 200


class WallClock:
    """Times calls on a CPU, where a call has ended when it returns."""

    name = "perf_counter"

    def seconds(self, calls: Sequence[Callable[[], object]]) -> list[float]:
        times = []
        for call in calls:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return times

    def synchronize(self) -> None:
        pass

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        call()
        return None


class CudaClock:
    """Times calls with events on the current stream, without waiting between them.

    So a call that keeps the GPU busy is timed alone, and for one that the host cannot issue fast
    enough the time is the host's.
    """

    name = "CUDA events"

    def seconds(self, calls: Sequence[Callable[[], object]]) -> list[float]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
        torch.cuda.synchronize()
        events[0].record()
        for call, event in zip(calls, events[1:], strict=True):
            call()
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        """Peak memory of a call in bytes, beyond the memory in use before it."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def clock_for(device: torch.device) -> WallClock | CudaClock:
    return CudaClock() if device.type == "cuda" else WallClock()


def measure(
    calls: Sequence[Callable[[], object]], clock, seconds: float, least: int = LEAST_REPEATS
) -> list[float]:
    """Seconds of each repeat, warmed up.

    Args:
        calls: The same work on different inputs, taken in turn.
        clock: WallClock or CudaClock.
        seconds: Total time of the repeats.
        least: Minimum number of repeats; MOST_REPEATS is the maximum.
    """

    def turns(count: int) -> list[Callable[[], object]]:
        return [calls[i % len(calls)] for i in range(count)]

    clock.seconds(turns(1))  # compiles, allocates
    warm_ups = min(WARM_UPS, least)
    once = sorted(clock.seconds(turns(warm_ups)))[warm_ups // 2]
    repeats = min(MOST_REPEATS, max(least, math.ceil(seconds / max(once, 1e-9))))
    return clock.seconds(turns(repeats))


def quantile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between the order statistics, numpy's default."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def summary(rounds: Sequence[Sequence[float]]) -> dict:
    """Quantiles of all repeats in milliseconds, and the median of each round.

    The other implementations run between the rounds, so the medians of the rounds show how much two
    measurements of the same thing differ: smaller differences between implementations are noise.
    """
    every = [1e3 * value for values in rounds for value in values]
    named = {f"p{round(100 * q)}_ms": quantile(every, q) for q in QUANTILES}
    medians = [1e3 * quantile(values, 0.5) for values in rounds]
    return {
        "median_ms": named.pop("p50_ms"),
        **named,
        "min_ms": min(every),
        "round_medians_ms": medians,
        "repeats": len(every),
    }


@contextlib.contextmanager
def kernel_events() -> Iterator[list[tuple[torch.cuda.Event, torch.cuda.Event]]]:
    """A context that records two events around every launch of a scan, and collects them."""
    from triton_gru.kernels import launch

    launches, pairs = launch.launches, []

    def timed(*args):
        for grid_and_arguments in launches(*args):
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            yield grid_and_arguments  # the caller launches its kernel before it requests the next
            pair[1].record()
            pairs.append(pair)

    launch.launches = timed
    try:
        yield pairs
    finally:
        launch.launches = launches


# Cycles for which the GPU is kept busy while the host issues a call: about a millisecond.
HEAD_START = 2_000_000


def kernel_seconds(call: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Seconds of the scan's launches in a call on the device, without anything else.

    On a CPU, which has no events, of the whole call.
    """
    call()
    if device.type != "cuda":
        return WallClock().seconds([call] * repeats)
    with kernel_events() as pairs:
        for _ in range(repeats):
            torch.cuda._sleep(HEAD_START)
            call()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairs]
