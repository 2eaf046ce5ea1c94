"""The layer itself on backend="triton": the engine behind the autograd function."""

import pytest
import torch

import triton_gru
from tests.interpreter import harness
from tests.tolerances import assert_close
from triton_gru.engines import autograd


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("hidden", [20, 140])
def test_the_layer_agrees_with_torchs(hidden, bidirectional):
    torch.manual_seed(0)
    theirs = torch.nn.GRU(5, hidden, bidirectional=bidirectional)
    ours = triton_gru.GRU(5, hidden, bidirectional=bidirectional, backend="triton")
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 5)
    results = []
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_()
        with harness.interleaving(1):
            y, h = module(leaf)
            (y.square().sum() + h.sum()).backward()
        results.append([y, h, leaf.grad, *(p.grad for p in module.parameters())])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-5, atol=2e-5)


def test_packed_sequences():
    torch.manual_seed(0)
    theirs = torch.nn.GRU(5, 20, bidirectional=True)
    ours = triton_gru.GRU(5, 20, bidirectional=True, backend="triton")
    ours.load_state_dict(theirs.state_dict())
    rows = [torch.randn(n, 5) for n in (4, 2, 1)]
    packed = torch.nn.utils.rnn.pack_sequence(rows)
    (mine, h), (other, k) = ours(packed), theirs(packed)
    torch.testing.assert_close(mine.data, other.data, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(h, k, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("reset_after", [True, False])
@pytest.mark.parametrize("hidden", [20, 140])
def test_lengths_and_resets_as_in_the_reference(hidden, reset_after):
    torch.manual_seed(0)
    T, B = 4, 3
    # At 140 the group kernels compute, which takes seconds here for each layer and direction.
    small = hidden == 20
    options = {"num_layers": 1 + small, "bidirectional": small, "reset_after": reset_after}
    ours = triton_gru.GRU(5, hidden, backend="triton", **options)
    reference = triton_gru.GRU.from_torch(ours, backend="reference")
    rows = {"lengths": torch.tensor([4, 0, 3]), "resets": torch.rand(T, B) < 0.4}
    x = torch.randn(T, B, 5)
    hx = torch.randn(4 if small else 1, B, hidden)
    x[3:, 2] = hx[:, 1] = float("nan")  # past the end, and of a row without steps
    results = []
    for module in (ours, reference):
        leaves = x.clone().requires_grad_(), hx.clone().requires_grad_()
        with harness.interleaving(1):
            y, h = module(*leaves, **rows)
            h = h[:, [0, 2]]
            (y.square().sum() + h.square().sum()).backward()
        grads = [t.grad for t in (*leaves, *module.parameters())]
        assert all(grad.isfinite().all() for grad in grads)
        results.append([y, h, *grads])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-5, atol=2e-5)


def test_weight_dropout_as_in_the_reference_under_a_seed():
    x = torch.randn(4, 3, 5)
    ours = triton_gru.GRU(5, 20, 2, weight_dropout=0.5, dropout=0.3, backend="triton")
    reference = triton_gru.GRU.from_torch(ours, backend="reference")
    results = []
    for module in (ours, reference):
        torch.manual_seed(3)
        y, h = module(x)
        grads = torch.autograd.grad(y.square().sum() + h.sum(), module.weight_hh_l1)
        results.append([y, h, *grads])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-5, atol=2e-5)
    dropped = (results[0][2] == 0).float().mean()
    assert 0.4 < dropped < 0.6


def test_an_empty_batch():
    module = triton_gru.GRU(5, 20, 2, backend="triton")
    x = torch.randn(3, 0, 5, requires_grad=True)
    y, h = module(x)
    assert y.shape == (3, 0, 20) and h.shape == (2, 0, 20)
    y.sum().backward()
    assert x.grad.shape == x.shape and not module.weight_hh_l0.grad.any()
    with torch.no_grad():
        assert module(x[:1])[0].shape == (1, 0, 20)


@pytest.mark.parametrize("reset_after", [True, False])
@pytest.mark.compat(
    "arguments", "save_gates", "works better", "memory for time in the kernels' backward"
)
def test_saved_gates_change_memory_and_nothing_else(reset_after):
    torch.manual_seed(0)
    T, B, H = 24, 3, 16
    module = triton_gru.GRU(5, H, backend="triton", reset_after=reset_after)
    x = torch.randn(T, B, 5)
    gradients, kept = [], []
    for module.save_gates in (False, True):
        storages = {}

        def pack(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        leaf = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y, _ = module(leaf)
        for given in (leaf, *module.parameters()):
            storages.pop(given.untyped_storage().data_ptr(), None)
        kept.append(sum(storages.values()))
        gradients.append(torch.autograd.grad(y.square().sum(), [leaf, *module.parameters()]))
    for computed, saved in zip(*gradients, strict=True):
        torch.testing.assert_close(computed, saved, rtol=1e-5, atol=1e-5)
    size = T * B * H * 4
    # y with its two slots for first states, and those first states
    assert size <= kept[0] <= 1.15 * size
    assert kept[1] == kept[0] + 3 * size


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("reset_after", [True, False])
def test_single_steps_without_gradient_are_the_step_kernel(monkeypatch, reset_after, bidirectional):
    torch.manual_seed(0)
    options = {"reset_after": reset_after, "bidirectional": bidirectional, "num_layers": 2}
    module = triton_gru.GRU(5, 20, backend="triton", **options)
    x, h = torch.randn(1, 3, 5), torch.randn(4 if bidirectional else 2, 3, 20)
    expected = module(x, h)
    monkeypatch.setattr(autograd.operators, "scan_forward", None)
    with torch.no_grad():
        got = module(x, h)
        if not bidirectional:
            y, state = module.step(x[0], h)
            assert_close((y, state), (got[0][0], got[1]))
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)
    cell = triton_gru.GRUCell(5, 20, backend="triton", reset_after=reset_after)
    cell.requires_grad_(False)
    reference = triton_gru.GRUCell(5, 20, backend="reference", reset_after=reset_after)
    reference.load_state_dict(cell.state_dict())
    torch.testing.assert_close(cell(x[0], h[0]), reference(x[0], h[0]), rtol=2e-5, atol=2e-5)
