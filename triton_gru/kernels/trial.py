"""The least kernel there is: whether Triton can compile and launch one here at all."""

import torch
import triton
import triton.language as tl


@triton.jit
def _store_one(pointer):
    tl.store(pointer, 1)


def run(device: torch.device) -> None:
    """Runs a kernel on a device; raises what Triton raises where that fails."""
    result = torch.zeros(1, dtype=torch.int32, device=device)
    _store_one[(1,)](result)
    if result.item() != 1:
        raise RuntimeError("a kernel that stores a 1 did not")
