"""Compiled kernels broken one instruction at a time: runs must notice 19 of 20 of each kernel."""

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
        "release": lambda line: ONE_WARP_GOES_ROUND + line}, "BarrierError"),
    "a branch within a warp": ("counter", {
        r"@%p\d+ bra.*exchange\.py": lambda line: re.sub(
            r"@%p\d+ bra\s+(\S+);", ODD_LANES_BRANCH, line)}, "Divergence"),
    "stores that are seen late": ("counter", {
        "release": lambda line: line.replace("release", "relaxed")}, "values"),
    "loads that are done early": ("counter", {
        "acquire": lambda line: line.replace("acquire", "relaxed")}, "values"),
    "a signal that is not sent": ("counter", SIGNAL, "KernelTimeout"),
    "a wait without a bound": ("counter", SIGNAL | {
        r"add\.s32.*, -1 .*exchange\.py": lambda line: line.replace("-1", "0")}, "Deadlock"),
    "a wait given up that nobody hears of": ("counter", SIGNAL | {
        r"st\.global\.b32.*exchange\.py": lambda line: ""}, "values"),
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
    numbers = set().union(*target.program.polls)
    polls = [x for n in numbers for x in target.program.segments[n].instructions]
    line = next(x.line for x in polls if "volatile" in x.parts)
    lines = target.ptx.splitlines()
    lines[line - 1] = lines[line - 1].replace(".volatile", "")
    assert target.fails("\n".join(lines), 4) in ("Deadlock", "KernelTimeout")  # whichever is first


def test_a_kernel_that_is_not_broken_survives():
    target = Target("counter", "forward")
    assert target.fails(target.ptx, 2) is None


# -- make soak ---------------------------------------------------------------------------------


@pytest.mark.soak
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("name", NAMES)
def test_mutants_are_caught(name):
    """19 of 20 of all kinds together, and each of the others is explained.

    A mutant that the checks of survivors.py show to change nothing is none, and is not counted.
    """
    target = Target(*name.split())
    counted, survivors_ = 0, {}
    for mutant in mutations.every_mutant(target):
        why = None if target.caught(mutant) else survivors.reason(target, mutant) or "unexplained"
        if why not in survivors.NO_EFFECT:
            counted += 1
            if why:
                survivors_[f"{mutant.kind}: {mutant.instruction!r} -> {mutant.text.strip()}"] = why
    report = "\n".join(f"{why}: {text}" for text, why in survivors_.items())
    assert "unexplained" not in survivors_.values(), report
    assert len(survivors_) <= (1 - CAUGHT) * counted, f"of {counted}:\n{report}"
