"""The Gluon forward as compiled, in the machine: values, orders, waits given up, broken kernels.

Triton's interpreter does not run Gluon, so nothing of it is in tests/interpreter: there the planner
takes the Triton kernels.
"""

import functools
import itertools
import random

import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton", reason="tests/ptx compiles kernels")

from tests.ptx import cases, launching  # noqa: E402
from tests.ptx.gluon_mutations import (  # noqa: E402
    BARRIERS,
    BROKEN,
    RELOAD,
    TEST,
    Target,
    all_show,
    dropped,
    how_it_shows,
    replaced,
)
from tests.scan_cases import error  # noqa: E402
from triton_gru.kernel_errors import KernelTimeout, check_errors  # noqa: E402
from triton_gru.kernels import forward  # noqa: E402
from triton_gru.plan.devices import DEVICES, TRITON_OF_GLUON  # noqa: E402
from triton_gru.plan.plan import GLUON  # noqa: E402

pytestmark = pytest.mark.skipif(
    not triton.__version__.startswith(TRITON_OF_GLUON), reason="not with this version of Triton"
)

NARROW, WIDE = {"block_n": 16}, {"block_n": 32}  # columns a program
LOW, HIGH = {"block_m": 8}, {"block_m": 16}  # batch rows
# Between them every tile, tail, option, variant and dtype. A chunk is 256 columns: 17 to 250 are
# part of one, 256 and 512 whole ones; 272 leaves 16 to the last one, 300 and 650 end within 16.
SCANS = [
    ((4, 3, 17), "bf16", 90, True, {"lengths": True, "resets": True}),
    ((3, 16, 33), "fp16", 80, False, {"lengths": True, "bias": False}),
    ((1, 1, 48), "bf16", 100, True, {"wanted": WIDE | HIGH}),
    ((3, 20, 65, 2), "bf16", 90, True, {"lengths": True, "not_finite": True, "wanted": HIGH}),
    ((4, 3, 65), "fp16", 90, False, {"resets": True, "not_finite": True}),
    ((3, 16, 100), "bf16", 80, True, {"resets": True, "wanted": WIDE | LOW}),
    ((4, 1, 130, 2), "fp16", 100, False, {"lengths": True, "resets": True}),
    ((3, 20, 128), "bf16", 90, True, {"wanted": WIDE | LOW, "force": {"groups_a_launch": 1}}),
    ((3, 3, 256), "bf16", 90, True, {"wanted": NARROW, "apart": True}),
    ((1, 16, 250), "fp16", 80, True, {"wanted": WIDE | HIGH}),
    ((1, 3, 272), "bf16", 90, False, {"resets": True, "force": {"in_registers": 0}}),
    ((1, 3, 300), "bf16", 100, True, {"not_finite": True, "force": {"in_registers": 1}}),
    ((1, 3, 512), "fp16", 90, False, {"lengths": True}),
    ((1, 1, 520), "bf16", 80, True, {"resets": True}),
    ((1, 3, 650), "bf16", 90, True, {"resets": True, "lengths": True, "wanted": NARROW}),
    ((1, 16, 768), "fp16", 90, False, {"bias": False}),
    ((1, 3, 1024), "bf16", 100, True, {}),
    # A chunk is 128 columns.
    ((4, 3, 17), "tf32", 90, True, {"lengths": True, "resets": True}),
    ((3, 3, 33), "tf32", 80, False, {"resets": True, "not_finite": True}),
    ((2, 17, 66, 2), "tf32", 100, True, {"wanted": WIDE | HIGH, "lengths": True}),
    ((2, 3, 272), "tf32", 90, False, {"force": {"in_registers": 1}}),
]


@pytest.mark.parametrize(
    "case", SCANS, ids=lambda case: f"{case[1]}-{'x'.join(map(str, case[0]))}-sm{case[2]}"
)
def test_the_forward_agrees_with_float64(case):
    shape, precision, arch, reset_after, options = case
    options = dict(options)
    apart = options.pop("apart", False)
    scan = cases.Scan(shape, precision, GLUON, arch, reset_after, **options)
    assert scan.plans[0].kernel == GLUON
    outcome = scan.run_forward(seed=3, apart=apart)
    assert "scan_forward_gluon_kernel" in outcome.launches[0].ptx
    assert not outcome.wrong()


def test_a_weight_that_begins_anywhere_is_read():
    """A view of a larger tensor, 2 bytes beyond a multiple of 16."""
    scan = cases.Scan((1, 1, 48), "bf16", GLUON, 90, True)
    weight = scan.case.arguments[2]
    moved = weight.new_empty(weight.numel() + 16)
    first = (-moved.data_ptr() // 2) % 8 + 1
    scan.case.arguments[2] = moved[first : first + weight.numel()].view_as(weight).copy_(weight)
    assert scan.case.arguments[2].data_ptr() % 16 == 2
    assert not scan.run_forward().wrong()


@functools.cache
def _scan(reset_after, polls=cases.POLLS):
    return cases.Scan((4, 3, 33), "bf16", GLUON, 90, reset_after, lengths=True, polls=polls)


@pytest.mark.parametrize("reset_after", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_other_interleavings_agree(reset_after, seed):
    assert not _scan(reset_after).run_forward(seed=seed, apart=seed % 3 == 2).wrong()


@pytest.mark.parametrize("reset_after", [True, False])
def test_a_wait_that_is_given_up_is_reported_and_poisons_what_depends_on_it(reset_after):
    """With one look a wait some program gives up; what it computes of what it lacks is NaN."""
    scan, reported = _scan(reset_after, polls=0), 0
    for seed in range(12):
        with launching.emulated(90, seed=seed):
            y = forward.scan_forward(
                *scan.case.arguments, **scan.case.options, plan=scan.plans[0], polls=0
            )
        lacking = y.isnan()
        if lacking.any():
            reported += 1
            with pytest.raises(KernelTimeout, match=r"program \d of .* timed out .* at step [0-3]"):
                check_errors(y.device)
        else:  # the step too many may have given up
            check_quietly(y.device)
        exact = scan.exact["y"].masked_fill(lacking, 0)
        assert error(y.masked_fill(lacking, 0), exact) < 0.01
    assert reported


def check_quietly(device):
    try:
        check_errors(device)
    except KernelTimeout as late:
        assert "at step 4" in str(late)


def test_a_broken_kernel_of_32_bits_is_caught():
    """What differs from 16 bits: the test of a word, and the store."""
    scan = cases.Scan((3, 3, 33), "tf32", GLUON, 90, True)
    all_show(
        scan.run_forward,
        {
            dropped(r"max\.u32 lacking[^;]*;", 2): "values",
            dropped(RELOAD): "KernelTimeout",
            replaced("@stored st", "st"): "OutOfBounds",
            replaced(r"(ld\.global\.nc\.v4\.b32 \{)(%r\d+), (%r\d+)", r"\1\3, \2"): "values",
        },
    )


def test_a_broken_poll_before_sm_90_is_caught():
    """It has no maximum of pairs, and tests each word."""
    scan = cases.Scan((3, 3, 33), "bf16", GLUON, 80, True)
    test = r"lop3\.b32 lacking[^;]*;"
    halves = replaced("and.b32 lacking, lacking, 0x80008000", "and.b32 lacking, lacking, 0x8000")
    all_show(scan.run_forward, {dropped(test, 2): "values", halves: "values"})


# -- mutations ---------------------------------------------------------------------------------

TWO_CHUNKS = (3, 3, 300), (2, 9, 290)


# With reset_after the loop has a barrier in each of two steps, else two in one, and two polls.
@pytest.mark.parametrize(
    ("title", "reset_after"),
    [*((title, False) for title in BROKEN), *((title, True) for title in BARRIERS)],
)
def test_a_broken_kernel_is_caught(title, reset_after):
    change, ways = BROKEN[title]
    assert how_it_shows(Target(GLUON, "forward", reset_after), change) in ways


def test_a_kernel_that_is_not_broken_survives():
    target = Target(GLUON, "forward", True)
    assert target.fails(target.ptx, 2) is None


@pytest.mark.soak
@pytest.mark.parametrize("change", [dropped(RELOAD, 1), dropped(TEST, 5), dropped(TEST, 9)])
@pytest.mark.parametrize("reset_after", [True, False])
def test_a_chunk_that_is_left_out_is_caught(change, reset_after):
    target = Target(GLUON, "forward", reset_after, TWO_CHUNKS)
    assert target.fails(change(target.ptx), 6) in ("values", "KernelTimeout")


# -- make soak ---------------------------------------------------------------------------------

SHAPES = [
    (4, 3, 17), (1, 1, 33), (4, 17, 18), (3, 3, 65), (3, 16, 32), (4, 20, 48, 2), (3, 3, 128),
    (4, 1, 130), (3, 3, 100, 2), (3, 16, 160), (2, 3, 256), (2, 20, 300), (1, 16, 320), (1, 3, 650),
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
        options = {
            "lengths": r.random() < 0.5,
            "resets": r.random() < 0.5,
            "bias": r.random() < 0.8,
            "not_finite": r.random() < 0.2,
            "wanted": wanted,
            "force": r.choice(force),
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
        if scan.plans is None:  # 17 columns of two programs of 16, and none of 32
            scan = cases.Scan(*arguments, **options | {"wanted": {}, "force": {}})
        if scan.plans is None:  # float32, and larger than fits
            continue
        for seed in range(ORDERS):
            try:
                wrong = scan.run_forward(seed=seed, apart=seed == 3).wrong()
            except Exception as raised:  # whatever it is, the case is named with it
                wrong = f"{type(raised).__name__}: {raised}"
            if wrong:
                failures[n] = f"{arguments} {options} seed {seed}: {wrong}"
    assert not failures, "\n".join(f"case {n} {text}" for n, text in failures.items())
