"""An exchange that is broken on purpose: one program of a group never comes."""

import contextlib
import itertools
import time

import pytest
import torch

from tests.gpu.device import DEVICE, case_on_device, plan_for
from tests.scan_cases import assert_exact_enough
from triton_gru.kernel_errors import KernelTimeout, check
from triton_gru.kernels import backward, forward
from triton_gru.kernels.backward import scan_backward
from triton_gru.kernels.forward import scan_forward
from triton_gru.plan.plan import COUNTER, GLUON, POLLS, SENTINEL

PROTOCOLS = (SENTINEL, COUNTER)
# A wait that times out may take so long, from the launch to the exception.
SECONDS = 1.0


class LastProgramMissing:
    """A kernel whose grid is one program short: the others wait for what it would publish."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.kernel[(grid[0] - 1, *grid[1:])]


@contextlib.contextmanager
def impatience():
    """In the interpreter a deadlock is to be left to the kernel's own bound."""
    if DEVICE.type == "cuda":
        yield
        return
    from tests.interpreter import harness

    with harness.interleaving(0, detect=False):
        yield


@pytest.mark.parametrize("reset_after", [True, False], ids=["after", "before"])
@pytest.mark.parametrize(
    ("launch", "direction"),
    itertools.product((*PROTOCOLS, GLUON), ("forward", "backward")),
)
def test_a_program_that_never_comes(launch, direction, reset_after, monkeypatch):
    on_gpu = DEVICE.type == "cuda"
    shape = (32, 16, 768) if on_gpu else (2, 3, 20)
    case = case_on_device(*shape, reset_after=reset_after, dtype=torch.bfloat16)
    plans = {d: plan_for(case, d, launch) for d in ("forward", "backward")}
    polls = POLLS if on_gpu else 20
    y = scan_forward(*case.arguments, **case.options, plan=plans["forward"])

    def scan(plan):
        if direction == "forward":
            return scan_forward(*case.arguments, **case.options, plan=plan, polls=polls)
        arguments = (case.dy, y, *case.arguments)
        return scan_backward(*arguments, **case.options, plan=plan, polls=polls)[0]

    scan(plans[direction])  # compiled before the clock starts
    check()
    kernel = f"scan_{direction}_kernel"
    user = {"forward": forward, "backward": backward}[direction]
    if launch == GLUON:
        from triton_gru.kernels import gluon_backward, gluon_forward

        user = {"forward": gluon_forward, "backward": gluon_backward}[direction]
        kernel = f"scan_{direction}_gluon_kernel"
    monkeypatch.setattr(user, kernel, LastProgramMissing(getattr(user, kernel)))
    begun = time.perf_counter()
    with impatience():
        result = scan(plans[direction])
    with pytest.raises(KernelTimeout, match="timed out waiting"):
        check()
    took = time.perf_counter() - begun
    assert result.isnan().any()
    assert not on_gpu or took < SECONDS, f"{took:.2f} s"

    # Reported once, then over: the device computes as before.
    monkeypatch.undo()
    assert_exact_enough(case, plans, "bfloat16")


def test_the_next_call_raises(monkeypatch):
    """Without anybody asking: the error of one launch surfaces in the one after it."""
    case = case_on_device(4, 3, 300 if DEVICE.type == "cuda" else 20, reset_after=True)
    plan = plan_for(case, "forward", SENTINEL)
    kernel = LastProgramMissing(forward.scan_forward_kernel)
    monkeypatch.setattr(forward, "scan_forward_kernel", kernel)
    with impatience():
        scan_forward(*case.arguments, **case.options, plan=plan, polls=20)
    monkeypatch.undo()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    with pytest.raises(KernelTimeout, match=r"program .* step"):
        scan_forward(*case.arguments, **case.options, plan=plan)
