"""What the backward holds while it runs, and what the forward keeps for it."""

import gc

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.scan_cases import make_case, make_plan
from triton_gru import GRU
from triton_gru.kernels import backward, launch
from triton_gru.kernels.backward import scan_backward
from triton_gru.kernels.forward import scan_forward

both_variants = pytest.mark.parametrize("reset_after", [True, False], ids=["after", "before"])


def peak_bytes(call) -> int:
    """The most that torch had allocated at once during a call, beyond what it had before."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        results = call()
    del results
    changes = [
        (event.start_ns(), event.nbytes())
        for event in profile.kineto_results.events()
        if event.name() == "[memory]"
    ]
    held = peak = 0
    for _, change in sorted(changes):
        held += change
        peak = max(peak, held)
    return peak


@both_variants
def test_memory_of_the_backward_is_bounded_by_pieces(reset_after, monkeypatch):
    """Beyond its results, the scan's backward holds temporaries of one piece, not of all steps."""
    launches = launch.launches

    def collected(*arguments):
        yield from launches(*arguments)
        gc.collect()  # the interpreter leaves its copies of a launch's arguments in a circle

    monkeypatch.setattr(launch, "launches", collected)
    case = make_case(16, 32, 32, reset_after=reset_after, dtype=torch.bfloat16, bias=False)
    plan = make_plan(case, "forward", "single")
    y = scan_forward(*case.arguments, **case.options, plan=plan)
    plan = make_plan(case, "backward", "single")

    def beyond_results() -> float:
        def call():
            return scan_backward(case.dy, y, *case.arguments, **case.options, plan=plan)

        results = sum(r.nbytes for r in call() if r is not None)
        return (peak_bytes(call) - results) / y.nbytes

    whole = beyond_results()
    monkeypatch.setattr(backward, "PIECE_STEPS", 2)
    pieces = beyond_results()
    print(f"temporaries of the backward, in units of y: {whole:.1f} whole, {pieces:.1f} in pieces")
    assert whole > 4
    assert pieces < whole / 2


def kept_beyond(module: GRU, x: torch.Tensor) -> float:
    """Bytes of storage kept for the backward beyond parameters, x and y, as a share of y's."""
    given = {p.untyped_storage()._cdata for p in [*module.parameters(), x]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in given:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y, _ = module(x)
    size = y.numel() * y.element_size()
    return (sum(kept.values()) - size) / size


# Rows are padded to a multiple of 16 elements, one slot a direction is h0's, and h0 is kept. So at
# most 10 % is exceeded by short sequences, and by small states of an odd size, of few bytes both.
@pytest.mark.parametrize(
    ("T", "H", "at_most"),
    [(64, 257, 0.1), (64, 1000, 0.1), (20, 256, 0.1), (256, 177, 0.1), (256, 100, 0.14)],
)
@pytest.mark.parametrize("bidirectional", [False, True])
@both_variants
def test_little_is_kept_beyond_x_and_y(reset_after, bidirectional, T, H, at_most):
    with FakeTensorMode():
        options = {"bidirectional": bidirectional, "reset_after": reset_after}
        module = GRU(8, H, backend="triton", dtype=torch.bfloat16, **options)
        beyond = kept_beyond(module, torch.randn(T, 4, 8, dtype=torch.bfloat16))
    D, padded = 1 + bidirectional, -(-H // 16) * 16
    # Two directions' weights are stacked, which keeps a copy of the parameters besides.
    stacked = sum(p.numel() for p in module.parameters()) / (T * 4 * D * H) if bidirectional else 0
    # y is the scan's buffer, which holds h0 too and pads rows; but two directions' padded columns
    # do not stand side by side, so there y is a tensor of its own.
    buffer = (T + D) / T * padded / H if D == 1 or padded == H else 1
    expected = buffer - 1 + 1 / T
    assert beyond - stacked == pytest.approx(expected, abs=1e-6)
    if D == 1:
        assert beyond <= at_most


@both_variants
def test_no_more_is_kept_when_the_kernels_run(reset_after):
    module = GRU(8, 20, backend="triton", reset_after=reset_after)
    x = torch.randn(5, 2, 8)
    with FakeTensorMode() as mode:
        fake = GRU(8, 20, backend="triton", reset_after=reset_after)
        expected = kept_beyond(fake, mode.from_tensor(x))
    assert kept_beyond(module, x) == pytest.approx(expected)


def test_saved_gates_are_three_times_y_more():
    module = GRU(8, 32, backend="triton", save_gates=True)
    without = GRU(8, 32, backend="triton")
    x = torch.randn(5, 2, 8)
    assert kept_beyond(module, x) - kept_beyond(without, x) == pytest.approx(3)
