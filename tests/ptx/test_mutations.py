"""Compiled kernels broken one instruction at a time: a run must notice 19 of 20 of each kernel."""

import functools
import re

import pytest

pytest.importorskip("triton", reason="tests/ptx compiles kernels")

from tests.ptx import mutations, survivors

Target = functools.cache(mutations.Target)
NAMES = [" ".join(t) for t in mutations.TARGETS]
CAUGHT = 0.95


def first(target, kind, pattern):
    """The first mutant of a kind whose instruction is as said."""
    every = mutations.mutants(target, kind)
    return next(m for m in every if re.search(pattern, repr(m.instruction)))


@pytest.mark.parametrize(
    "launch, kind, pattern, how",
    [
        ("counter", "barrier", r"tile\.py", "Race"),
        ("counter", "barrier", r"exchange\.py", "Race|values"),
        ("counter", "order", r"release", "values"),
        ("counter", "predicate", r"@%p\d+ atom", ".*"),
        ("counter", "constant", r"mma|ldmatrix|st\.shared\.v4", ".*"),
        ("counter", "constant", r"ex2|0f3FB8AA3B", "values"),
        ("counter", "predicate", r"@%p\d+ st\.global", ".*"),
    ],
)
def test_a_broken_kernel_is_caught(launch, kind, pattern, how):
    target = Target(launch, "forward")
    assert re.fullmatch(how, target.caught(first(target, kind, pattern)) or "survived")


def test_a_kernel_that_is_not_broken_survives():
    target = Target("counter", "forward")
    mutant = first(target, "barrier", "bar")
    mutant.text = "bar.sync 0;"
    assert target.caught(mutant) is None


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
