"""The layer with backend="triton" against the same layer in float64, and against cuDNN's error."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from tests.gpu.device import DEVICE, DTYPES, precision, size
from tests.scan_cases import assert_near
from tests.tolerances import assert_close
from triton_gru import GRU, GRUCell

BOTH = pytest.mark.parametrize("reset_after", [True, False], ids=["after", "before"])
# Worst share of nn.GRU's error that ours may have, in the same dtype on the same inputs.
OF_CUDNN = 1.5


def twins(*sizes, dtype, **options) -> tuple[GRU, GRU]:
    """The layer on the kernels, and the equations in float64 with the same weights."""
    ours = GRU(*sizes, **options, backend="triton").to(DEVICE, dtype)
    exact = GRU(*sizes, **options, backend="reference").to(DEVICE, torch.float64)
    exact.load_state_dict(ours.state_dict())
    return ours, exact


def outcome(module, x, h0, dy, dh, packed=None) -> dict[str, torch.Tensor]:
    """Output, last state and every gradient, computed in the dtype of the module."""
    dtype = next(module.parameters()).dtype
    leaf, first = (v.detach().to(dtype, copy=True).requires_grad_() for v in (x, h0))
    given = leaf if packed is None else pack_padded_sequence(leaf, packed, enforce_sorted=False)
    y, h = module(given, first)
    y = y if packed is None else y.data
    parameters = dict(module.named_parameters())
    cotangents = [dy.to(dtype)[: y.shape[0]].reshape(-1)[: y.numel()].view_as(y), dh.to(dtype)]
    grads = torch.autograd.grad([y, h], [leaf, first, *parameters.values()], cotangents)
    names = ["x", "h0", *parameters]
    return {"y": y.detach(), "h_n": h.detach()} | dict(zip(names, grads, strict=True))


def problem(T, B, I, H, D, L, dtype):  # noqa: E741
    shapes = ((T, B, I), (L * D, B, H), (T, B, D * H), (L * D, B, H))
    return [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]


@BOTH
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("hidden", [64, 300])
def test_output_last_state_and_every_gradient(hidden, name, reset_after):
    T, B, H = size(50, 2), size(17, 3), size(hidden, 20)
    with precision(name) as dtype:
        ours, exact = twins(
            24, H, num_layers=2, bidirectional=True, reset_after=reset_after, dtype=dtype
        )
        arguments = problem(T, B, 24, H, 2, 2, dtype)
        assert_near(outcome(ours, *arguments), outcome(exact, *arguments), name)


@BOTH
@pytest.mark.parametrize("hidden", [64, 300])
def test_packed_sequences(hidden, reset_after):
    T, B, H = size(50, 3), size(17, 3), size(hidden, 20)
    lengths = torch.randint(1, T + 1, (B,))
    lengths[B // 2] = T
    with precision("bfloat16") as dtype:
        ours, exact = twins(24, H, bidirectional=True, reset_after=reset_after, dtype=dtype)
        arguments = problem(T, B, 24, H, 2, 1, dtype)
        results = [outcome(module, *arguments, packed=lengths) for module in (ours, exact)]
        assert_near(*results, "bfloat16")
        past = torch.arange(T, device=DEVICE)[:, None] >= lengths.to(DEVICE)
        assert (results[0]["x"][past] == 0).all()


@pytest.mark.cuda
@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_lengths_on_cudnn_have_a_backward(backend, mode):
    """In evaluation too, where the backward of nn.GRU itself is an error of cuDNN's."""
    T, B, H = 21, 5, 64
    ours = GRU(24, H, 2, bidirectional=True, backend=backend).to(DEVICE).train(mode)
    exact = GRU(24, H, 2, bidirectional=True, backend="reference").to(DEVICE, torch.float64)
    exact.load_state_dict(ours.state_dict())
    x = torch.randn(T, B, 24, device=DEVICE)
    lengths = torch.tensor([7, 0, T, 1, 12], device=DEVICE)
    outcomes = []
    with precision("tf32"):
        for module, leaf in ((ours, x.clone()), (exact, x.double())):
            leaf.requires_grad_()
            y, h = module(leaf, lengths=lengths)
            leaves = [leaf, *module.parameters()]
            grads = torch.autograd.grad(y.sin().sum() + h.cos().sum(), leaves)
            names = ["y", "h_n", "x", *dict(module.named_parameters())]
            values = [y.detach(), h.detach(), *grads]
            outcomes.append(dict(zip(names, values, strict=True)))
    assert_near(*outcomes, "tf32")


@pytest.mark.cuda
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize(("B", "H"), [(16, 64), (16, 256), (16, 768), (64, 1024)])
def test_error_is_that_of_cudnn(B, H, name):
    T = 50
    with precision(name) as dtype:
        ours, exact = twins(H, H, dtype=dtype)
        theirs = nn.GRU(H, H).to(DEVICE, dtype)
        theirs.load_state_dict(ours.state_dict())
        arguments = problem(T, B, H, H, 1, 1, dtype)
        truth = outcome(exact, *arguments)
        mine, other = outcome(ours, *arguments), outcome(theirs, *arguments)
        ratios = {}
        for key, value in truth.items():
            error, allowed = (
                (result[key].double() - value).norm().item() for result in (mine, other)
            )
            ratios[key] = error / allowed
        late = {key: ratio for key, ratio in ratios.items() if not ratio <= OF_CUDNN}
        assert not late, f"times nn.GRU's error: {late}; all: {ratios}"


def test_inputs_that_are_not_contiguous_and_batch_first():
    H = size(300, 20)
    ours, exact = twins(24, H, batch_first=True, dtype=torch.bfloat16)
    x = torch.randn(size(9, 2), 48, size(5, 3), device=DEVICE).bfloat16()[:, ::2].permute(2, 0, 1)
    y, h = ours(x)
    expected = exact(x.double())
    assert_near({"y": y, "h": h}, dict(zip("yh", expected, strict=True)), "bfloat16")
    assert_close(y, ours(x.contiguous())[0])


@BOTH
@pytest.mark.parametrize("name", DTYPES)
def test_one_step_without_gradients_is_the_cell(name, reset_after):
    """T = 1 under no_grad takes the kernel for single steps, as GRUCell does."""
    B, H = size(3, 2), size(650, 20)
    with precision(name) as dtype, torch.no_grad():
        ours, exact = twins(24, H, reset_after=reset_after, dtype=dtype)
        cell = GRUCell(24, H, reset_after=reset_after, backend="triton").to(DEVICE, dtype)
        cell.load_state_dict({k.removesuffix("_l0"): v for k, v in ours.state_dict().items()})
        x, h0, *_ = problem(1, B, 24, H, 1, 1, dtype)
        y, _ = ours(x, h0)
        expected, _ = exact(x.double(), h0.double())
        assert_near({"y": y, "cell": cell(x[0], h0[0])}, {"y": expected, "cell": expected[0]}, name)


@pytest.mark.cuda
def test_autocast_follows_nn_gru():
    ours = GRU(24, 300, backend="triton").to(DEVICE)
    theirs = ours.to_torch()
    x = torch.randn(9, 5, 24, device=DEVICE, requires_grad=True)
    results = []
    for module in (ours, theirs):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            y, h = module(x)
        grad, *_ = torch.autograd.grad(y.float().sum(), [x, *module.parameters()])
        results.append((y, h, grad))
    for mine, other in zip(*results, strict=True):
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine, other, rtol=5e-2, atol=5e-2)


@pytest.mark.cuda
@pytest.mark.parametrize("H", [128, 768])
def test_memory_kept_for_the_backward(H):
    """Beyond x and y at most a tenth of y, and at the peak no more than nn.GRU takes."""
    T, B = 512, 64
    x = torch.randn(T, B, H, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn_like(x)
    peaks = []
    for kind in (GRU, nn.GRU):
        options = {"backend": "triton"} if kind is GRU else {}
        module = kind(H, H, **options).to(DEVICE, torch.bfloat16)
        for measured in (False, True):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            y, _ = module(x)
            kept = torch.cuda.memory_allocated() - before - y.nbytes
            if measured and kind is GRU:
                assert kept <= 0.1 * y.nbytes, f"{kept:,} bytes beyond y's {y.nbytes:,}"
            torch.autograd.grad(y, [x, *module.parameters()], dy)
            peaks.append(torch.cuda.max_memory_allocated() - before)
            del y
    assert peaks[1] <= peaks[3], f"peak {peaks[1]:,} bytes against nn.GRU's {peaks[3]:,}"


@pytest.mark.cuda
def test_float64_says_why_not():
    module = GRU(4, 8, backend="triton").to(DEVICE, torch.float64)
    with pytest.raises(RuntimeError, match="float64"):
        module(torch.randn(2, 3, 4, device=DEVICE, dtype=torch.float64))
