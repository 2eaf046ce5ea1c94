"""The plan for a scan: the one measured fastest on this device, if `tune` has run, else the best.

`tune` writes the fastest plan to a file; every launch calls `planned`. A choice is stored by
device, versions and shape class, never by the exact batch size or sequence length.
"""

import functools
import hashlib
import json
import logging
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from triton_gru.cache import cache_directory, write_atomically
from triton_gru.plan.devices import Device
from triton_gru.plan.plan import Plan, Problem, padded_size
from triton_gru.plan.planner import all_plans, best_plan

log = logging.getLogger(__name__)

# The fields that distinguish plans for a shape; the rest of a plan follows from them.
# plans.json holds their values in this order without names, so a field may be renamed.
CHOICE = ("kernel", "block_m", "block_n", "warps", "protocol", "by_block")


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
    """The part of a problem that a stored choice depends on: the batch only to a power of two."""
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
    return _keys_of(device) + shape_class(problem)


def _keys_of(device: Device) -> str:
    """What the keys of a device begin with."""
    about = f"{device.name} sm_{device.capability} x{device.multiprocessors}"
    return f"{about} | {_versions()} | "


def fingerprint(device: Device) -> str:
    """Names the plans that `tune` found for a device; empty if it found none."""
    plans = {k: v for k, v in _read(_file()).items() if k.startswith(_keys_of(device))}
    text = json.dumps(plans, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12] if plans else ""


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
    """All stored choices. Read once per process: a launch must not wait for a disk."""
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


def remember(problem: Problem, device: Device, plan: Plan) -> None:
    """Stores a plan as the one that `planned` returns for this shape class and device."""
    path = _file()
    _read.cache_clear()  # another process may have added some
    plans = {**_read(path), _key(problem, device): _choice(plan)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(plans, indent=1).encode())
    _read.cache_clear()
