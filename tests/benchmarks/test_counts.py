"""The counts of a step, in a loop of which every number is known."""

import numpy as np
import pytest

pytest.importorskip("triton", reason="compiles the kernels")

from benchmarks import counts
from tests.ptx.global_memory import GlobalMemory
from tests.ptx.machine import Launch
from tests.ptx.program import Program

STEPS = 3
# A word a thread to shared memory and back, 2 << SHIFT bytes apart.
STRIDED = """
.version 8.4
.target sm_90
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry strided(
	.param .u64 .ptr .global .align 16 strided_param_0
)
{
	.reg .pred %p<2>;
	.reg .b32 %r<8>;
	.reg .b64 %rd<4>;
	ld.param.u64 %rd1, [strided_param_0];
	mov.u32 %r1, %tid.x;
	mul.wide.s32 %rd2, %r1, 4;
	add.s64 %rd3, %rd1, %rd2;
	mov.b32 %r2, global_smem;
	shl.b32 %r3, %r1, SHIFT;
	add.s32 %r4, %r2, %r3;
	mov.b32 %r5, 0;
$L0:
	st.shared.b32 [%r4], %r1;
	bar.sync 0;
	ld.shared.b32 %r6, [%r4];
	st.global.b32 [%rd3], %r6;
	bar.sync 0;
	add.s32 %r5, %r5, 1;
	setp.lt.s32 %p1, %r5, 3;
	@%p1 bra $L0;
	ret;
}
"""


@pytest.mark.parametrize(("shift", "conflict"), [(2, 1), (3, 2), (5, 8), (7, 32)])
def test_conflicts_barriers_sectors_and_instructions_of_a_step(shift, conflict):
    memory, warps = GlobalMemory(), 2
    out = memory.allocate(4 * 32 * warps, "out")
    memory.fill([np.zeros(4 * 32 * warps, np.uint8)])
    program = Program(STRIDED.replace("SHIFT", str(shift)))
    launch = Launch(
        program, "strided", (2,), warps, 32 * warps << shift, [out], memory, counting=True
    ).run()
    found = counts.counts(launch, STEPS)
    assert found.classes == {"shared": 2, "barriers": 2, "global": 1, "integer": 3}
    assert found.instructions == 8
    # A store and a load of 32 words by each warp: 128 bytes, in one wavefront if the banks differ.
    assert (found.wavefronts, found.least) == (2 * warps * conflict, 2 * warps)
    assert found.sectors == 4 * warps


def test_a_scan_is_counted_and_shown(capsys):
    assert [counts.class_of(op) for op in ("ld.shared.v4.b32", "ld.volatile.global.v2.b32")] == [
        "shared",
        "global",
    ]
    scans = list(counts.scans(90, "bf16", 3, 33, True))
    assert [direction for direction, _, _ in scans] == ["forward", "backward"]
    for direction, shape, found in scans:
        assert found.classes["mma"] > 0 and found.wavefronts >= found.least > 0
        line = counts.row(33, direction, True, shape, found)
        assert line.count("|") == counts.heading().split("\n")[0].count("|")
