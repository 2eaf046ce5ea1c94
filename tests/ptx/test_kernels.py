"""The project's kernels as compiled, in the machine: values against float64, and what it checks."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="tests/ptx compiles kernels")

from tests.ptx import cases, coverage  # noqa: E402
from triton_gru.kernels.launch import KernelTimeout  # noqa: E402

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
    with pytest.raises(KernelTimeout, match="gave up"):
        for seed in range(20):
            cases.run_scan((4, 3, 65), "bf16", launch, 90, True, polls=0, seed=seed)


def test_a_case_fails_whose_values_are_wrong(monkeypatch):
    """The comparison itself: gradients of another loss are none of this one's."""
    case = cases.make_case(3, 3, 17, reset_after=True, dtype=torch.bfloat16)
    exact = case.exact
    monkeypatch.setattr(case, "exact", lambda: (exact()[0] * 1.02, exact()[1]))
    outcome = cases.run_scan((3, 3, 17), "bf16", "single", 90, True, case=case)
    assert outcome.wrong().keys() == {"y"}


# -- make soak ---------------------------------------------------------------------------------

CHUNK = 25
EVERY = coverage.listed()


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("first", range(0, len(EVERY), CHUNK))
def test_every_case(first):
    failures = {}
    for n, case in enumerate(EVERY[first : first + CHUNK], first):
        why, _ = coverage.verdict(*case)
        if why:
            failures[n] = f"{case[1:]}: {why}"
    assert not failures, "\n".join(f"case {n} {text}" for n, text in failures.items())


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("precision", cases.PRECISIONS)
@pytest.mark.parametrize("launch", ["sentinel", "counter"])
@pytest.mark.parametrize("reset_after", [True, False])
def test_twenty_orders_of_every_group_kernel(launch, precision, reset_after):
    for number, shape in enumerate([(4, 3, 65), (3, 20, 48, 2), (3, 3, 130)]):
        for seed in range(20):
            outcome = cases.run_scan(
                shape, precision, launch, (90, 80, 100)[number], reset_after, seed=seed,
                lengths=True, resets=True, apart=seed % 4 == 3,
            )  # fmt: skip
            assert not outcome.wrong(), (shape, seed)
