"""Metrics of a record: speed-ups, errors, lower bounds, noise, and the goals for them."""

import math
from collections.abc import Callable, Iterable

from benchmarks.suites import CUDNN, OURS

NAMES = {"bfloat16": "bf16", "float16": "fp16", "tf32": "tf32", "float32": "fp32"}
MODES = {"forward": "forward", "train": "forward + backward"}
# The cells of the goal for the mean speed-up.
GOAL_H, GOAL_B, GOAL_T = (256, 1024), (8, 128), 128


def median_ms(cell: dict, name: str) -> float | None:
    """An implementation's median in a cell, or None if it has none."""
    result = cell["results"].get(name, {})
    return result["median_ms"] if result.get("status") == "ok" else None


def speedup(cell: dict, over: str = CUDNN) -> float | None:
    """The speed-up of ours."""
    ours, theirs = median_ms(cell, OURS), median_ms(cell, over)
    return theirs / ours if ours and theirs else None


def geometric_mean(values: Iterable[float]) -> float | None:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def in_goal(cell: dict) -> bool:
    """Whether the goal of the mean speed-up includes the cell."""
    return (
        cell["mode"] == "train"
        and cell["dtype"] in ("bfloat16", "float16")
        and cell["lengths"] == "full"
        and cell["directions"] == 1
        and GOAL_H[0] <= cell["H"] <= GOAL_H[1]
        and GOAL_B[0] <= cell["B"] <= GOAL_B[1]
        and cell["T"] >= GOAL_T
    )


def speedups(record: dict, wanted: Callable[[dict], bool]) -> list[float]:
    every = (speedup(cell) for cell in record["cells"].values() if wanted(cell))
    return [value for value in every if value is not None]


def worst_error_ratio(cell: dict) -> float | None:
    """The largest ratio of our errors to nn.GRU's, over y and the gradients."""
    ours, theirs = (cell["results"].get(name, {}).get("error") for name in (OURS, CUDNN))
    if not ours or not theirs:
        return None
    ratios = [ours[k] / theirs[k] for k in ours.keys() & theirs.keys() if theirs[k] > 0]
    return max(ratios, default=None)


def lower_bound_us(cell: dict) -> float | None:
    """The lower bound of a step by the plans of a cell."""
    plans = cell["results"].get(OURS, {}).get("plans")
    return sum(plan["lower_bound_us"] for plan in plans.values()) if plans else None


def noise(cell: dict) -> float:
    """Largest distance between two rounds of one implementation, as a share."""
    shares = []
    for result in cell["results"].values():
        rounds = result.get("round_medians_ms", [])
        if rounds and min(rounds) > 0:
            shares.append(max(rounds) / min(rounds) - 1)
    return max(shares, default=0.0)


def goals(record: dict) -> list[tuple[str, float, str]]:
    """The goals for an H200, as (goal, measured, unit), where they were measured."""
    found = []
    half = [v for c in record["cells"].values() if is_half(c) and (v := speedup(c)) is not None]
    if half:
        found.append(
            ("smallest speed-up over nn.GRU, 16 bit (goal 1.0 under auto)", min(half), "x")
        )
    mean = geometric_mean(speedups(record, in_goal))
    if mean:
        found.append(("mean speed-up, H 256-1024, B 8-128, T >= 128 (goal 3)", mean, "x"))
    tf32 = geometric_mean(speedups(record, lambda c: c["dtype"] == "tf32" and c["mode"] == "train"))
    if tf32:
        found.append(("mean speed-up, tf32 (goal 2)", tf32, "x"))
    for mode, goal in (("forward", 1.5), ("train", 4.0)):
        cell = find_cell(record, T=1024, B=16, H=768, mode=mode, dtype="bfloat16", lengths="full")
        ours = cell and median_ms(cell, OURS)
        if ours:
            label = f"{MODES[mode]} per step at B16 H768, bf16, whole layer (goal {goal})"
            found.append((label, 1e3 * ours / cell["T"], "us"))
    for lengths in ("packed", "lengths"):
        shares = []
        for cell in record["cells"].values():
            full = cell["lengths"] == lengths and find_cell(
                record,
                **{k: cell[k] for k in ("T", "B", "H", "dtype", "mode", "reset_after")},
                directions=cell["directions"],
                lengths="full",
            )
            ours, padded = median_ms(cell, OURS), full and median_ms(full, OURS)
            if ours and padded:
                shares.append(ours / padded)
        if shares:
            label = f"variable length ({lengths}) over full length, worst (goal 1.2)"
            found.append((label, max(shares), "x"))
    memory = []
    for cell in record["cells"].values():
        peaks = [cell["results"].get(name, {}).get("peak_bytes") for name in (OURS, CUDNN)]
        if cell["mode"] == "train" and all(peaks):
            memory.append(peaks[0] / peaks[1])
    if memory:
        found.append(("peak memory over nn.GRU's, worst (goal 1)", max(memory), "x"))
    errors = [v for c in record["cells"].values() if (v := worst_error_ratio(c)) is not None]
    if errors:
        found.append(("error over nn.GRU's, worst (goal 1.5)", max(errors), "x"))
    return found


def is_half(cell: dict) -> bool:
    return cell["dtype"] in ("bfloat16", "float16")


def find_cell(record: dict, **wanted) -> dict | None:
    wanted = {"reset_after": True, "directions": 1} | wanted
    for cell in record["cells"].values():
        if all(cell[key] == value for key, value in wanted.items()):
            return cell
    return None
