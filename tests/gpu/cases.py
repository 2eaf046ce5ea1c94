"""Problems on the device, plans for it, and how far from float64 a result may lie."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.gpu.conftest import CUDA
from tests.interpreter.cases import NAMES, Case, make_case
from tests.tolerances import GPU_SINGLE, GPU_TOLERANCE
from triton_gru.kernels.backward import scan_backward
from triton_gru.kernels.forward import scan_forward
from triton_gru.plan import selection
from triton_gru.plan.plan import Plan, Problem
from triton_gru.plan.planner import all_plans

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
    """The best plan of a launch, "single" or a protocol of the group kernels; skips without one."""
    gates_x, h0 = case.arguments[:2]
    problem = Problem(
        batch=gates_x.shape[1],
        hidden=h0.shape[-1],
        dtype=selection.DTYPES[gates_x.dtype],
        reset_after=case.options["reset_after"],
        direction=direction,
        directions=h0.shape[0],
        tensor_cores=tf32,
    )
    limits = selection.device_limits(DEVICE)
    for plan in all_plans(problem, limits):
        if launch == (plan.protocol if plan.group > 1 else "single"):
            return plan
    pytest.skip(f"no plan of kind {launch!r} on {limits.name} for {problem}")


def compute(case: Case, plans: dict[str, Plan | None], save_gates: bool = False) -> dict:
    """y and the gradients by their names, as the kernels compute them."""
    y = scan_forward(*case.arguments, **case.options, save_gates=save_gates, plan=plans["forward"])
    saved = {}
    if save_gates:
        y, saved["gates_h"] = y
    grads = scan_backward(
        case.dy, y, *case.arguments, **case.options, **saved, plan=plans["backward"]
    )
    found = {name: grad for name, grad in zip(NAMES, grads, strict=True) if grad is not None}
    return {"y": y, **found}


def errors(results: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    """For each name the error of the whole, and the largest one; NaN stays NaN."""
    assert results.keys() == exact.keys()
    found = {}
    for name, truth in exact.items():
        assert results[name].shape == truth.shape, (name, results[name].shape, truth.shape)
        difference = results[name].detach().double() - truth
        whole = difference.norm() / truth.norm().clamp_min(1e-30)
        largest = difference.abs().max() / truth.abs().max().clamp_min(1e-30)
        found[name] = whole.item(), largest.item()
    return found


def assert_near(results: dict[str, Tensor], exact: dict[str, Tensor], name: str) -> None:
    """Every result within the tolerance of a dtype."""
    limit = GPU_TOLERANCE[name]
    late = {
        key: (whole, largest)
        for key, (whole, largest) in errors(results, exact).items()
        if not (whole <= limit and largest <= GPU_SINGLE * limit)
    }
    assert not late, f"(whole, largest) above ({limit}, {GPU_SINGLE * limit}): {late}"


def assert_exact_enough(case: Case, plans: dict, name: str, **options) -> None:
    """Runs the kernels and compares every result with float64."""
    results = compute(case, plans, **options)
    y, grads = case.exact()
    assert_near(results, {"y": y, **grads}, name)


def bits(tensor: Tensor) -> Tensor:
    """For comparisons under which NaN equals itself."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(kinds[tensor.element_size()])
