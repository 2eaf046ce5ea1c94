"""The layer itself on backend="triton": the engine behind the autograd function."""

import pytest
import torch

import triton_gru
from tests.interpreter import harness


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
