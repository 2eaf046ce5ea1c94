"""Compiled kernels broken one instruction at a time: a run must notice 19 of 20 of each kernel."""

import functools
import re

import pytest

pytest.importorskip("triton", reason="tests/ptx compiles kernels")

from tests.ptx import mutations, survivors

Target = functools.cache(mutations.Target)
NAMES = [" ".join(t) for t in mutations.TARGETS]
CAUGHT = 0.95


ONE_WARP_GOES_ROUND = """{ .reg .pred here; .reg .b32 thread; mov.u32 thread, %tid.x;
setp.lt.s32 here, thread, 32; @here bra ROUND; bar.sync 0; ROUND: }""".replace("\n", " ")
ODD_LANES_BRANCH = (r"{ .reg .pred odd; .reg .b32 lane; and.b32 lane, %laneid, 1; "
                    r"setp.eq.s32 odd, lane, 1; @odd bra \1; }")  # fmt: skip
SIGNAL = {"release": lambda line: ""}
# Each check of the machine in a forward of the project that lacks something: the launch, what
# becomes of the instructions with these patterns, and how that shows.
BROKEN = {
    "a store out of bounds": ("counter", {
        r"st\.global\.v2": lambda line: line.replace("+ 0", "+ 1048576")}, "OutOfBounds"),
    "a vector that is not aligned": ("sentinel", {
        r"ld\.volatile\.global\.v4": lambda line: line.replace("+ 0", "+ 4")}, "Misaligned"),
    "a register that nobody wrote": ("counter", {
        r"mov\.u32\s+%r\d+, %tid\.x": lambda line: ""}, "Uninitialised"),
    "shared memory that nobody wrote": ("counter", {
        r"st\.shared.*tile\.py": lambda line: ""}, "Uninitialised"),
    "a race of two warps": ("counter", {
        r"bar\.sync.*tile\.py": lambda line: ""}, "Race"),
    "a barrier that one warp goes round": ("counter", {
        r"bar\.sync.*exchange\.py:232": lambda line: ONE_WARP_GOES_ROUND}, "BarrierError"),
    "a branch within a warp": ("counter", {
        r"@%p\d+ bra.*exchange\.py:192": lambda line: re.sub(
            r"@%p\d+ bra\s+(\S+);", ODD_LANES_BRANCH, line)}, "Divergence"),
    "stores that are seen late": ("counter", {
        "release": lambda line: line.replace("release", "relaxed")}, "values"),
    "loads that are done early": ("counter", {
        "acquire": lambda line: line.replace("acquire", "relaxed")}, "values"),
    "a signal that is not sent": ("counter", SIGNAL, "KernelTimeout"),
    "a wait without a bound": ("counter", SIGNAL | {
        r"add\.s32.*-1.*exchange\.py:194": lambda line: line.replace("-1", "0")}, "Deadlock"),
    "a wait given up that nobody hears of": ("counter", SIGNAL | {
        r"st\.global.*exchange\.py:240": lambda line: ""}, "values"),
}  # fmt: skip


@pytest.mark.parametrize("title", BROKEN)
def test_a_broken_kernel_is_caught(title):
    launch, changes, how = BROKEN[title]
    target = Target(launch, "forward")
    lines = target.ptx.splitlines()
    for pattern, change in changes.items():
        places = [i.line - 1 for i in target.program.instructions if re.search(pattern, repr(i))]
        assert places
        for at in places:
            assert change(lines[at]) != lines[at]
            lines[at] = change(lines[at])
    assert target.fails("\n".join(lines), mutations.SEEDS["order"]) == how


def test_a_poll_past_l1_is_needed():
    """A look that is repeated from L1 alone never sees what others store."""
    target = Target("sentinel", "forward")
    polls = [x for n in target.program.polls for x in target.program.segments[n].instructions]
    line = next(x.line for x in polls if "volatile" in x.parts)
    lines = target.ptx.splitlines()
    lines[line - 1] = lines[line - 1].replace(".volatile", "")
    assert target.fails("\n".join(lines), 4) == "Deadlock"


def test_a_kernel_that_is_not_broken_survives():
    target = Target("counter", "forward")
    assert target.fails(target.ptx, 2) is None


# -- make soak ---------------------------------------------------------------------------------


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", mutations.KINDS)
@pytest.mark.parametrize("target", NAMES)
def test_mutants_are_caught_or_explained(target, kind):
    target = Target(*target.split())
    every = mutations.mutants(target, kind)
    survived = [m for m in every if target.caught(m) is None]
    reasons = {repr(m.instruction): survivors.reason(target, m) for m in survived}
    unknown = [text for text, reason in reasons.items() if reason not in survivors.REASONS]
    assert not unknown, "\n".join(unknown)
    # Those without any effect on this problem are no mutants of the kernel as it runs here.
    harmful = [m for m in survived if reasons[repr(m.instruction)] == "rounding"]
    assert len(harmful) <= (1 - CAUGHT) * len(every), "\n".join(map(repr, harmful))
