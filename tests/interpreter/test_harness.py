"""The harness itself: it must fail kernels that deserve it, and compute what a GPU would."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests.interpreter import harness


@triton.jit
def relay_kernel(data, flag, out, WAIT: tl.constexpr, SIGNAL: tl.constexpr, RELEASE: tl.constexpr):
    """Program 0 writes 16 values and raises a flag, program 1 waits for it and copies them."""
    i = tl.arange(0, 16)
    if tl.program_id(0) == 0:
        tl.store(data + i, i.to(tl.float32))
        if SIGNAL:
            if RELEASE:
                tl.atomic_add(flag, 1, sem="release")
            else:
                tl.atomic_add(flag, 1, sem="relaxed")
    else:
        if WAIT:
            while tl.load(flag, volatile=True) == 0:
                pass
        tl.store(out + i, tl.load(data + i, volatile=True))


def relay(seed, wait=True, signal=True, release=True):
    data, out = torch.full((16,), float("nan")), torch.full((16,), float("nan"))
    flag = torch.zeros(1, dtype=torch.int32)
    with harness.interleaving(seed):
        relay_kernel[(2,)](data, flag, out, WAIT=wait, SIGNAL=signal, RELEASE=release)
    return torch.equal(out, torch.arange(16.0))


def test_a_kernel_that_waits_is_right_on_every_interleaving():
    assert all(relay(seed) for seed in range(50))


def test_a_missing_wait_shows_as_a_wrong_value():
    assert not all(relay(seed, wait=False) for seed in range(20))


def test_a_missing_release_shows_although_the_flag_is_seen():
    assert not all(relay(seed, release=False) for seed in range(20))


def test_a_missing_signal_is_a_deadlock_that_names_who_waits_for_what():
    with pytest.raises(harness.Deadlock) as caught:
        relay(0, signal=False)
    message = str(caught.value)
    assert "program (0, 0, 0) is done" in message
    assert "program (1, 0, 0) waits on flag[0] = 0 at test_harness.py" in message


@triton.jit
def crossed_kernel(data, out):
    """Two programs each wait for the other's half, and only then write their own."""
    me = tl.program_id(0)
    i = tl.arange(0, 4)
    value = tl.load(data + (1 - me) * 4 + i, volatile=True)
    while tl.max((value.to(tl.int32, bitcast=True) == -1).to(tl.int32), axis=0) == 1:
        value = tl.load(data + (1 - me) * 4 + i, volatile=True)
    tl.store(data + me * 4 + i, value)
    tl.store(out + me * 4 + i, value)


def test_programs_that_wait_for_each_other_are_a_deadlock_with_the_missing_elements():
    data = torch.full((2, 4), -1, dtype=torch.int32).view(torch.float32)
    with pytest.raises(harness.Deadlock, match=r"\(0, 0, 0\) lacks 4 of 4 elements.*data\[1, 0\]"):
        crossed_kernel[(2,)](data, torch.empty(2, 4))


@triton.jit
def read_back_kernel(data, out):
    i = tl.arange(0, 8)
    tl.store(data + i, i.to(tl.float32))
    tl.store(out + i, tl.load(data + i))


def test_a_programs_own_store_is_not_there_to_be_read_back():
    data, out = torch.full((8,), -5.0), torch.empty(8)
    read_back_kernel[(1,)](data, out)
    assert torch.equal(out, torch.full((8,), -5.0))
    assert torch.equal(data, torch.arange(8.0))


@triton.jit
def beyond_kernel(data, out, READ: tl.constexpr):
    i = tl.arange(0, 16)
    if READ:
        tl.store(out + i, tl.load(data + i * 4096))
    else:
        tl.store(out + i * 4096, i.to(tl.float32))


@pytest.mark.parametrize("read", [True, False])
def test_an_access_outside_every_argument_is_refused(read):
    with pytest.raises(harness.OutOfBounds, match="reads" if read else "writes"):
        beyond_kernel[(1,)](torch.zeros(16), torch.zeros(16), READ=read)


@triton.jit
def ring_kernel(flags):
    """Four programs, eight rounds: each waits for its neighbour's flag of the round before."""
    me = tl.program_id(0)
    for turn in range(8):
        if turn > 0:
            while tl.load(flags + (me + 1) % 4, volatile=True) < turn:
                pass
        tl.atomic_add(flags + me, 1)


def test_the_same_seed_is_the_same_interleaving_and_another_is_another():
    def handovers(seed):
        with harness.interleaving(seed) as runs:
            data, out, flags = torch.zeros(16), torch.zeros(16), torch.zeros(64, dtype=torch.int32)
            ring_kernel[(4,)](flags)
            relay_kernel[(2,)](data, flags[40:], out, WAIT=True, SIGNAL=True, RELEASE=True)
        return [(r.handovers, r.waits) for r in runs]

    assert [handovers(s) for s in range(20)] == [handovers(s) for s in range(20)]
    assert len({str(handovers(s)) for s in range(20)}) > 3


@triton.jit
def arithmetic_kernel(a, b, product, rounded, PRECISION: tl.constexpr):
    i = tl.arange(0, 16)
    at = i[:, None] * 16 + i[None, :]
    x, y = tl.load(a + at), tl.load(b + at)
    tl.store(product + at, tl.dot(x, y, input_precision=PRECISION))
    tl.store(rounded + at, tl.load(product + at).to(tl.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dot_multiplies_values_not_bit_patterns(dtype):
    a, b = (torch.randn(16, 16).to(dtype) for _ in range(2))
    out = torch.zeros(16, 16)
    arithmetic_kernel[(1,)](a, b, out, torch.zeros(16, 16).bfloat16(), PRECISION="ieee")
    assert (out - a.float() @ b.float()).abs().max() < 1e-5


def test_tf32_keeps_ten_bits():
    a, b = torch.randn(16, 16), torch.eye(16)
    out = torch.zeros(16, 16)
    arithmetic_kernel[(1,)](a, b, out, torch.zeros(16, 16).bfloat16(), PRECISION="tf32")
    assert 2**-13 < ((out - a) / a).abs().max() <= 2**-11
    assert (out.view(torch.int32) & 0x1FFF == 0).all()


def test_float32_to_bfloat16_rounds_to_nearest_even_as_torch_does():
    values = torch.cat([torch.randn(200), torch.tensor([1.998, -1.998, 3.99, 0.0, torch.inf])])
    values = torch.nn.functional.pad(values, (0, 256 - values.numel()))
    values[-3:] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, float("nan")])
    converted = harness._convert(values.numpy(), tl.float32, tl.bfloat16, None)
    expected = values.bfloat16().view(torch.int16).numpy().view(np.uint16)
    number = ~values.isnan().numpy()
    assert np.array_equal(converted[number], expected[number])
    assert converted[-1] == 0x7FC0
