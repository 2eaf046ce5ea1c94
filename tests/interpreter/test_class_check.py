"""The check of a class, the interpreter for a device: kernels that are right, wrong or stuck."""

import re
import sys

import pytest
import torch

from tests.interpreter import harness
from tests.interpreter.checked_class import SECONDS, stub_clock
from tests.tolerances import assert_close
from triton_gru import class_check, dispatch
from triton_gru.kernels import backward, forward
from triton_gru.plan import selection
from triton_gru.plan.plan import POLLS, Problem
from triton_gru.plan.planner import all_plans
from triton_gru.verdicts import checks, deciding, measuring, store
from triton_gru.verdicts.environment import environment
from triton_gru.verdicts.measuring import MODES
from triton_gru.verdicts.shapes import SHORT, ShapeClass

CPU = torch.device("cpu")
SHAPE = ShapeClass(True, "float32", 5, 1, 2)


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_GRU_CACHE", str(tmp_path))
    monkeypatch.setattr(class_check, "STEPS", 4)
    for known in (store._here, store._warned, deciding._decided):
        known.clear()
    store._valid.cache_clear()


def failure(shape=SHAPE):
    found = class_check.checked(shape, CPU, stub_clock)
    assert len({verdict.failure for verdict in found.values()}) == 1
    return found["training"].failure


@pytest.mark.parametrize(
    "shape",
    [
        SHAPE,
        ShapeClass(False, "tf32", 20, 1, 4),
        ShapeClass(True, "bfloat16", 33, 2, 1),
        ShapeClass(False, "float16", 7, 2, 2),
    ],
    ids=lambda shape: shape.describe(),
)
def test_kernels_that_are_right_are_timed(shape):
    found = class_check.checked(shape, CPU, stub_clock)
    assert set(found) == set(MODES)
    other = SECONDS["torch" if shape.reset_after else "reference"]
    for verdict in found.values():
        assert verdict.failure is None and verdict.from_steps == SHORT
        assert verdict.kernel_step_us == pytest.approx(1e6 * SECONDS["triton"])
        assert verdict.other_step_us == pytest.approx(1e6 * other)


def test_kernels_that_are_slow_are_not_taken(monkeypatch):
    monkeypatch.setitem(SECONDS, "triton", 1.85e-3)  # cuDNN's 2e-3 is a little more
    found = class_check.checked(SHAPE, CPU, stub_clock)
    assert [v.from_steps for v in found.values()] == [None, None]
    assert deciding.judged(SHAPE, True, {SHAPE.key(True): found["training"]}).passed


def changed(monkeypatch, module, name, change):
    """Lets a scan's result pass through `change`, with the number of its call."""
    scan, calls = getattr(module, name), []

    def scan_and_change(*args, **kwargs):
        calls.append(1)
        return change(scan(*args, **kwargs), len(calls), kwargs)

    monkeypatch.setattr(module, name, scan_and_change)


@pytest.mark.parametrize("which", range(4))
def test_a_gradient_that_is_wrong(which, monkeypatch):
    def spoil(grads, call, options):
        grads[which].view(-1)[-1].add_(0.01)
        return grads

    changed(monkeypatch, backward, "scan_backward", spoil)
    name = ("d_gates_x", "dh0", "dweight_hh", "dbias_hh")[which]
    assert failure().startswith(f"wrong {name} (seed")


def test_states_that_are_wrong_with_lengths_alone(monkeypatch):
    def spoil(result, call, options):
        if options.get("lengths") is not None:
            result[0][-1, -1, -1, -1] += 0.01
        return result

    changed(monkeypatch, forward, "scan_forward", spoil)
    assert failure().startswith("wrong y with lengths and resets")


def test_one_element_that_is_wrong(monkeypatch):
    """By what the norm of all leaves unseen."""

    def spoil(y, call, options):
        y[1, 0, 0, 3] += 0.06
        return y

    changed(monkeypatch, forward, "scan_forward", spoil)
    found = failure(ShapeClass(True, "float16", 20, 1, 16))
    whole, largest = map(float, re.findall(r"\d\.\de-\d+", found)[:2])
    assert found.startswith("wrong y") and whole < 4e-3 < 8e-3 < largest


def test_nan_is_wrong(monkeypatch):
    changed(monkeypatch, forward, "scan_forward", lambda y, call, options: y * torch.nan)
    assert failure().startswith("wrong y")


def test_bits_that_differ_between_two_runs(monkeypatch):
    def spoil(y, call, options):
        return y * (1 + 2**-23) if call == 2 else y

    changed(monkeypatch, forward, "scan_forward", spoil)
    assert "differs between two runs" in failure()


def test_an_error_is_a_failure(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("PassManager::run\nfailed")

    monkeypatch.setattr(backward, "scan_backward", refuse)
    assert failure() == "RuntimeError: PassManager::run failed"


def test_too_little_memory_is_none(monkeypatch):
    def refuse(*args, **kwargs):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(forward, "scan_forward", refuse)
    with pytest.raises(torch.OutOfMemoryError):
        failure()


class LastProgramMissing:
    """A kernel whose grid is one program short: the others wait for what it would publish."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.kernel[(grid[0] - 1, *grid[1:])]


def test_a_wait_that_never_ends_is_given_up_soon(monkeypatch):
    assert class_check.POLLS < POLLS
    monkeypatch.setattr(class_check, "POLLS", 10)
    monkeypatch.setattr(
        forward, "scan_forward_kernel", LastProgramMissing(forward.scan_forward_kernel)
    )
    monkeypatch.setattr(forward, "plan_scan", of_two_programs)
    with harness.interleaving(0, detect=False):
        assert failure(ShapeClass(True, "float32", 20, 1, 2)).startswith("KernelTimeout: program")


def of_two_programs(gates_x, h0, **options):
    """A plan in which one waits for the other, which the best one for so small a layer is not."""
    problem = Problem(gates_x.shape[1], h0.shape[-1], "float32", True, tensor_cores=False)
    plans = all_plans(problem, selection.device_limits(gates_x.device))
    return next(plan for plan in plans if plan.group == 2)


def measure(kind):
    command = (sys.executable, "-m", "tests.interpreter.checked_class", kind)
    return lambda shape, device: measuring.measure(shape, device, command=command)


def test_from_a_process_of_its_own_to_what_auto_takes(monkeypatch):
    """The whole path: nothing is injected here but the device and the clock."""
    monkeypatch.setattr(dispatch, "_needs_verdict", lambda device: True)
    layer = class_check.GRU(3, SHAPE.hidden)
    x = torch.randn(SHORT, SHAPE.batch, 3)
    assert "have not been measured" in layer.explain(x)
    ((_, outcome),) = checks.measured([SHAPE], CPU, measure("passes"))
    assert outcome.failure is None and outcome.obstacle == ""
    store._here.clear()  # as another process, which reads the file
    assert "Backend 'triton' will run: measured on this GPU" in layer.explain(x)
    with harness.interleaving(0) as runs:
        layer(x)
    assert runs[0].kernels == ["scan_forward_kernel"]


def test_a_compiled_layer_follows_the_verdicts(monkeypatch):
    monkeypatch.setattr(dispatch, "_needs_verdict", lambda device: True)
    found = class_check.checked(SHAPE, CPU, stub_clock)
    verdicts = {SHAPE.key(mode == "training"): found[mode] for mode in MODES}
    store.adopt(environment(CPU), verdicts)
    layer = class_check.GRU(3, SHAPE.hidden)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=True)
    for T, B in ((SHORT, 2), (3, 5)):
        x = torch.randn(T, B, 3)
        with harness.interleaving(0) as runs:
            y, _ = compiled(x)
        assert runs[0].kernels == ["scan_forward_kernel"]
        exact = class_check.GRU.from_torch(layer, backend="reference")(x)[0]
        assert_close(y, exact)
    assert len(deciding._decided) == 1, "for every batch size"


def test_a_crash_takes_nobody_along(caplog):
    ((_, outcome),) = checks.measured([SHAPE], CPU, measure("crashes"))
    assert "SIGSEGV" in outcome.failure
    found = deciding.decision(CPU, SHAPE, True, holds=True)
    assert not found.passed and "SIGSEGV" in found.why


def test_what_keeps_triton_from_any_kernel_is_no_verdict():
    ((_, outcome),) = checks.measured([SHAPE], CPU, measure("no_kernel"))
    assert outcome.verdicts == {} and outcome.failure is None
    assert "ended with 1: Triton can run no kernel here: TypeError" in outcome.obstacle
