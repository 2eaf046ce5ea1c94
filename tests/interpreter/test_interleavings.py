"""Group kernels over many interleavings, and what happens when a wait does not end."""

import pytest
import torch

from tests.interpreter import harness
from tests.scan_cases import error, make_case, make_plan
from tests.tolerances import INTERPRETER_TOLERANCE
from triton_gru.kernel_errors import KernelTimeout, check
from triton_gru.kernels.backward import scan_backward
from triton_gru.kernels.forward import scan_forward
from triton_gru.plan.plan import COUNTER, SENTINEL

PROTOCOLS = (SENTINEL, COUNTER)
SEEDS = 30  # for each protocol, variant and scan: 240 interleavings of group kernels in all


@pytest.fixture(scope="module")
def problems():
    """Two programs, three steps, three rows, both variants, with their exact results."""
    cases = {v: make_case(3, 3, 20, reset_after=v, seed=11) for v in (True, False)}
    return {v: (case, *case.exact()) for v, case in cases.items()}


@pytest.mark.parametrize("reset_after", [True, False], ids=["after", "before"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_forward_on_every_interleaving(protocol, reset_after, problems):
    case, exact, _ = problems[reset_after]
    plan = make_plan(case, "forward", protocol)
    first, waits = None, 0
    for seed in range(SEEDS):
        with harness.interleaving(seed) as runs:
            y = scan_forward(*case.arguments, **case.options, plan=plan)
        waits += sum(run.waits for run in runs)
        assert error(y, exact) < INTERPRETER_TOLERANCE[torch.float32], f"seed {seed}"
        first = y if first is None else first
        assert torch.equal(y, first), f"seed {seed}: not the same bits as seed 0"
    assert waits > SEEDS // 3, "hardly a program ever waited: the interleavings prove nothing"


@pytest.mark.parametrize("reset_after", [True, False], ids=["after", "before"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_backward_on_every_interleaving(protocol, reset_after, problems):
    case, _, exact = problems[reset_after]
    y = scan_forward(*case.arguments, **case.options, plan=make_plan(case, "forward", "single"))
    plan = make_plan(case, "backward", protocol)
    first, waits = None, 0
    for seed in range(SEEDS):
        with harness.interleaving(seed) as runs:
            grads = scan_backward(case.dy, y, *case.arguments, **case.options, plan=plan)
        waits += sum(run.waits for run in runs)
        for grad, (name, expected) in zip(grads, exact.items(), strict=True):
            assert error(grad, expected) < INTERPRETER_TOLERANCE[torch.float32], (
                f"seed {seed}: {name}"
            )
        first = grads if first is None else first
        assert all(map(torch.equal, grads, first)), f"seed {seed}: not the same bits as seed 0"
    assert waits > SEEDS // 3


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_waves_of_a_batch_too_large_to_be_resident(protocol):
    import dataclasses

    case = make_case(2, 33, 20, reset_after=True)  # three tiles of 16 rows
    plan = make_plan(case, "forward", protocol, block_m=16)
    assert plan.groups == 3
    plan = dataclasses.replace(plan, groups_a_launch=2, launches=2)
    with harness.interleaving(1) as runs:
        y = scan_forward(*case.arguments, **case.options, plan=plan)
    assert [run.programs for run in runs] == [2 * plan.group, plan.group]
    assert error(y, case.exact()[0]) < INTERPRETER_TOLERANCE[torch.float32]


@pytest.mark.parametrize("reset_after", [True, False], ids=["after", "before"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_wait_in_vain_ends_in_nan_and_in_an_exception_at_the_next_call(protocol, reset_after):
    case = make_case(3, 3, 20, reset_after=reset_after)
    forward = make_plan(case, "forward", protocol)

    def impatient(scan):
        """The first interleaving on which a program that never looks twice comes too early."""
        for seed in range(50):
            with harness.interleaving(seed, detect=False):
                result = scan()
            if result.isnan().any():
                return result
        raise AssertionError("no program ever came too early")

    y = impatient(lambda: scan_forward(*case.arguments, **case.options, plan=forward, polls=0))
    assert y[-1].isnan().any()
    with pytest.raises(KernelTimeout, match="and its results are NaN"):
        scan_forward(*case.arguments, **case.options, plan=forward)
    with harness.interleaving(0):  # once reported it is over
        y = scan_forward(*case.arguments, **case.options, plan=forward)
    assert error(y, case.exact()[0]) < INTERPRETER_TOLERANCE[torch.float32]
    backward = make_plan(case, "backward", protocol)
    impatient(
        lambda: scan_backward(case.dy, y, *case.arguments, **case.options, plan=backward, polls=0)[
            1
        ]
    )
    with pytest.raises(KernelTimeout):
        check()
