"""The planner's arithmetic and choices, on a table of devices and shapes. No GPU, no triton."""

import dataclasses
import math
import os
import subprocess
import sys

import pytest

from triton_gru.plan import planner
from triton_gru.plan.costs import SHARED_BYTES_PER_CLOCK
from triton_gru.plan.devices import DEVICES, describe, for_triton
from triton_gru.plan.plan import SENTINEL, Problem, padded_size
from triton_gru.plan.planner import DoesNotFit, all_plans, best_plan

VARIANTS = [(after, scan) for after in (True, False) for scan in ("forward", "backward")]


def problem(batch, hidden, dtype="bfloat16", reset_after=True, direction="forward", **more):
    return Problem(batch, hidden, dtype, reset_after, direction, **more)


# The largest H of the grid that each device takes in either scan and variant at B = 16.
LARGEST = {
    ("bfloat16", 80): 1696,
    ("bfloat16", 86): 1280,
    ("bfloat16", 89): 1536,
    ("bfloat16", 90): 2048,
    ("bfloat16", 100): 2048,
    ("float32", 80): 1024,
    ("float32", 86): 768,
    ("float32", 89): 768,
    ("float32", 90): 1408,
    ("float32", 100): 1280,
}
GRID = (64, 128, 256, 512, 640, 650, 768, 1000, 1024, 1152, 1280, 1408, 1536, 1696, 2048)


def test_float32_without_tf32_keeps_all_weights_in_shared_memory():
    """No matrix unit, so no operand that is found in registers: H ends earlier."""
    for after, scan in VARIANTS:
        for hidden, fits in ((1152, True), (1153, False)):
            p = problem(16, hidden, "float32", after, scan, tensor_cores=False)
            plans = all_plans(p, DEVICES[90])
            assert bool(plans) == fits
            assert all(plan.in_registers == 0 for plan in plans)


@pytest.mark.parametrize(("dtype", "arch"), LARGEST)
def test_what_fits_where(dtype, arch):
    def fits(hidden):
        return all(
            all_plans(problem(16, hidden, dtype, after, scan), for_triton(DEVICES[arch], "3.7.1"))
            for after, scan in VARIANTS
        )

    assert max(h for h in GRID if fits(h)) == LARGEST[dtype, arch]


@pytest.mark.parametrize("arch", DEVICES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("reset_after", "direction"), VARIANTS)
def test_every_plan_keeps_the_rules(arch, dtype, reset_after, direction):
    device = DEVICES[arch]
    for hidden in (1, 100, 129, 650, 1024):
        for batch in (1, 17, 300):
            for directions in (1, 2):
                p = problem(batch, hidden, dtype, reset_after, direction, directions=directions)
                for plan in all_plans(p, device):
                    padded = padded_size(hidden)
                    assert plan.group * plan.block_n >= padded
                    assert (plan.group - 1) * plan.block_n < padded, "a program without columns"
                    assert plan.span >= padded > plan.block_k * (plan.k_blocks - 1)
                    assert plan.block_k % plan.tail == 0
                    assert plan.shared_bytes <= device.shared_bytes
                    assert plan.groups == directions * math.ceil(batch / plan.block_m)
                    assert plan.launches == math.ceil(plan.groups / plan.groups_a_launch)
                    assert plan.lower_bound_us <= plan.estimate_us
                    if plan.kernel == "group":
                        assert plan.group * plan.groups_a_launch <= device.resident_programs
                        assert plan.tail % (16 * plan.split_k) == 0
                        assert not plan.by_block or direction == "backward"
                        assert plan.warps == plan.split_k


def test_small_states_need_no_exchange_and_large_ones_do():
    assert best_plan(problem(16, 128), DEVICES[90]).kernel == "single"
    plan = best_plan(problem(16, 768), DEVICES[90])
    assert (plan.kernel, plan.protocol) == ("group", SENTINEL)
    assert plan.group * plan.block_n == 768


@pytest.mark.parametrize(
    ("hidden", "waste"), [(650, 1.095), (768, 1.0), (1000, 1.035), (1500, 1.03)]
)
def test_no_power_of_two_waste(hidden, waste):
    """Bytes of all slices against 6 H^2."""
    for after, scan in VARIANTS:
        plan = best_plan(problem(16, hidden, "bfloat16", after, scan), DEVICES[90])
        assert plan.weight_bytes * plan.group <= waste * 6 * hidden**2
        assert plan.span <= 1.084 * hidden


def test_every_size_costs_what_it_says():
    """A step's lower bound against that of a slice of exactly H columns, for any H from 256 on.

    The warps' matrix instructions sum over 16 columns each: finer than 16 a warp saves no time.
    """
    for hidden in range(256, 2049, 7):
        for after, scan in VARIANTS:
            p = problem(16, hidden, "bfloat16", after, scan)
            plan = best_plan(p, DEVICES[90])
            padded = padded_size(hidden)
            assert plan.span - padded < 16 * plan.warps
            exact = 3 * plan.block_n * hidden * 2 / SHARED_BYTES_PER_CLOCK / 1755
            if plan.weight_bytes / 128 > plan.exchanged_bytes / 3072:
                latency = 1.0 if after else 2.0
                assert plan.lower_bound_us <= 1.03 * (latency + exact), hidden


def test_the_lower_bound_counts_weights_exchange_and_latency():
    """B16 H768 bf16 on 48 programs: 16 x 3 x 768 x 2 B of weights, 48 x 16 x 768 x 2 B read."""
    plan = best_plan(problem(16, 768), DEVICES[90])
    assert (plan.block_n, plan.group) == (16, 48)
    assert plan.weight_bytes == 16 * 3 * 768 * 2 == 73_728
    assert plan.exchanged_bytes == 48 * 16 * 768 * 2
    weights_us = 73_728 / 128 / 1755
    l2_us = plan.exchanged_bytes / 3072 / 1755
    assert plan.lower_bound_us == pytest.approx(1.0 + max(weights_us, l2_us))
    before = best_plan(problem(16, 768, reset_after=False), DEVICES[90])
    assert before.lower_bound_us > 2.0, "two exchanges a step"


def test_promised_lower_bounds():
    """Forward, bf16, H200, an exchange taken as 1 us (benchmarks/NOTES.md)."""
    assert best_plan(problem(16, 768), DEVICES[90]).lower_bound_us <= 1.5
    assert best_plan(problem(64, 1024), DEVICES[90]).lower_bound_us <= 2.5


def test_a_batch_too_large_to_be_resident_is_launched_in_waves():
    plan = best_plan(problem(4096, 1024), DEVICES[90])
    assert plan.launches > 1
    single = best_plan(problem(16, 1024), DEVICES[90])
    assert plan.lower_bound_us > plan.launches * 0.9 and single.launches == 1


def test_what_does_not_fit_says_why():
    with pytest.raises(DoesNotFit, match=r"hidden_size=4096 in bfloat16 is 96.0 MiB.*H200"):
        best_plan(problem(16, 4096), DEVICES[90])
    with pytest.raises(DoesNotFit, match=r"no tile of ours fits \(it does with .*allow_tf32"):
        best_plan(problem(16, 1400, "float32", tensor_cores=False), DEVICES[90])
    with pytest.raises(DoesNotFit, match=r"no tile of ours fits$"):
        best_plan(problem(16, 1500, "float32", tensor_cores=False), DEVICES[90])
    with pytest.raises(DoesNotFit, match="not float64"):
        best_plan(problem(16, 64, "float64"), DEVICES[90])
    with pytest.raises(DoesNotFit, match="is empty"):
        best_plan(problem(0, 64), DEVICES[90])


def test_triton_that_keeps_no_weights_in_registers_is_told_apart():
    p = problem(16, 1400, "float32", direction="backward")
    device = for_triton(DEVICES[90], "3.9.0")
    with pytest.raises(DoesNotFit, match=r"\(it does with Triton 3\.7\.x\)$"):
        best_plan(p, device)
    assert best_plan(problem(16, 1152, "float32"), device).in_registers == 0
    assert best_plan(p, for_triton(DEVICES[90], "3.7.1")).in_registers == 2


def test_an_unknown_device_is_described_by_its_own_limits():
    device = describe(name="some GPU", capability=87, multiprocessors=16, shared_bytes=163 * 1024)
    assert (device.multiprocessors, device.clock_mhz) == (16, DEVICES[86].clock_mhz)
    with pytest.raises(DoesNotFit, match="the 15 programs of 163 KiB that some GPU holds"):
        best_plan(problem(16, 1024), device)


def test_programs_are_left_to_others():
    for device in DEVICES.values():
        assert device.resident_programs < device.multiprocessors
    crowded = dataclasses.replace(DEVICES[90], multiprocessors=8)
    assert crowded.resident_programs == 7


def test_planning_needs_neither_torch_nor_triton():
    code = (
        "import sys, types; sys.modules['torch'] = sys.modules['triton'] = None\n"
        # The package without its __init__, which imports the layer.
        "package = sys.modules['triton_gru'] = types.ModuleType('triton_gru')\n"
        f"package.__path__ = [{os.path.dirname(os.path.dirname(planner.__file__))!r}]\n"
        "from triton_gru.plan.devices import DEVICES\n"
        "from triton_gru.plan.plan import Problem\n"
        "from triton_gru.plan.planner import best_plan\n"
        "print(best_plan(Problem(16, 768, 'bfloat16', True), DEVICES[90]).kernel)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "group\n", done.stderr
