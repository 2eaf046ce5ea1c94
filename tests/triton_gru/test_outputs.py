"""What a layer returns may be detached and changed in place, as what nn.GRU returns."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from tests.tolerances import assert_close
from triton_gru import GRU, GRUCell

T, B, I, H = 5, 2, 3, 4  # noqa: E741

LAYERS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "bidirectional": {"bidirectional": True, "num_layers": 2, "batch_first": True},
    "reference": {"backend": "reference"},
    "reference, batch_first": {"backend": "reference", "batch_first": True},
    "reset before": {"reset_after": False, "num_layers": 2, "bidirectional": True},
    "layer_norm": {"layer_norm": True},
    "zoneout": {"zoneout": 0.1, "batch_first": True},
}
CHANGES = {
    "add_": lambda y: y.add_(1),
    "mul_": lambda y: y.mul_(2),
    "relu_": lambda y: y.relu_(),
    "zero_": lambda y: y.zero_(),
    "y[0] = 3": lambda y: y.__setitem__(0, 3),
    "y[..., :2] += 1": lambda y: y[..., :2].add_(1),
}


def outputs(layer, kind):
    """Output and last states of a call; input and, with lengths, what goes with it."""
    x = torch.linspace(-1, 1, T * B * I).reshape((B, T, I) if layer.batch_first else (T, B, I))
    if kind == "packed":
        y, h_n = layer(pack_sequence([torch.ones(3, I), torch.ones(T, I)], enforce_sorted=False))
        return y.data, h_n
    if kind == "lengths":
        return layer(x, lengths=torch.tensor([T, 2]))
    return layer(x)


@pytest.mark.parametrize("kind", ["rows", "lengths", "packed"])
@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "no_grad"])
@pytest.mark.parametrize("settings", LAYERS.values(), ids=LAYERS)
@pytest.mark.compat("input", "`detach_()` of an output, in truncated backpropagation", "works")
def test_outputs_are_no_views(settings, recorded, kind):
    layer = GRU(I, H, **settings)
    with torch.set_grad_enabled(recorded):
        found = outputs(layer, kind)
    for output in found:
        values = output.detach().clone()
        assert output.requires_grad == recorded
        assert not output.detach_().requires_grad
        assert torch.equal(output, values)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("kind", ["rows", "lengths", "packed"])
@pytest.mark.parametrize("settings", LAYERS.values(), ids=LAYERS)
def test_outputs_change_in_place(settings, kind, change):
    """Under autograd too, where the gradients are those of the change out of place."""
    layer = GRU(I, H, **settings).eval()
    grads = []
    for in_place in (True, False):
        y, h_n = outputs(layer, kind)
        if not in_place:
            y, h_n = y.clone(), h_n.clone()
        change(y)
        change(h_n)
        loss = y.square().sum() + h_n.square().sum()
        grads.append(torch.autograd.grad(loss, [*layer.parameters()], allow_unused=True))
    assert_close(*grads)


@pytest.mark.parametrize("settings", [{}, {"backend": "reference"}, {"reset_after": False}])
@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "no_grad"])
def test_outputs_of_a_cell_and_of_a_step(settings, recorded):
    cell, layer, x = GRUCell(I, H, **settings), GRU(I, H, 2, **settings), torch.randn(B, I)
    with torch.set_grad_enabled(recorded):
        for output in (cell(x), *layer.step(x), layer.step(x[0])[0]):
            assert output.requires_grad == recorded
            assert not output.detach_().requires_grad
        for change in CHANGES.values():
            change(cell(x))
            y, state = layer.step(x)
            before = state.clone()
            change(y)
            assert torch.equal(state, before)  # one does not lie within the other
    h = cell(x)
    h.mul_(2)
    parameters = [*cell.parameters()]
    grads = torch.autograd.grad(h.sum(), parameters)
    assert_close(grads, torch.autograd.grad((cell(x) * 2).sum(), parameters))


@pytest.mark.parametrize("module", [nn.GRU(I, H), GRU(I, H), GRU(I, H, reset_after=False)])
@pytest.mark.compat(
    "input",
    "`detach_()` of an output for one row, [T, I]",
    "works",
    "refused by torch, as of nn.GRU's: it is a view",
)
def test_outputs_of_one_row(module):
    y, h_n = module(torch.randn(T, I))
    for output in (y, h_n):
        with pytest.raises(RuntimeError, match="Can't detach views in-place"):
            output.detach_()
        output.relu_()
    (y.sum() + h_n.sum()).backward()
