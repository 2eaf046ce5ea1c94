"""The machine's own eyes: small programs in PTX, sound and broken, and what it says of each."""

import numpy as np
import pytest

pytest.importorskip("triton", reason="tests/ptx compiles kernels")

from tests.ptx import errors
from tests.ptx.global_memory import GlobalMemory
from tests.ptx.machine import Launch
from tests.ptx.program import Program

HEAD = """
.visible .entry kernel(.param .u64 kernel_param_0)
{
.reg .pred %p<9>;
.reg .b16 %rs<9>;
.reg .b32 %r<19>;
.reg .b64 %rd<9>;
ld.param.b64 %rd1, [kernel_param_0];
mov.u32 %r1, %tid.x;
mov.u32 %r2, %ctaid.x;
shl.b32 %r3, %r1, 2;
cvt.u64.u32 %rd2, %r3;
add.s64 %rd2, %rd1, %rd2;
mov.b32 %r4, global_smem;
add.s32 %r5, %r4, %r3;
"""  # rd1: the words, rd2: this thread's; r1: thread, r2: program, r5: its word of shared memory


def run(body, words=64, grid=1, warps=2, parameters=(), **options):
    """Executes a body on `words` of memory, 0, 1, 2...; returns them, and the launch."""
    memory = GlobalMemory()
    address = memory.allocate(4 * words, "words")
    memory.fill([np.arange(words, dtype=np.uint32).view(np.uint8)])
    launch = Launch(Program(f"{HEAD}\n{body}\nret;\n}}"), "kernel", (grid,), warps, 1024,
                    [address, *parameters], memory, **options).run()  # fmt: skip
    at, nbytes = memory.spans[0]
    return memory.bytes[at : at + nbytes].view(np.uint32), launch


ROTATED = """st.shared.b32 [%r5], %r1;
bar.sync 0;
xor.b32 %r6, %r3, 128;
add.s32 %r6, %r4, %r6;
ld.shared.b32 %r7, [%r6];
st.global.b32 [%rd2], %r7;"""  # each warp reads what the other wrote


@pytest.mark.parametrize("apart", [False, True])
def test_a_sound_program_yields_what_it_should(apart):
    for seed in range(4):
        out, _ = run(ROTATED, seed=seed, apart=apart)
        assert out.tolist() == [n ^ 32 for n in range(64)]


@pytest.mark.parametrize("kind", ["s32", "b32"])
def test_a_parameter_fills_a_wider_register_by_its_type(kind):
    body = f"ld.param.{kind} %rd3, [kernel_param_1];\nst.global.b64 [%rd1], %rd3;"
    out, _ = run(body, parameters=[-5])
    assert out[:2].tolist() == [2**32 - 5, 2**32 - 1 if kind == "s32" else 0]


def test_a_maximum_of_pairs_is_that_of_each_half():
    body = """mov.b32 %r6, 0x0002fffe;
mov.b32 %r7, 0xfffe0003;
max.u16x2 %r6, %r6, %r7;
st.global.b32 [%rd2], %r6;"""
    assert set(run(body)[0].tolist()) == {0xFFFEFFFE}


BROKEN = {
    "a load beyond the argument": ("ld.global.b32 %r6, [%rd2+4];", errors.OutOfBounds),
    "a store before the argument": ("st.global.b32 [%rd2+-4], %r1;", errors.OutOfBounds),
    "an atomic beyond the argument": (
        "atom.global.gpu.relaxed.add.u32 %r6, [%rd2+256], %r1;", errors.OutOfBounds),
    "a store beyond shared memory": ("st.shared.b32 [%r5+1000], %r1;", errors.OutOfBounds),
    "a vector that is not aligned": (
        "setp.eq.s32 %p1, %r1, 1;\n@%p1 ld.global.v4.b32 {%r6, %r7, %r8, %r9}, [%rd2];",
        errors.Misaligned),
    "a vector of shared memory that is not aligned": (
        "setp.eq.s32 %p1, %r1, 1;\n@%p1 st.shared.v2.b32 [%r5], {%r6, %r7};", errors.Misaligned),
    "a register before its first write": (
        "setp.eq.s32 %p1, %r1, 99;\n@%p1 bra $L;\nadd.s32 %r7, %r6, 1;\n$L:\nmov.b32 %r6, 0;",
        errors.Uninitialised),
    "a branch by such a register": (
        "@%p7 bra $L;\n$L:\nsetp.eq.s32 %p7, %r1, 1;", errors.Uninitialised),
    "such a register chosen": (
        "setp.eq.s32 %p1, %r1, 3;\nselp.b32 %r7, %r6, %r1, %p1;\nmov.b32 %r6, 0;",
        errors.Uninitialised),
    "such a register stored": (
        "st.global.b32 [%rd2], %r6;\nmov.b32 %r6, 0;", errors.Uninitialised),
    "shared memory that nobody wrote": ("ld.shared.b32 %r6, [%r5];", errors.Uninitialised),
    "no barrier between write and read": (
        ROTATED.replace("bar.sync 0;", ""), (errors.Race, errors.Uninitialised)),
    "no barrier between read and write": (
        ROTATED + "\nst.shared.b32 [%r5], %r7;", errors.Race),
    "two warps write different words to one place": ("st.shared.b32 [%r4], %r1;", errors.Race),
    "cp.async that nobody waits for": (
        "cp.async.ca.shared.global [%r5], [%rd2], 4;\ncp.async.commit_group;\n"
        "cp.async.wait_group 1;\nld.shared.b32 %r6, [%r5];", errors.Race),
    "cp.async under way at the end": (
        "cp.async.ca.shared.global [%r5], [%rd2], 4;\ncp.async.commit_group;", errors.Race),
    "a non-coherent load of what is stored": (
        "st.global.b32 [%rd2], %r1;\nld.global.nc.b32 %r6, [%rd2];", errors.Race),
    "a barrier that one warp goes round": (
        "setp.lt.s32 %p1, %r1, 32;\n@%p1 bra $L;\nbar.sync 0;\n$L:\nmov.b32 %r6, 0;",
        errors.BarrierError),
    "warps at different barriers": (
        "setp.lt.s32 %p1, %r1, 32;\n@%p1 bra $L;\nbar.sync 0;\nbra $M;\n$L:\nbar.sync 0;\n$M:\n"
        "mov.b32 %r6, 0;", errors.BarrierError),
    "a branch within a warp": (
        "setp.lt.s32 %p1, %r1, 5;\n@%p1 bra $L;\nmov.b32 %r6, 0;\n$L:\nmov.b32 %r6, 1;",
        errors.Divergence),
    "a wait for nobody": (
        "$L:\nld.volatile.global.b32 %r6, [%rd1];\nsetp.eq.s32 %p1, %r6, 0;\n@%p1 bra $L;",
        errors.Deadlock),
}  # fmt: skip


@pytest.mark.parametrize("title", BROKEN)
@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
def test_a_broken_program_is_caught(title, apart):
    body, error = BROKEN[title]
    with pytest.raises(error, match="PTX line"):
        run(body, apart=apart)


@pytest.mark.parametrize(
    "line",
    [
        "sin.approx.f32 %r6, %r7;", "add.rz.f32 %r6, %r6, %r7;", "add.sat.s32 %r6, %r6, %r7;",
        "ld.global.lu.b32 %r6, [%rd1];", "bar.sync 1;", "bar.arrive 0, 64;",
        "mul24.lo.s32 %r6, %r6, %r7;",
        "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%r6}, {%r7}, {%r8}, {%r9};",
        "vote.sync.any.pred %p1, %p2, 0xffff;", "shfl.sync.up.b32 %r6, %r7, 1, 0, -1;",
        "cvt.rz.bf16.f32 %rs1, %r6;", "atom.shared.add.u32 %r6, [%r4], 1;",
        "setp.eq.u16 %p1, %q, 0;",
    ],
)  # fmt: skip
def test_what_the_machine_does_not_know_it_refuses_to_build(line):
    with pytest.raises(errors.Unsupported):
        Program(f"{HEAD}\n{line}\nret;\n}}")


# -- memory between programs -------------------------------------------------------------------

# Program 0 stores words 0 to 31 and then raises a flag, word 40; program 1 waits for the flag and
# copies the words to 64 and on. What each side does is filled in.
MESSAGE = """setp.ne.s32 %p1, %r2, 0;
@%p1 bra $WAIT;
add.s32 %r6, %r1, 1000;
st.global.b32 [%rd2], %r6;
{announce}
bra $END;
$WAIT:
{before}
$POLL:
{poll}
setp.eq.s32 %p2, %r7, 40;
@%p2 bra $POLL;
{load}
st.global.b32 [%rd2+256], %r8;
$END:
mov.b32 %r9, 0;"""
SOUND = {
    "announce": "bar.warp.sync -1;\nsetp.eq.s32 %p3, %r1, 0;\nbar.sync 0;\n"
    "@%p3 atom.global.gpu.release.add.u32 %r9, [%rd1+160], 1;",
    "before": "",
    "poll": "ld.relaxed.gpu.global.b32 %r7, [%rd1+160];\n"
    "ld.acquire.gpu.global.b32 %r7, [%rd1+160];",
    "load": "ld.global.b32 %r8, [%rd2];",
}


def wrong_seeds(grid=2, seeds=60, **change):
    out = 0
    for seed in range(seeds):
        words, _ = run(MESSAGE.format(**SOUND | change), 128, grid, 1, seed=seed)
        out += words[64:96].tolist() != list(range(1000, 1032))
    return out


def test_release_and_acquire_pass_a_message():
    assert wrong_seeds() == 0
    assert (
        wrong_seeds(before="ld.global.b32 %r8, [%rd2];", load="ld.global.cg.b32 %r8, [%rd2];") == 0
    )


UNORDERED = {
    "stores are seen late": {
        "announce": SOUND["announce"].replace("release", "relaxed")},
    "a release orders its own thread's stores alone": {
        "announce": SOUND["announce"].replace("bar.sync 0;", "")},
    "plain loads are done early": {
        "poll": "ld.relaxed.gpu.global.b32 %r7, [%rd1+160];"},
    "loads of L2 are done early": {
        "poll": "ld.relaxed.gpu.global.b32 %r7, [%rd1+160];",
        "load": "ld.global.cg.b32 %r8, [%rd2];"},
    "volatile loads are done early": {
        "poll": "ld.volatile.global.b32 %r7, [%rd1+160];",
        "load": "ld.volatile.global.b32 %r8, [%rd2];"},
    "a line of L1 is stale": {
        "poll": "ld.volatile.global.b32 %r7, [%rd1+160];",
        "before": "ld.global.b32 %r8, [%rd2];"},
}  # fmt: skip


@pytest.mark.parametrize("title", UNORDERED)
def test_without_order_a_message_gets_lost(title):
    assert wrong_seeds(**UNORDERED[title]) > 0


def test_a_stale_line_is_found_far_more_often_than_an_early_load():
    early = wrong_seeds(**UNORDERED["plain loads are done early"])
    assert wrong_seeds(**UNORDERED["a line of L1 is stale"]) > early


def test_stores_of_a_program_become_visible_in_any_order():
    """Each of two words is seen before the other in some order."""
    body = """setp.ne.s32 %p1, %r2, 0;
@%p1 bra $LOOK;
setp.eq.s32 %p2, %r1, 0;
mov.b32 %r9, 7;
@%p2 st.relaxed.gpu.global.b32 [%rd1], %r9;
@%p2 st.relaxed.gpu.global.b32 [%rd1+128], %r9;
bra $END;
$LOOK:
ld.relaxed.gpu.global.b32 %r6, [%rd1+128];
ld.relaxed.gpu.global.b32 %r7, [%rd1];
st.global.b32 [%rd2+256], %r6;
st.global.b32 [%rd2+384], %r7;
$END:
mov.b32 %r9, 0;"""
    seen = set()
    for seed in range(200):
        words, _ = run(body, 128, 2, 1, seed=seed)
        seen.add((int(words[64]) == 7, int(words[96]) == 7))
    assert seen == {(False, False), (True, False), (False, True), (True, True)}


def test_seeds_interleave_programs_and_warps():
    """Which warp of which program adds first differs, and a seed repeats itself."""
    body = """and.b32 %r6, %r1, 31;
setp.eq.s32 %p1, %r6, 0;
shr.u32 %r7, %r1, 5;
shl.b32 %r8, %r2, 1;
add.s32 %r7, %r7, %r8;
@%p1 atom.global.gpu.relaxed.exch.b32 %r9, [%rd1], %r7;"""
    last = [int(run(body, grid=2, seed=seed, apart=True)[0][0]) for seed in range(40)]
    assert set(last) == {0, 1, 2, 3}
    assert last == [int(run(body, grid=2, seed=seed, apart=True)[0][0]) for seed in range(40)]


def test_programs_of_a_launch_that_is_not_cooperative_cannot_wait_for_each_other():
    with pytest.raises(errors.Deadlock):
        for seed in range(4):
            run(MESSAGE.format(**SOUND), 128, 2, 1, seed=seed, cooperative=False)
