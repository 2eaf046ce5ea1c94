"""Kernels with inline assembly: loops, votes, relaxed loads and stores, registers of their own."""

import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton", reason="compiles kernels")

import triton.language as tl  # noqa: E402

from tests.ptx.errors import Deadlock  # noqa: E402
from tests.ptx.launching import emulated  # noqa: E402

SEND = tl.constexpr("st.relaxed.gpu.global.b32 [$1], $2;\nmov.b32 $0, 0;")
# Looks until no lane of the warp holds -1, or `polls` times; counts the looks.
RECEIVE = tl.constexpr(
    """{
    .reg .pred p, q, again; .reg .b32 n;
    mov.b32 n, 0;
    LOOK:
    ld.relaxed.gpu.global.b32 $0, [$2];
    setp.eq.s32 p, $0, -1;
    vote.sync.any.pred q, p, 0xffffffff;
    add.s32 n, n, 1;
    setp.lt.and.s32 again, n, $3, q;
    @!again bra DONE;
    bra.uni LOOK;
    DONE:
    { .reg .b32 n2; shl.b32 n2, n, 1; shr.u32 $1, n2, 1; }
    }"""
)


@triton.jit
def ring_kernel(words, looks, steps, polls, N: tl.constexpr, SIZE: tl.constexpr):
    """Program p passes on to p + 1 what it received and p, once for each step."""
    p, i = tl.program_id(0), tl.arange(0, SIZE)
    value = i
    for step in range(steps):
        at = words + (step * N + p) * SIZE + i
        if p != 0:
            value, seen = tl.inline_asm_elementwise(
                RECEIVE, "=&r,=&r,l,r", [at - SIZE, polls], [tl.int32, tl.int32], False, 1
            )
            tl.store(looks + (step * N + p) * SIZE + i, seen)
        tl.inline_asm_elementwise(SEND, "=r,l,r", [at, value + p], tl.int32, False, 1)


def ring(programs, polls=1000, cooperative=True, **options):
    words = torch.full((3, programs, 128), -1, dtype=torch.int32)
    looks = torch.zeros_like(words)
    with emulated(90, **options):
        ring_kernel[(programs,)](words, looks, 3, polls, programs, 128, num_warps=4,
                                 launch_cooperative_grid=cooperative)  # fmt: skip
    return words, looks


@pytest.mark.parametrize("apart", [False, True])
def test_relaxed_words_go_round_a_ring(apart):
    expected = torch.arange(128) + torch.tensor([0, 1, 3])[:, None]
    waited = 0
    for seed in range(5):
        words, looks = ring(3, seed=seed, apart=apart)
        assert torch.equal(words, expected.int().expand(3, 3, 128))
        waited += int((looks > 1).sum())
    assert waited  # some had to look again


def test_a_wait_is_given_up_when_its_looks_are_spent():
    words, looks = ring(3, polls=7, cooperative=False, seed=1)
    assert looks.max() == 7 or (words != -1).all()
    alone = [ring(2, polls=7, cooperative=False, seed=seed)[1].max() for seed in range(6)]
    assert 7 in alone


def test_a_wait_without_end_is_a_deadlock():
    with pytest.raises(Deadlock, match=r"ring_kernel.*seed"):
        for seed in range(6):
            ring(2, polls=1 << 30, cooperative=False, seed=seed)
