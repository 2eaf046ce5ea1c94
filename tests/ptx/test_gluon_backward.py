"""The Gluon backward as compiled, in the machine, as `test_gluon.py` has the forward."""

import functools
import itertools
import random
import re

import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton", reason="tests/ptx compiles kernels")

from tests.ptx import cases, launching, mutations  # noqa: E402
from tests.ptx.gluon_mutations import (  # noqa: E402
    BARRIERS,
    BROKEN,
    Target,
    all_show,
    how_it_shows,
    replaced,
)
from tests.scan_cases import error  # noqa: E402
from triton_gru.kernel_errors import KernelTimeout, check_errors  # noqa: E402
from triton_gru.kernels import backward  # noqa: E402
from triton_gru.plan.devices import DEVICES, TRITON_OF_GLUON  # noqa: E402
from triton_gru.plan.plan import GLUON, SENTINEL  # noqa: E402

pytestmark = pytest.mark.skipif(
    not triton.__version__.startswith(TRITON_OF_GLUON), reason="not with this version of Triton"
)

NARROW, WIDE = {"block_n": 16}, {"block_n": 32}  # columns a program
LOW, HIGH = {"block_m": 8}, {"block_m": 16}  # batch rows
# Every tile, tail, option, variant, dtype and architecture, as in test_gluon.py. A step's product
# is in the gradient by h0 even with T = 1; the exchange takes T = 2.
SCANS = [
    ((4, 3, 17), "bf16", 90, True, {"lengths": True, "resets": True}),
    ((3, 16, 33), "fp16", 80, False, {"lengths": True, "bias": False}),
    ((1, 1, 48), "bf16", 90, True, {"wanted": WIDE | HIGH}),
    ((2, 17, 66, 2), "bf16", 86, True, {"resets": True, "not_finite": True, "wanted": HIGH}),
    ((4, 3, 65), "fp16", 89, False, {"resets": True, "not_finite": True}),
    ((3, 8, 100), "bf16", 80, True, {"resets": True, "wanted": WIDE | LOW}),
    ((2, 1, 130, 2), "fp16", 100, False, {"lengths": True, "resets": True}),
    ((2, 9, 128), "bf16", 90, True, {"wanted": WIDE | LOW, "force": {"groups_a_launch": 1}}),
    ((2, 3, 256), "bf16", 90, True, {"wanted": NARROW, "apart": True}),
    ((5, 3, 48), "bf16", 90, True, {"lengths": True, "pieces": 2}),  # dy in float32
    ((1, 3, 272), "bf16", 90, False, {"resets": True, "force": {"in_registers": 0}}),
    ((1, 3, 300), "bf16", 100, True, {"not_finite": True, "force": {"in_registers": 1}}),
    ((1, 3, 650), "bf16", 80, True, {"resets": True, "lengths": True}),
    ((1, 3, 768), "fp16", 90, False, {"bias": False}),
    # A chunk is 128 columns.
    ((4, 3, 17), "tf32", 90, True, {"lengths": True, "resets": True}),
    ((3, 3, 34), "tf32", 80, False, {"resets": True, "not_finite": True}),
    ((2, 17, 66, 2), "tf32", 86, True, {"lengths": True, "wanted": WIDE | HIGH}),
    ((2, 3, 272), "tf32", 100, False, {"force": {"in_registers": 1}}),
]


@pytest.mark.parametrize(
    "case", SCANS, ids=lambda case: f"{case[1]}-{'x'.join(map(str, case[0]))}-sm{case[2]}"
)
def test_the_backward_agrees_with_float64(case):
    shape, precision, arch, reset_after, options = case
    options = dict(options)
    apart = options.pop("apart", False)
    scan = cases.Scan(shape, precision, GLUON, arch, reset_after, **options)
    outcome = scan.run_backward(seed=3, apart=apart)
    assert "scan_backward_gluon_kernel" in [launch.name for launch in outcome.launches]
    assert not outcome.wrong()


@pytest.mark.parametrize(("launch", "reset_after"), [(GLUON, True), (SENTINEL, False)])
def test_both_backwards_take_what_the_forward_saved(launch, reset_after):
    """Also that of the Triton kernel, the other choice of a plan: it exchanges gates' gradients."""
    shape, precision, arch = (
        ((4, 3, 33), "bf16", 90) if reset_after else ((3, 3, 18, 2), "fp16", 80)
    )
    scan = cases.Scan(
        shape, precision, GLUON, arch, reset_after, save_gates=True, resets=True, lengths=True
    )
    scan.plans[1] = cases.plan_of(shape, "backward", launch, arch, precision, reset_after, {})
    assert not scan.run().wrong()


def test_a_gradient_passes_many_steps_by_an_update_gate_near_one():
    """By z = .999, in bfloat16 1, it would be off by a hundredth after 12 steps."""
    H = 17
    scan = cases.Scan((12, 1, H), "bf16", GLUON, 90, True)
    scan.case.arguments[0][..., H : 2 * H] += 7
    scan.case.dy[:-1] = 0
    outcome = scan.run_backward()
    assert outcome.errors["h0"] < 4e-3 and not outcome.wrong()


@functools.cache
def _scan(reset_after, polls=cases.POLLS):
    return cases.Scan((4, 3, 33), "bf16", GLUON, 90, reset_after, lengths=True, polls=polls)


@pytest.mark.parametrize("reset_after", [True, False])
@pytest.mark.parametrize("seed", [1, 2])
def test_other_interleavings_agree(reset_after, seed):
    assert not _scan(reset_after).run_backward(seed=seed, apart=seed % 3 == 2).wrong()


@pytest.mark.parametrize("reset_after", [True, False])
def test_a_wait_that_is_given_up_is_reported_and_poisons_what_depends_on_it(reset_after):
    scan, reported = _scan(reset_after, polls=0), 0
    y = scan.exact["y"].bfloat16()
    for seed in range(6):
        with launching.emulated(90, seed=seed):
            found = backward.scan_backward(
                scan.case.dy, y, *scan.case.arguments, **scan.case.options, plan=scan.plans[1],
                polls=0,
            )[0]  # fmt: skip
        lacking = found.isnan()
        if lacking.any():
            reported += 1
            with pytest.raises(KernelTimeout, match=r"program \d of .* timed out .* at step [0-4]"):
                check_errors(y.device)
        else:  # the gradient by h0 alone may lack something, or the step too many
            check_quietly(y.device)
        exact = scan.exact["gates_x"].masked_fill(lacking, 0)
        assert error(found.masked_fill(lacking, 0), exact) < 0.01
    assert reported


def check_quietly(device):
    try:
        check_errors(device)
    except KernelTimeout as late:
        assert "at step 3" in str(late) or "at step 4" in str(late)


# What the backward has of its own, and some of what it shares with the forward (test_gluon.py).
OWN = BARRIERS | {
    "words of the factors exchanged": (
        replaced(r"(ld\.global\.v4\.b32 \{)(%r\d+), (%r\d+)", r"\1\3, \2"),
        ("values",),
    ),
    "another gate's factors": (  # the rows of the targets have 48 elements
        replaced(r"(ld\.global\.v4\.b32 [^;]*) \+ 96\]", r"\1 + 192]"),
        ("values",),
    ),
}
SHARED = ("no poll", "a reload", "a store of rows that are not", "words of an operand exchanged")


# With reset_after the loop has a barrier in each of two steps, else two in one, and two polls.
@pytest.mark.parametrize(
    ("title", "reset_after"),
    [
        *itertools.product(OWN, (True, False)),
        *((title, False) for title in SHARED),
        *(
            pytest.param(title, False, marks=pytest.mark.soak)
            for title in BROKEN
            if title not in (*OWN, *SHARED)
        ),
    ],
)
def test_a_broken_kernel_is_caught(title, reset_after):
    change, ways = (BROKEN | OWN)[title]
    assert how_it_shows(Target(GLUON, "backward", reset_after), change) in ways


def test_a_broken_kernel_of_32_bits_is_caught():
    """What differs from 16 bits: the planes of the factors, their words, and the store."""
    scan = cases.Scan((3, 3, 33), "tf32", GLUON, 90, True)
    all_show(
        scan.run_backward,
        {
            replaced(r"(ld\.global\.v4\.b32 [^;]*) \+ 192\]", r"\1 + 384]"): "values",
            replaced(r"(ld\.global\.v4\.b32 \{)(%r\d+), (%r\d+)", r"\1\3, \2"): "values",
            replaced("@stored st", "st"): "OutOfBounds",
        },
    )


# -- make soak ---------------------------------------------------------------------------------

# With bfloat16 and an odd H torch's own product on a CPU, of the gates before the kernel, may
# spread NaN to the row before: not_finite takes an even one.
SHAPES = [
    (4, 3, 17), (1, 1, 33), (4, 17, 18), (3, 3, 65), (3, 16, 32), (4, 20, 48, 2), (3, 3, 128),
    (4, 1, 130), (3, 3, 100, 2), (3, 16, 160), (2, 3, 256), (2, 20, 300), (1, 16, 320), (2, 3, 650),
    (3, 1, 384), (1, 16, 768), (1, 3, 1000), (1, 16, 1024),
]  # fmt: skip
TILES = [LOW | NARROW, LOW | WIDE, HIGH | NARROW, HIGH | WIDE]
ORDERS = 4


def listed():
    """Every shape, dtype, variant and architecture; the rest as a seeded generator picks."""
    every = itertools.product(SHAPES, ("bf16", "fp16", "tf32"), (True, False), DEVICES)
    for n, (shape, precision, reset_after, arch) in enumerate(every):
        r = random.Random(n)
        wanted = r.choice(TILES)
        force = [{}, {}, {"groups_a_launch": 1}]
        if wanted == LOW | NARROW and shape[2] <= 512:  # within 99 KiB of shared memory
            force += [{"in_registers": 0}] * 2
        not_finite = r.random() < 0.2 and shape[2] % 2 == 0
        options = {
            # A row that is not finite and has no element makes the weights' gradient NaN, by NaN
            # times 0 in the product over all steps (backward.py); not so in the exact one. No scan
            # is given such a row (functional.gru).
            "lengths": r.random() < 0.5 and not not_finite,
            "resets": r.random() < 0.5,
            "bias": r.random() < 0.8,
            "not_finite": not_finite,
            "wanted": wanted,
            "force": r.choice(force),
            "pieces": r.choice([None, None, 2]),
            "data": r.randrange(1000),
        }
        yield (shape, precision, GLUON, arch, reset_after), options


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(36))
def test_every_case(part):
    failures = {}
    for n, (arguments, options) in enumerate(listed()):
        if n % 36 != part:
            continue
        scan = cases.Scan(*arguments, **options)
        if scan.plans is None:  # no such tile there
            scan = cases.Scan(*arguments, **options | {"wanted": {}, "force": {}})
        if scan.plans is None:  # float32, and larger than fits
            continue
        for seed in range(ORDERS):
            try:
                wrong = scan.run_backward(seed=seed, apart=seed == 3).wrong()
            except Exception as raised:  # whatever it is, the case is named with it
                wrong = f"{type(raised).__name__}: {raised}"
            if wrong:
                failures[n] = f"{arguments} {options} seed {seed}: {wrong}"
    assert not failures, "\n".join(f"case {n} {text}" for n, text in failures.items())


# What may be without its guard: loads of rows and columns that are not there, as their values are
# left out later, and loads of a poll, which read again what has arrived.
UNGUARDED = ("ld.global.b16", "ld.global.b32", "ld.relaxed")


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("reset_after", [True, False])
@pytest.mark.parametrize("kind", ["barrier", "predicate"])
def test_every_mutant_of_a_kind_is_caught(kind, reset_after):
    target = Target(GLUON, "backward", reset_after)
    mutants = [
        m for m in mutations.mutants(target, kind) if not m.instruction.op.startswith(UNGUARDED)
    ]
    survivors = [m for m in mutants if target.caught(m) is None]
    assert mutants and all(m.instruction.op == "st.global.b32" for m in survivors)
    # To one address: the error word of the step, which nobody reads while the program's is 0.
    assert len({re.search(r"\[\s*(%rd\d+)", m.text).group(1) for m in survivors}) <= 1
