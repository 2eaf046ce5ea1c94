"""Plans that were measured on the user's own device, remembered between runs.

`tune` times the few plans that the arithmetic of `costs.py` likes best and writes the fastest to a
file; `planned` is what every launch asks, and takes the remembered plan where there is one. A
choice is kept by device, versions and shape class, never by the exact batch or sequence length.
"""

import functools
import json
import logging
import os
import statistics
import uuid
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from triton_gru.cache import cache_directory
from triton_gru.devices import Device
from triton_gru.plan import Plan, Problem, padded_size
from triton_gru.planner import all_plans, best_plan

log = logging.getLogger(__name__)

# What tells one plan for a shape from another; the rest of a plan follows from these.
CHOICE = ("kernel", "rows", "columns", "warps", "protocol", "by_block")


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
        For "forward" and "backward" the plans that were timed and their microseconds a step,
        fastest first. What failed to launch is left out, with a warning.

    Raises:
        RuntimeError: There is no CUDA device.
        DoesNotFit: No kernel takes this shape.
    """
    from triton_gru.kernels import support
    from triton_gru.kernels.launch_backward import scan_backward
    from triton_gru.kernels.launch_forward import scan_forward

    device = torch.device(device)
    if timer is None:
        if device.type != "cuda" or not torch.cuda.is_available():
            raise RuntimeError(f"tune measures on a CUDA device and there is none at {device}")
        timer = _median_of_events
    limits = support.device_limits(device)
    D = 2 if bidirectional else 1
    make = functools.partial(torch.randn, device=device, dtype=dtype)
    scale = hidden_size**-0.5
    gates_x, h0 = make(steps, batch_size, D, 3 * hidden_size), make(D, batch_size, hidden_size)
    scan = (gates_x, h0, make(D, 3 * hidden_size, hidden_size) * scale, make(D, 3 * hidden_size))
    dy = make(steps, batch_size, D, hidden_size)
    y = scan_forward(*scan, reset_after=reset_after)
    calls = {
        "forward": lambda plan: scan_forward(*scan, reset_after=reset_after, plan=plan),
        "backward": lambda plan: scan_backward(dy, y, *scan, reset_after=reset_after, plan=plan),
    }
    results = {}
    for direction, call in calls.items():
        problem = Problem(
            batch_size,
            hidden_size,
            support.DTYPES[dtype],
            reset_after,
            direction,
            D,
            tensor_cores=support.matrix_precision(dtype) != "ieee",
        )
        timed = []
        for plan in all_plans(problem, limits)[:candidates]:
            try:
                timed.append((plan, timer(functools.partial(call, plan)) / steps * 1e6))
            except RuntimeError as error:  # a plan that this compiler or device refuses
                log.warning("a plan was left out: %s (%s)", error, plan.describe())
        results[direction] = sorted(timed, key=lambda found: found[1])
        if timed:
            _remember(problem, limits, results[direction][0][0])
    return results


def planned(problem: Problem, device: Device) -> Plan:
    """The plan for a scan: the one measured fastest on this device, else the best estimate.

    Raises:
        DoesNotFit: No kernel takes this shape.
    """
    choice = _remembered(_file(), _key(problem, device))
    for plan in all_plans(problem, device) if choice else ():
        if _choice(plan) == choice:
            return plan
    return best_plan(problem, device)


def shape_class(problem: Problem) -> str:
    """What of a problem a remembered choice depends on: the batch only to a power of two."""
    tiles = -(-problem.batch // 16)
    rows = 16 << (tiles - 1).bit_length()
    variant = "reset_after" if problem.reset_after else "reset_before"
    precision = "tensor_cores" if problem.tensor_cores else "ieee"
    size = padded_size(problem.hidden)
    return (
        f"{problem.direction} {variant} {problem.dtype} {precision} H{size} B{rows} "
        f"D{problem.directions}"
    )


def _choice(plan: Plan) -> list:
    return [getattr(plan, name) for name in CHOICE]


def _key(problem: Problem, device: Device) -> str:
    about = f"{device.name} sm_{device.capability} x{device.multiprocessors}"
    return f"{about} | {_versions()} | {shape_class(problem)}"


@functools.cache
def _versions() -> str:
    found = []
    for package in ("torch", "triton", "triton-gru"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} none")
    return ", ".join(found)


def _file() -> Path:
    return cache_directory() / "plans.json"


@functools.lru_cache
def _read(path: Path) -> dict[str, list]:
    """Everything remembered. Read once a process: a launch must not wait for a disk."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read (%s); plans come from arithmetic alone", path, error)
        return {}


def _remembered(path: Path, key: str) -> list | None:
    return _read(path).get(key)


def _remember(problem: Problem, device: Device, plan: Plan) -> None:
    path = _file()
    _read.cache_clear()  # what another process has added since
    plans = {**_read(path), _key(problem, device): _choice(plan)}
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not with tempfile, which makes files for their user alone whatever the umask.
    whole = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    whole.write_text(json.dumps(plans, indent=1), encoding="utf-8")
    os.replace(whole, path)
    _read.cache_clear()


def _median_of_events(call: Callable[[], object], repeats: int = 10) -> float:
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
