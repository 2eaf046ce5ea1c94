"""Common parts of the launches: arguments for the kernels, exchange buffers, grids."""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_gru.kernel_errors import LaunchRefused, error_words
from triton_gru.kernels import exchange
from triton_gru.plan.plan import COUNTER, MAX_REGISTERS, SENTINEL, Plan

PROTOCOLS = {
    SENTINEL: exchange.SENTINEL.value,
    COUNTER: exchange.COUNTER.value,
}
# int32 words between the counters of two groups: one line of L2 each.
COUNTER_STRIDE = 32
# CUDA's errors if a cooperative launch has more programs than it can keep resident.
REFUSALS = ("cooperative launch", "operation not supported")


def exchange_buffer(shape: tuple[int, ...], like: Tensor, fill: bool) -> Tensor:
    """Uninitialised, or, for the sentinel protocol, filled with its pattern "not yet written"."""
    buffer = torch.empty(shape, dtype=like.dtype, device=like.device)
    if fill:
        buffer.view(torch.int32 if like.dtype == torch.float32 else torch.int16).fill_(-1)
    return buffer


def never_the_sentinel(state: Tensor) -> Tensor:
    """The same values; NaNs of all ones, which torch's own conversions can make, made positive."""
    bits = state.view(torch.int32 if state.dtype == torch.float32 else torch.int16)
    return bits.masked_fill(bits == -1, torch.iinfo(bits.dtype).max).view(state.dtype)


def padded_weight(weight_hh: Tensor, padded: int, dtype: torch.dtype) -> Tensor:
    """[D, 3H, H] -> [D, 3, HP, HP], zero beyond H."""
    D, _, H = weight_hh.shape
    weight = weight_hh.to(dtype).reshape(D, 3, H, H)
    if padded != H:
        weight = F.pad(weight, (0, padded - H, 0, padded - H))
    return weight.contiguous()


def aligned(tensor: Tensor) -> Tensor:
    """The same values from a multiple of 16 bytes on, as the Gluon kernel's assembly loads them.

    A weight may be a view of a larger tensor and begin anywhere. (Triton asks for the alignment.)
    """
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def lengths_argument(lengths: Tensor | None, like: Tensor) -> Tensor:
    """As the kernels read it; any pointer if lengths is None."""
    return like if lengths is None else lengths.to(like.device, torch.int32).contiguous()


def resets_argument(resets: Tensor | None, like: Tensor) -> Tensor:
    """As `lengths_argument`; `tile.load_flags` requires 32 bits per flag, 3 bytes more each."""
    return like if resets is None else resets.to(like.device, torch.int32).contiguous()


def current(device: torch.device):
    """Makes a device current, so that the launch goes to its current stream."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def launching(plan: Plan, device: torch.device) -> Iterator[None]:
    """A context for the launches of a plan: on the device's current stream.

    Raises:
        LaunchRefused: The device does not hold the programs of a group at once.
    """
    try:
        with current(device):
            yield
    except RuntimeError as error:
        if plan.group == 1 or not any(text in str(error) for text in REFUSALS):
            raise
        programs = plan.group * plan.groups_a_launch
        raise LaunchRefused(
            f"{device} refused a cooperative launch of {programs} programs, one to a "
            f"multiprocessor: {error}. Is the device shared (MPS, MIG, green contexts)? "
            "TRITON_GRU_SM_BUDGET=n limits the kernels to n multiprocessors; backend='torch' does "
            "without"
        ) from error


def launches(
    plan: Plan, device: torch.device, polls: int
) -> Iterator[tuple[tuple[int], dict[str, object]]]:
    """The launches of a scan: the grid, and the arguments that follow from the plan."""
    words = error_words(device)
    counters = words
    if plan.group > 1 and plan.protocol == COUNTER:
        counters = torch.zeros(plan.groups * COUNTER_STRIDE, dtype=torch.int32, device=device)
    arguments = {
        "counters": counters,
        "error": words,
        "polls": polls,
        "BLOCK_M": plan.block_m,
        "BLOCK_N": plan.block_n,
        "BLOCK_K": plan.block_k,
        "K_BLOCKS": plan.k_blocks,
        "TAIL": plan.tail,
        "REGISTERS": plan.in_registers,
        "SPLIT_K": plan.split_k,
        "GROUP": plan.group,
        "STAGE_ALL": plan.stage_all,
        "PROTOCOL": PROTOCOLS[plan.protocol],
    }
    for grid, settings in grids(plan):
        yield grid, {**arguments, "num_stages": 1, **settings}


def grids(plan: Plan) -> Iterator[tuple[tuple[int], dict[str, object]]]:
    """The grid of each launch, its first group, and Triton's own options."""
    options = {
        "num_warps": plan.warps,
        "maxnreg": MAX_REGISTERS,
        "launch_cooperative_grid": plan.group > 1,
    }
    for first in range(0, plan.groups, plan.groups_a_launch):
        groups = min(plan.groups_a_launch, plan.groups - first)
        yield (groups * plan.group,), {"first_group": first, **options}
