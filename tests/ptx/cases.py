"""A scan or a step through the machine, with a plan that fits a test, against float64."""

import dataclasses
import functools

import torch
import triton

from tests.ptx import launching
from tests.scan_cases import NAMES, error, launch_of, make_case
from tests.tolerances import ptx_tolerance
from triton_gru import equations
from triton_gru.kernel_errors import check_errors
from triton_gru.kernels import backward, forward, step
from triton_gru.plan import selection
from triton_gru.plan.devices import DEVICES, for_triton
from triton_gru.plan.plan import Problem
from triton_gru.plan.planner import all_plans

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "ieee": torch.float32,
          "tf32": torch.float32}  # fmt: skip
PRECISIONS = tuple(DTYPES)
POLLS = 3000  # more than any order of the machine's takes, and soon over


@dataclasses.dataclass
class Outcome:
    """What a run yielded: its launches, its plans, and the error of each result."""

    launches: list
    plans: list
    errors: dict
    tolerance: float

    def wrong(self) -> dict:
        return {name: e for name, e in self.errors.items() if not e <= self.tolerance}


def plan_of(shape, direction, launch, arch, precision, reset_after, wanted):
    """The smallest plan with these values, or None; launch "best" is what the planner takes."""
    _, batch, hidden, directions = (*shape, 1)[:4]
    problem = Problem(
        batch, hidden, selection.DTYPES[DTYPES[precision]], reset_after, direction, directions,
        tensor_cores=precision != "ieee",
    )  # fmt: skip
    plans = all_plans(problem, for_triton(DEVICES[arch], triton.__version__))
    if launch == "best":
        return plans[0]
    if direction == "forward":
        wanted = {name: value for name, value in wanted.items() if name != "by_block"}
    plans = [
        p for p in plans
        if launch_of(p) == launch
        and all(getattr(p, name) == value for name, value in wanted.items())
    ]  # fmt: skip
    return min(plans, key=lambda p: (p.group * p.groups, p.estimate_us), default=None)


class Scan:
    """Forward and backward of one layer, to be run with several seeds.

    Args:
        shape: T, B, H and, for both directions, 2.
        precision: of PRECISIONS.
        launch: "single", "sentinel", "counter", "gluon" or "best".
        arch: to compile for.
        reset_after: the variant.
        lengths, resets, bias, not_finite: as `tests.scan_cases.make_case` has them.
        save_gates: whether the forward keeps the gates for the backward.
        wanted: values of the plan to look for.
        force: values of the plan to set.
        pieces: steps of a piece of time in the backward.
        case: to run instead of a random one.
        polls: looks after which a wait gives up.
        data: seed of the inputs.

    Attributes:
        plans: of the forward and the backward, or None where no plan is as wanted.
    """

    def __init__(self, shape, precision, launch, arch, reset_after, *, lengths=False, resets=False,
                 bias=True, save_gates=False, wanted=None, force=None, pieces=None,
                 not_finite=False, case=None, polls=POLLS, data=0):  # fmt: skip
        self.precision, self.arch, self.pieces, self.polls = precision, arch, pieces, polls
        self.save_gates, self.hidden = save_gates, shape[2]
        self._make_case = lambda: case or make_case(
            *shape, reset_after=reset_after, dtype=DTYPES[precision], bias=bias, lengths=lengths,
            resets=resets, seed=data, not_finite=not_finite,
        )  # fmt: skip
        plans = [
            plan_of(shape, direction, launch, arch, precision, reset_after, wanted or {})
            for direction in ("forward", "backward")
        ]
        self.plans = None
        if None not in plans:
            forced = [launch in ("best", launch_of(p)) for p in plans]
            self.plans = [
                dataclasses.replace(p, **(force or {})) if this else p
                for p, this in zip(plans, forced, strict=True)
            ]

    @functools.cached_property
    def case(self):
        return self._make_case()

    @functools.cached_property
    def exact(self):
        y, grads = self.case.exact()
        return {"y": y, **grads}

    def run(self, **machine):
        """An Outcome; `machine` is of `launching.emulated`."""
        case, polls = self.case, self.polls
        settings = _settings(self.precision, self.pieces)
        with settings, launching.emulated(self.arch, **machine) as launches:
            y = forward.scan_forward(
                *case.arguments, **case.options, save_gates=self.save_gates, plan=self.plans[0],
                polls=polls,
            )  # fmt: skip
            y, gates_h = y if self.save_gates else (y, None)
            grads = backward.scan_backward(
                case.dy, y, *case.arguments, **case.options, gates_h=gates_h, plan=self.plans[1],
                polls=polls,
            )  # fmt: skip
            check_errors(y.device)
        results = {"y": y, **dict(zip(NAMES, grads, strict=True))}
        errors = {name: error(results[name], exact) for name, exact in self.exact.items()}
        return Outcome(launches, self.plans, errors, ptx_tolerance(self.precision, self.hidden))

    def run_forward(self, **machine):
        """As `run`, of the forward alone."""
        case = self.case
        settings = _settings(self.precision, self.pieces)
        with settings, launching.emulated(self.arch, **machine) as launches:
            y = forward.scan_forward(
                *case.arguments, **case.options, plan=self.plans[0], polls=self.polls
            )
            check_errors(y.device)
        errors = {"y": error(y, self.exact["y"])}
        tolerance = ptx_tolerance(self.precision, self.hidden)
        return Outcome(launches, self.plans[:1], errors, tolerance)

    def run_backward(self, **machine):
        """As `run`, of the backward alone, from the exact y."""
        results = self.backward_results(**machine)
        errors = {name: error(grad, self.exact[name]) for name, grad in results.items()}
        tolerance = ptx_tolerance(self.precision, self.hidden)
        return Outcome(self.launches, self.plans[1:], errors, tolerance)

    def backward_results(self, **machine):
        """The gradients by name, from the exact y."""
        case, settings = self.case, _settings(self.precision, self.pieces)
        y = self.exact["y"].to(DTYPES[self.precision])
        with settings, launching.emulated(self.arch, **machine) as self.launches:
            grads = backward.scan_backward(
                case.dy, y, *case.arguments, **case.options, plan=self.plans[1], polls=self.polls
            )
            check_errors(y.device)
        return {name: g for name, g in zip(NAMES, grads, strict=True) if g is not None}


def run_scan(*arguments, seed=0, weak=True, apart=False, counting=False, **options):
    """`Scan(*arguments, **options)` run once, or None where no plan is as wanted."""
    scan = Scan(*arguments, **options)
    if scan.plans is None:
        return None
    return scan.run(seed=seed, weak=weak, apart=apart, counting=counting)


def run_step(B, H, precision, arch, reset_after, *, bias=True, data=0, **machine):
    """One step of a cell."""
    g = torch.Generator().manual_seed(data)
    shapes = ((B, 3 * H), (B, H), (3 * H, H), (3 * H,))
    gates_x, h, weight, b = (torch.randn(*s, generator=g).to(DTYPES[precision]) for s in shapes)
    arguments = [gates_x, h, (weight * H**-0.5).to(weight.dtype), b if bias else None]
    with _settings(precision, None), launching.emulated(arch, **machine) as launches:
        out = step.step(*arguments, reset_after=reset_after)
    exact = equations.step(*(None if a is None else a.double() for a in arguments), reset_after)
    return Outcome(launches, [], {"h": error(out, exact)}, ptx_tolerance(precision, H))


class _settings:
    """Precision of float32 products, and steps of a piece of time, as a test wants them."""

    def __init__(self, precision, pieces):
        self.tf32, self.pieces = precision == "tf32", pieces

    def __enter__(self):
        self.before = torch.backends.cudnn.allow_tf32, backward.PIECE_STEPS
        torch.backends.cudnn.allow_tf32 = self.tf32
        backward.PIECE_STEPS = self.pieces or self.before[1]

    def __exit__(self, *error):
        torch.backends.cudnn.allow_tf32, backward.PIECE_STEPS = self.before
