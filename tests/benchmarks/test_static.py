"""The static report finds the faults that it is there to refuse."""

import dataclasses
import itertools

import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from benchmarks import machine_code, operands, static  # noqa: E402
from triton_gru.kernels import forward  # noqa: E402
from triton_gru.plan.devices import DEVICES  # noqa: E402
from triton_gru.plan.plan import COUNTER, Problem  # noqa: E402
from triton_gru.plan.planner import all_plans  # noqa: E402

SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   STL.128 [R1], R4 ;
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0030*/                   LDL.64 R6, [R1+0x10] ;
        /*0040*/              @!P0 BRA 0x30 ;
        /*0050*/               @P1 STL [R1+0x20], R7 ;
        /*0060*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0070*/               @P2 BRA 0x20 ;
        /*0080*/                   EXIT ;
        /*0090*/                   BRA 0x90;
"""


def test_the_time_loop_is_the_longest_one_and_its_spills_are_counted():
    loop, spilled = machine_code.time_loop(SASS)
    assert [op.split(".")[0] for op in loop] == ["HMMA", "LDL", "BRA", "STL", "BAR", "BRA"]
    assert sum(map(machine_code._local_bytes, loop)) == 8 + 4
    assert spilled == 16 + 8 + 4


@triton.jit
def product_kernel(weight, x, out, steps, RESIDENT: tl.constexpr):
    i = tl.arange(0, 32)
    at = i[:, None] * 32 + i[None, :]
    w = tl.load(weight + at)
    total = tl.zeros([32, 32], tl.float32)
    for step in range(steps):
        if not RESIDENT:
            w = tl.load(weight + at + step * 1024)
        total = tl.dot(tl.load(x + at + step * 1024), w, total)
    tl.store(out + at, total)


@pytest.mark.parametrize("resident", [True, False])
def test_a_weight_loaded_in_the_loop_is_seen(resident):
    compiled = machine_code.compile_kernel(
        product_kernel, {"RESIDENT": resident}, torch.bfloat16, 90, 4, aligned=True
    )
    assert compiled.loop_weight_loads == (0 if resident else 1)
    assert compiled.loop_matrix > 0


def test_one_plan_of_each_scan_has_no_shortcoming_and_would_have():
    for direction in ("forward", "backward"):
        row = static.examine(90, Problem(16, 256, "bfloat16", True, direction))
        assert row["group"] > 1 and row["short"] == []
        broken = [
            row | {"loop_spill_bytes": 4},
            row | {"loop_weight_loads": 1},
            row | {"loop_matrix": 0},
            row | {"shared": DEVICES[90].shared_bytes + 1},
            row | {"shared": row["shared_weight_bytes"] - 1},
            row | {"groups_a_launch": 10_000},
            row | {"lost_operands": ("4 words moved between threads and not read",)},
        ]
        for one in broken:
            assert len(static.shortcomings(one, DEVICES[90])) == 1
        crowded = dataclasses.replace(DEVICES[90], shared_bytes=1024)
        assert static.shortcomings(row, crowded)


def test_shapes_without_a_plan_have_a_reason_and_are_no_shortcoming():
    row = static.examine(86, Problem(16, 2048, "bfloat16", True, "forward"))
    assert row["kernel"] == "none" and not row["short"]
    assert "has to stay on chip" in row["why"]


@triton.jit
def load_any_flags(pointers, mask):
    """`tile.load_flags` without its refusal of narrow flags."""
    return tl.load(pointers, mask=mask, other=0) != 0


@pytest.fixture
def flags_of_eight_bits(monkeypatch):
    types = machine_code._type_of
    monkeypatch.setattr(
        machine_code,
        "_type_of",
        lambda name, dtype: "*i8" if name == "resets" else types(name, dtype),
    )


NARROW_TAIL = Problem(3, 160, "bfloat16", True, "forward")  # 16 columns of K a warp


def test_a_kernel_refuses_flags_of_eight_bits(flags_of_eight_bits):
    with pytest.raises(triton.CompilationError) as refused:
        static.examine(90, NARROW_TAIL, COUNTER, uneven=True)
    assert "narrower than 32 bits" in str(refused.value.__cause__ or refused.value)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_an_operand_of_which_a_part_is_lost_is_seen(arch, flags_of_eight_bits, monkeypatch):
    kernel = forward.scan_forward_kernel
    monkeypatch.setattr(forward, "load_flags", load_any_flags)
    monkeypatch.setattr(kernel, "hash", None)  # of its source and of all that it calls
    row = static.examine(arch, NARROW_TAIL, COUNTER, uneven=True)
    assert "an operand wider than a warp's K: 4x16x16xbf16 with kWidth 8" in row["short"]
    problem, plan = _narrow_tail_of_every_plan()
    assert operands.examine(arch, problem, plan, uneven=True)["short"] == row["short"]


def test_unread_shuffles_are_counted():
    ptx = """
    shfl.sync.idx.b32 %r3, %r1, %r2, 31, -1;
    shfl.sync.bfly.b32 %r4, %r1, 1, 31, -1;
    add.s32 %r5, %r4, %r1;
.section .debug
    mov.b32 %r6, %r3;
"""
    assert machine_code.unread_shuffles(ptx) == 1


def _narrow_tail_of_every_plan():
    """What `--every-plan` compiles of this kind: a counter, 16 columns of K a warp in the tail."""
    device = dataclasses.replace(DEVICES[90], multiprocessors=16)  # few sizes fit, soon listed
    kinds = operands.kinds_of_plans(device, "bfloat16", True)
    return next(
        (problem, plan)
        for problem, plan in kinds
        if problem.reset_after
        and plan.direction == "forward"
        and (plan.protocol, plan.tail // plan.split_k) == (COUNTER, 16)
        and plan.k_blocks > 1
    )


@pytest.mark.parametrize("dtype, tensor_cores", operands.DTYPES)
def test_the_kinds_of_plans_leave_none_out(dtype, tensor_cores):
    """Whatever size and batch, `tune` and the planner take a plan of a kind that is looked at."""
    device = dataclasses.replace(DEVICES[90], multiprocessors=16)  # few sizes fit, soon listed
    kinds = {operands._kind(*one) for one in operands.kinds_of_plans(device, dtype, tensor_cores)}
    met = set()
    for hidden, batch, reset_after, direction, directions in itertools.product(
        (1, 17, 130, 161, 250), (1, 3, 20, 100), (True, False), ("forward", "backward"), (1, 2)
    ):
        problem = Problem(batch, hidden, dtype, reset_after, direction, directions, tensor_cores)
        met |= {operands._kind(problem, plan) for plan in all_plans(problem, device)}
    assert met and met <= kinds


def test_every_plan_is_examined_with_and_without_lengths_and_resets():
    problem, plan = _narrow_tail_of_every_plan()
    for uneven in (False, True):
        assert operands.examine(90, problem, plan, uneven)["short"] == []


@pytest.mark.parametrize("reset_after", [True, False])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_narrow_tail_keeps_its_operands_whole_under_the_counter(direction, reset_after):
    row = static.examine(90, Problem(3, 160, "bfloat16", reset_after, direction), COUNTER, True)
    assert row["tail"] // row["split_k"] == 16 and row["lost_operands"] == ()
