"""The device under test: what `tests.scan_cases` makes put there, and plans for it."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.gpu.conftest import CUDA
from tests.scan_cases import Case, make_case, plans_of
from triton_gru.plan import selection
from triton_gru.plan.plan import Plan

DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def size(full: int, tiny: int) -> int:
    """A size on a GPU, and what stands for it in the interpreter."""
    return full if CUDA else tiny


@contextlib.contextmanager
def precision(name: str) -> Iterator[torch.dtype]:
    """float32 products as `name` says, for torch's products, cuDNN and the kernels alike."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = name != "float32"
    try:
        yield DTYPES[name]
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def case_on_device(*shape: int, **options) -> Case:
    """`make_case`, on the device."""
    case = make_case(*shape, **options)
    case.arguments = [None if a is None else a.to(DEVICE) for a in case.arguments]
    case.options = {
        k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in case.options.items()
    }
    case.dy = case.dy.to(DEVICE)
    return case


def plan_for(case: Case, direction: str, launch: str, tf32: bool = True) -> Plan:
    """The best plan of a launch (`scan_cases.launch_of`); skips without one."""
    limits = selection.device_limits(DEVICE)
    for plan in plans_of(case, direction, launch, limits, tf32):
        return plan
    pytest.skip(f"no plan of kind {launch!r} on {limits.name} for {case.arguments[0].shape}")


def bits(tensor: Tensor) -> Tensor:
    """For comparisons under which NaN equals itself."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(kinds[tensor.element_size()])
