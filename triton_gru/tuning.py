"""Plans that were measured on the user's own device, remembered between runs.

`tune` times the few plans that the arithmetic of `costs.py` likes best and writes the fastest to a
file; `planned` is what every launch asks, and takes the remembered plan where there is one. A
choice is kept by device, versions and shape class, never by the exact batch or sequence length.
"""

import functools
import logging
import statistics
from collections.abc import Callable
from typing import Any

import torch

from triton_gru.plan import tuned
from triton_gru.plan.plan import Plan, Problem
from triton_gru.plan.planner import all_plans

log = logging.getLogger(__name__)


def tune(
    hidden_size: int,
    batch_size: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    reset_after: bool = True,
    bidirectional: bool = False,
    steps: int = 256,
    candidates: int = 6,
    device: torch.device | str = "cuda",
    timer: Callable[[Callable[[], object]], float] | None = None,
) -> dict[str, list[tuple[Plan, float]]]:
    """Time the best few plans of one layer's scans on a device and remember the fastest.

    Args:
        hidden_size: H.
        batch_size: B; the choice serves all batches of the same class (`shape_class`).
        dtype: float32, bfloat16 or float16.
        reset_after: The variant.
        bidirectional: Whether both directions run.
        steps: T of the timed sequences; long enough that a launch does not count.
        candidates: How many plans to time, best estimate first.
        device: A CUDA device.
        timer: Seconds that a call takes; None for the median of CUDA events.

    Returns:
        For "forward" and "backward" the plans that were timed and their microseconds per step,
        fastest first. What failed to launch is left out, with a warning.

    Raises:
        RuntimeError: There is no CUDA device.
        DoesNotFit: No kernel takes this shape.
    """
    from triton_gru.kernels.backward import scan_backward
    from triton_gru.kernels.forward import scan_forward
    from triton_gru.plan import selection

    device = torch.device(device)
    if timer is None:
        if device.type != "cuda" or not torch.cuda.is_available():
            raise RuntimeError(f"tune measures on a CUDA device and there is none at {device}")
        timer = median_of_events
    limits = selection.device_limits(device)
    D = 2 if bidirectional else 1
    make = functools.partial(torch.randn, device=device, dtype=dtype)
    scale = hidden_size**-0.5
    gates_x, h0 = make(steps, batch_size, D, 3 * hidden_size), make(D, batch_size, hidden_size)
    scan = (gates_x, h0, make(D, 3 * hidden_size, hidden_size) * scale, make(D, 3 * hidden_size))
    dy = make(steps, batch_size, D, hidden_size)
    y: Any = scan_forward(*scan, reset_after=reset_after)
    calls = {
        "forward": lambda plan: scan_forward(*scan, reset_after=reset_after, plan=plan),
        "backward": lambda plan: scan_backward(dy, y, *scan, reset_after=reset_after, plan=plan),
    }
    results = {}
    for direction, call in calls.items():
        problem = Problem(
            batch_size,
            hidden_size,
            selection.DTYPES[dtype],
            reset_after,
            direction,
            D,
            tensor_cores=selection.matrix_precision(dtype) != "ieee",
        )
        timed = []
        for plan in all_plans(problem, limits)[:candidates]:
            try:
                timed.append((plan, timer(functools.partial(call, plan)) / steps * 1e6))
            except RuntimeError as error:  # a plan that this compiler or device refuses
                log.warning("a plan was left out: %s (%s)", error, plan.describe())
        results[direction] = sorted(timed, key=lambda found: found[1])
        if timed:
            tuned.remember(problem, limits, results[direction][0][0])
    return results


def median_of_events(call: Callable[[], object], repeats: int = 10) -> float:
    """Seconds that a call takes on the current stream, after two that are not counted."""
    for _ in range(2):
        call()
    seconds = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(seconds)
