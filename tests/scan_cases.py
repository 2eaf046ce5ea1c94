"""Problems for the scan kernels, plans for them, and the comparison with float64.

Of the interpreter's tests, the GPU's and those of the compiled code. What runs on a GPU is measured
by the norm of its error too: large sizes have one element in thousands that lies far out.
"""

import dataclasses

import torch
from torch import Tensor

from tests import oracle
from tests.tolerances import GPU_SINGLE, GPU_TOLERANCE
from triton_gru.kernels.backward import scan_backward
from triton_gru.kernels.forward import scan_forward
from triton_gru.plan import selection
from triton_gru.plan.devices import DEVICES, Device
from triton_gru.plan.plan import COUNTER, GROUP, SENTINEL, Plan, Problem
from triton_gru.plan.planner import all_plans

LAUNCHES = ("single", SENTINEL, COUNTER)
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
NAMES = ("gates_x", "h0", "weight_hh", "bias_hh")


@dataclasses.dataclass
class Case:
    """The arguments of one scan, and what the loss passes to its result."""

    arguments: list[Tensor | None]
    options: dict
    dy: Tensor

    def exact(self) -> tuple[Tensor, dict[str, Tensor]]:
        """y and the gradients in float64, by autograd."""
        leaves = [None if a is None else a.double().requires_grad_() for a in self.arguments]
        y = oracle.scan(*leaves, **self.options)
        y.backward(self.dy.double())
        grads = {n: leaf.grad for n, leaf in zip(NAMES, leaves, strict=True) if leaf is not None}
        return y.detach(), grads


def make_case(
    T: int,
    B: int,
    H: int,
    D: int = 1,
    *,
    reset_after: bool,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    lengths: bool = False,
    resets: bool = False,
    seed: int = 0,
    not_finite: bool = False,
) -> Case:
    """Random arguments.

    `not_finite` puts infinities in the first row and the second, the NaN of the sentinel protocol
    in the third, and another one in the last, where there are so many.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g) * scale).to(dtype)

    arguments = [
        normal(T, B, D, 3 * H),
        normal(D, B, H),
        normal(D, 3 * H, H, scale=H**-0.5),
        normal(D, 3 * H) if bias else None,
    ]
    options = {"reset_after": reset_after}
    if lengths:
        options["lengths"] = torch.randint(0, T + 1, (B,), generator=g)
        options["lengths"][0] = T
    if resets:
        options["resets"] = torch.rand(T, B, D, generator=g) < 0.3
    dy = normal(T, B, D, H)
    if not_finite:
        gates_x, h0, weight = arguments[:3]
        gates_x[T // 2, B - 1, 0, 3 * H // 2] = torch.nan
        dy[T - 1, 0, 0, 0] = torch.inf
        if B > 1:
            gates_x[0, 0, 0, 3 * H - 1] = torch.inf
            h0[0, 1, 0] = -torch.inf
            # r = z = 1 there: the infinity stays one, and the row is not NaN at once.
            weight[0, [0, H], 0] = -weight[0, [0, H], 0].abs()
        if B > 2:
            h0[0, 2, 1 % H].view(BITS[dtype]).fill_(-1)
    return Case(arguments, options, dy)


def plans_of(
    case: Case, direction: str, launch: str, limits: Device, tf32: bool = True
) -> list[Plan]:
    """Every plan of a launch, see `launch_of`, the best one first."""
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
    return [p for p in all_plans(problem, limits) if launch == launch_of(p)]


def launch_of(plan: Plan) -> str:
    """ "single", "gluon", or the protocol of the Triton kernels for a group."""
    return plan.protocol if plan.kernel == GROUP else plan.kernel


def make_plan(case: Case, direction: str, launch: str, **wanted) -> Plan:
    """A plan of the launch asked for, with few programs, as the interpreter likes it."""
    plans = [
        plan
        for plan in plans_of(case, direction, launch, DEVICES[90])
        if all(getattr(plan, name) == value for name, value in wanted.items())
    ]
    return min(plans, key=lambda p: (p.group * p.groups, p.estimate_us))


def compute(
    case: Case, plans: dict[str, Plan | None], save_gates: bool = False
) -> dict[str, Tensor]:
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


def run(
    case: Case, launch: str, save_gates: bool = False, **backward_plan
) -> tuple[Tensor, dict[str, Tensor]]:
    """y and the gradients, by the plans of `make_plan`."""
    plans = {
        "forward": make_plan(case, "forward", launch),
        "backward": make_plan(case, "backward", launch, **backward_plan),
    }
    results = compute(case, plans, save_gates)
    return results.pop("y"), results


def error(result: Tensor, exact: Tensor) -> float:
    """Largest error as a share of the largest finite value of the exact result.

    NaN and infinities are compared cell by cell: the error is infinite where one stands on one side
    alone, or an infinity has the other sign.
    """
    assert result.shape == exact.shape, (result.shape, exact.shape)
    result, exact = result.double(), exact.double()
    finite = exact.isfinite()
    # nan_to_num keeps NaN and the two infinities apart.
    others = [values[~finite].nan_to_num() for values in (result, exact)]
    if not torch.equal(result.isfinite(), finite) or not torch.equal(*others):
        return float("inf")
    result, exact = result[finite], exact[finite]
    if not exact.numel():
        return 0.0
    return ((result - exact).abs().max() / exact.abs().max().clamp_min(1e-30)).item()


def assert_close(case: Case, launch: str, tolerance: float, **options) -> None:
    """Runs the kernels and compares every result."""
    y, grads = run(case, launch, **options)
    assert_within(tolerance, case, {"y": y, **grads})


def assert_within(tolerance: float, case: Case, results: dict[str, Tensor]) -> None:
    """Every result's largest `error` within a tolerance."""
    y, grads = case.exact()
    exact = {"y": y, **grads}
    assert results.keys() == exact.keys()
    late = {n: e for n in exact if not (e := error(results[n], exact[n])) <= tolerance}
    assert not late, f"above {tolerance}: {late}"


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
    y, grads = case.exact()
    assert_near(compute(case, plans, **options), {"y": y, **grads}, name)
