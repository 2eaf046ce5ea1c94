"""Plans of the Gluon kernel: where there are any, and the rules that they keep. No GPU."""

import dataclasses
import math

import pytest

from triton_gru.plan.devices import DEVICES, MOST_IN_REGISTERS, for_triton
from triton_gru.plan.plan import GLUON, GROUP, SINGLE, Problem, padded_size
from triton_gru.plan.planner import all_plans, best_plan


def device(arch, version="3.7.1"):
    return for_triton(DEVICES[arch], version)


def gluon_plans(problem, arch, version="3.7.1"):
    return [p for p in all_plans(problem, device(arch, version)) if p.kernel == GLUON]


@pytest.mark.parametrize("version", ["3.5.1", "3.8.0", "3.9.0", "4.0.0"])
def test_a_triton_that_is_not_known_gets_the_triton_kernels(version):
    problem = Problem(16, 768, "bfloat16", True)
    assert not gluon_plans(problem, 90, version)
    assert best_plan(problem, device(90, version)).kernel == GROUP


def test_it_takes_every_product_of_matrix_instructions():
    for dtype, version in (("bfloat16", "3.7.1"), ("float16", "3.6.0")):
        for reset_after in (True, False):
            for direction in ("forward", "backward"):
                problem = Problem(16, 768, dtype, reset_after, direction)
                assert best_plan(problem, device(90, version)).kernel == GLUON
                # The backward that exchanges gates' gradients remains a choice of `tune`.
                assert GROUP in {p.kernel for p in all_plans(problem, device(90, version))}
                float32 = dataclasses.replace(problem, dtype="float32")
                assert best_plan(float32, device(90, version)).kernel == GLUON
                assert not gluon_plans(dataclasses.replace(float32, tensor_cores=False), 90)


def test_what_needs_no_exchange_stays_in_one_program():
    assert best_plan(Problem(16, 128, "bfloat16", True), device(90)).kernel == SINGLE
    assert not gluon_plans(Problem(16, 16, "bfloat16", True), 90)


@pytest.mark.parametrize("arch", DEVICES)
@pytest.mark.parametrize("reset_after", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_plan_keeps_the_rules(arch, reset_after, dtype, direction):
    met = 0
    for hidden in (17, 129, 256, 650, 1000, 1024, 1696, 2048):
        for batch in (1, 17, 300):
            for directions in (1, 2):
                problem = Problem(batch, hidden, dtype, reset_after, direction, directions)
                padded = padded_size(hidden)
                for plan in gluon_plans(problem, arch):
                    met += 1
                    assert plan.group * plan.block_n >= padded > (plan.group - 1) * plan.block_n
                    assert plan.span == padded and 0 < plan.tail <= plan.block_k
                    depth = 32 if dtype == "bfloat16" else 16
                    assert plan.block_k == depth * plan.warps == depth * plan.split_k
                    assert 0 <= plan.in_registers <= plan.k_blocks
                    assert plan.shared_bytes <= device(arch).shared_bytes
                    assert plan.groups == directions * math.ceil(batch / plan.block_m)
                    assert plan.launches == math.ceil(plan.groups / plan.groups_a_launch)
                    resident = device(arch).resident_programs
                    assert plan.group * plan.groups_a_launch <= resident
                    assert 0 < plan.lower_bound_us <= plan.estimate_us
    assert met


def test_weights_that_do_not_fit_in_registers_are_in_shared_memory():
    plans = gluon_plans(Problem(64, 1024, "bfloat16", True), 90)
    tiles = {(p.block_m, p.block_n): p for p in plans}
    assert tiles[16, 16].in_registers == tiles[16, 16].k_blocks
    assert tiles[16, 16].shared_weight_bytes == 0
    wide = tiles[16, 32]
    assert wide.in_registers == 2
    assert wide.shared_weight_bytes == 2 * 3 * 32 * 256 * 2
    assert wide.shared_bytes == wide.shared_weight_bytes + 2 * 3 * 8 * 16 * 32 * 4


def test_the_factors_of_the_backward_take_registers_and_time_beyond_the_exchange():
    forward, backward = (
        {(p.block_m, p.block_n): p for p in gluon_plans(Problem(16, 1024, "bfloat16", True, d), 90)}
        for d in ("forward", "backward")
    )
    assert backward[8, 16].in_registers == forward[8, 16].in_registers == 4
    assert forward[16, 16].in_registers == 4 and (16, 16) not in backward  # but 2, for no launch
    # dh once and three factors; these are loaded during the exchange, of 1 us, and take 1.17.
    of_vector = 128 * 8 * 1024 * 2
    assert backward[8, 16].exchanged_bytes == 4 * of_vector
    over_l2 = (4 * of_vector / 3072) / 1755
    assert backward[8, 16].lower_bound_us == pytest.approx(over_l2)
    short = gluon_plans(Problem(16, 256, "bfloat16", True, "backward"), 90)[0]
    assert short.lower_bound_us == pytest.approx(1 + short.exchanged_bytes / 4 / 3072 / 1755)


def test_a_plan_says_that_it_is_gluon():
    plan = best_plan(Problem(16, 768, "bfloat16", True), device(90))
    assert "exchanging the state by sentinel, in Gluon" in plan.describe()
    exact = Problem(16, 256, "float32", True, tensor_cores=False)
    assert "Gluon" not in best_plan(exact, device(90)).describe()


def test_the_interpreter_gets_the_triton_kernels():
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    from triton_gru.plan import selection

    assert not selection.device_limits(torch.device("cpu")).gluon
    assert device(90).gluon and device(90).most_in_registers == MOST_IN_REGISTERS
