"""Whether the kernels can run here, and the plan for tensors on a device."""

import dataclasses
import functools
import os
from typing import Any

import torch
import triton
from torch import Tensor

from triton_gru.plan.devices import DEVICES, Device, describe, for_triton
from triton_gru.plan.plan import Plan, Problem
from triton_gru.plan.planner import DoesNotFit, best_plan
from triton_gru.plan.tuned import planned

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def obstacle(
    *,
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int,
    hidden_size: int,
    reset_after: bool,
    directions: int = 1,
) -> str | None:
    """Why the kernels cannot run this, as the end of a sentence, or None when they can."""
    if dtype not in DTYPES:
        return f"the kernels compute float32, bfloat16 and float16, not {dtype}"
    if device.type == "cuda" and torch.version.hip is not None:
        # A volatile load may be hoisted out of its loop there (triton#11223): an infinite wait.
        return "the kernels are not enabled on AMD GPUs"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the kernels need compute capability 8.0 or newer"
    for direction in ("forward", "backward"):
        problem = Problem(
            batch_size,
            hidden_size,
            DTYPES[dtype],
            reset_after,
            direction,
            directions,
            tensor_cores=matrix_precision(dtype) != "ieee",
        )
        try:
            best_plan(problem, device_limits(device))
        except DoesNotFit as error:
            return str(error)
    return None


def device_limits(device: torch.device) -> Device:
    """The plan's description of a device; the reference GPU for a CPU (the interpreter).

    Its multiprocessors are those that the kernels may use, see `_budget`.
    """
    limits = whole_device(device)
    return dataclasses.replace(limits, multiprocessors=_budget(limits.multiprocessors, device))


# The SMs of NCCL unless NCCL_MAX_CTAS is set: a program per channel, 32 at most (its manual).
NCCL_PROGRAMS = 32


def _budget(multiprocessors: int, device: torch.device) -> int:
    """How many multiprocessors a launch may fill.

    The programs of a group wait for each other, so all must be resident, and a launch waits until
    they are. It waits for ever if kernels that occupy a multiprocessor wait for this process
    themselves, as NCCL's may. TRITON_GRU_SM_BUDGET is the number to use; without it all, except
    that with NCCL initialised those that it may use are left to it.

    Raises:
        ValueError: The variable is not a number from 1 on.
    """
    asked = os.environ.get("TRITON_GRU_SM_BUDGET")
    if asked is not None:
        if not asked.strip().isdecimal() or int(asked) < 1:
            raise ValueError(
                "TRITON_GRU_SM_BUDGET should be a number of multiprocessors from 1 on, got: "
                f"{asked!r}"
            )
        return min(int(asked), multiprocessors)
    if device.type == "cuda" and _nccl_is_initialized():
        left = int(os.environ.get("NCCL_MAX_CTAS") or NCCL_PROGRAMS)
        return max(1, multiprocessors - left)
    return multiprocessors


def _nccl_is_initialized() -> bool:
    dist = torch.distributed
    return dist.is_available() and dist.is_initialized() and "nccl" in str(dist.get_backend())


@functools.cache
def whole_device(device: torch.device) -> Device:
    """As `device_limits`, with every multiprocessor that the device has."""
    if device.type != "cuda":
        # Triton's interpreter does not run Gluon.
        return dataclasses.replace(for_triton(DEVICES[90], triton.__version__), gluon=False)
    properties: Any = torch.cuda.get_device_properties(device)
    found = describe(
        name=properties.name,
        capability=10 * properties.major + properties.minor,
        multiprocessors=properties.multi_processor_count,
        shared_bytes=properties.shared_memory_per_block_optin,
    )
    return for_triton(found, triton.__version__)


def plan_scan(
    gates_x: Tensor, h0: Tensor, *, reset_after: bool, direction: str, precision: str = "tf32"
) -> Plan:
    """The plan for `scan_forward` or `scan_backward`, used if none is given.

    Raises:
        DoesNotFit: No kernel takes this shape.
    """
    problem = Problem(
        batch=gates_x.shape[1],
        hidden=h0.shape[-1],
        dtype=DTYPES[gates_x.dtype],
        reset_after=reset_after,
        direction=direction,
        directions=h0.shape[0],
        tensor_cores=precision != "ieee",
    )
    return planned(problem, device_limits(gates_x.device))


def matrix_precision(dtype: torch.dtype) -> str:
    """How float32 products are rounded, following `torch.backends.cudnn.allow_tf32` as nn.GRU."""
    return "ieee" if dtype == torch.float32 and not torch.backends.cudnn.allow_tf32 else "tf32"
