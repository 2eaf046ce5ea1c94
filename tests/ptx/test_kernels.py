"""The project's kernels as compiled, in the machine: values against float64, and what it checks."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="tests/ptx compiles kernels")

from tests.ptx import cases, coverage  # noqa: E402
from triton_gru.kernel_errors import KernelTimeout  # noqa: E402

# Between them every launch, direction, variant, precision, option and architecture.
SCANS = [
    ((5, 3, 17), "bf16", "single", 90, True, {"lengths": True, "save_gates": True}),
    ((3, 16, 32), "fp16", "single", 80, False, {"resets": True, "bias": False}),
    ((4, 1, 33), "tf32", "single", 90, True, {"resets": True, "pieces": 2}),
    ((3, 3, 33), "ieee", "single", 86, False, {"not_finite": True}),
    ((3, 20, 18, 2), "bf16", "single", 100, False, {"lengths": True, "not_finite": True}),
    ((4, 3, 65), "bf16", "sentinel", 90, True, {"lengths": True, "not_finite": True}),
    ((3, 3, 65), "fp16", "sentinel", 80, False, {"resets": True, "save_gates": True}),
    ((3, 16, 48), "tf32", "sentinel", 90, False, {"lengths": True, "apart": True}),
    ((3, 3, 33), "ieee", "sentinel", 89, True, {"resets": True, "not_finite": True}),
    ((3, 3, 100, 2), "bf16", "sentinel", 90, True, {"force": {"groups_a_launch": 1}}),
    ((4, 1, 130), "bf16", "sentinel", 90, False, {"pieces": 2}),
    ((3, 20, 48), "fp16", "sentinel", 100, True, {"wanted": {"by_block": True}}),
    ((4, 3, 65), "bf16", "counter", 90, False, {"lengths": True, "resets": True}),
    ((3, 3, 48), "fp16", "counter", 80, True, {"save_gates": True, "not_finite": True}),
    ((3, 16, 33), "tf32", "counter", 90, True, {"bias": False, "apart": True}),
    ((3, 3, 33), "ieee", "counter", 90, False, {"lengths": True}),
    ((3, 3, 64, 2), "bf16", "counter", 86, True, {"force": {"groups_a_launch": 1}}),
    ((2, 3, 256), "bf16", "best", 90, True, {}),
    # The tail is 16 columns of K a warp: a narrow integer in the mask of a dot operand would make
    # the compiler drop half of it (Triton 3.7.1).
    ((3, 3, 160), "bf16", "counter", 90, True, {"resets": True}),
    ((3, 16, 1), "fp16", "single", 89, True, {"lengths": True}),
]  # fmt: skip


@pytest.mark.parametrize(
    "case", SCANS, ids=lambda case: f"{case[2]}-{case[1]}-{case[0][2]}-sm{case[3]}"
)
def test_scans_agree_with_float64(case):
    *arguments, options = case
    outcome = cases.run_scan(*arguments, seed=3, **options)
    assert outcome is not None, "the planner has no such plan"
    assert not outcome.wrong()


STEPS = [(1, 17, "bf16", 90, True), (3, 48, "fp16", 80, False), (20, 33, "tf32", 90, True),
         (3, 130, "ieee", 100, False)]  # fmt: skip


@pytest.mark.parametrize("case", STEPS, ids=lambda case: f"{case[2]}-{case[1]}-sm{case[3]}")
def test_steps_agree_with_float64(case):
    assert not cases.run_step(*case).wrong()


@pytest.mark.parametrize("launch", ["sentinel", "counter"])
@pytest.mark.parametrize("seed", range(6))
def test_other_interleavings_agree(launch, seed):
    """One compiled kernel, many orders of its programs and warps."""
    outcome = cases.run_scan(
        (3, 3, 33), "bf16", launch, 90, False, lengths=True, seed=seed, apart=seed % 3 == 2
    )
    assert not outcome.wrong()


@pytest.mark.parametrize("launch", ["sentinel", "counter"])
def test_a_wait_that_is_given_up_is_reported_in_the_error_words(launch):
    """Without the looks that a healthy run takes, some program waits in vain and says so."""
    with pytest.raises(KernelTimeout, match="timed out waiting"):
        for seed in range(20):
            cases.run_scan((4, 3, 65), "bf16", launch, 90, True, polls=0, seed=seed)


def test_a_case_fails_whose_values_are_wrong(monkeypatch):
    """The comparison itself: gradients of another loss are none of this one's."""
    case = cases.make_case(3, 3, 17, reset_after=True, dtype=torch.bfloat16)
    exact = case.exact
    monkeypatch.setattr(case, "exact", lambda: (exact()[0] * 1.02, exact()[1]))
    outcome = cases.run_scan((3, 3, 17), "bf16", "single", 90, True, case=case)
    assert outcome.wrong().keys() == {"y"}


def test_the_soak_leaves_no_shape_out():
    """Batches, sizes, tails of every kind, and options, as the cases of `make soak` have them."""
    scans = list(coverage.scans())
    launches = {case.arguments[2] for case in scans}
    assert launches == set(coverage.LAUNCHES)
    for launch in launches:
        some = [case for case in scans if case.arguments[2] == launch]
        shapes = {case.arguments[0] for case in some}
        assert {shape[1] for shape in shapes} >= {1, 3, 16, 20}
        assert {(*shape, 1)[3] for shape in shapes} == {1, 2}
        assert {case.arguments[1] for case in some} == set(cases.PRECISIONS)
        assert {case.arguments[3] for case in some} == set(coverage.ARCHS)
        assert {case.arguments[4] for case in some} == {True, False}
        for name in ("lengths", "resets", "bias", "save_gates", "not_finite"):
            assert {case.options[name] for case in some} == {True, False}, name
        assert {case.options["pieces"] for case in some} == {None, 2}
    hidden = {case.arguments[0][2] for case in scans}
    assert {1, 650} <= hidden
    groups = [case for case in scans if case.arguments[2] != "single"]
    assert {case.seeds for case in groups} == {coverage.ORDERS}
    assert any(case.options["force"].get("groups_a_launch") == 1 for case in groups)
    found = {key for case in groups for key in tails_of(case)}
    assert found >= {
        (warps, several, share, whole)
        for warps in (4, 8)
        for several, share in ((False, 1), (True, 1), (True, 2), (True, 4))
        for whole in (True, False)
        # The tail of 8 warps is at most a half: a warp takes 16 of the 128 or 256 columns.
        if (warps, share) != (8, 4)
    }


def tails_of(case):
    """(warps, whether K has several pieces, the tail's share of one, whether H fills it)."""
    hidden = case.arguments[0][2]
    for plan in cases.Scan(*case.arguments, **case.options).plans:
        yield plan.warps, plan.k_blocks > 1, plan.block_k // plan.tail, hidden == plan.span


# -- make soak ---------------------------------------------------------------------------------

PARTS = 100


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(PARTS))
def test_every_case(part):
    failures = {}
    for n, case in enumerate(coverage.listed()):
        if n % PARTS == part:
            why, _, _ = case.verdict()
            if why:
                failures[n] = f"{case}: {why}"
    assert not failures, "\n".join(f"case {n} {text}" for n, text in failures.items())
