"""GRUCell against torch.nn.GRUCell, and against the layer for the variant that torch lacks."""

import copy
import pickle

import pytest
import torch
from torch import nn

from tests.tolerances import assert_close
from triton_gru import GRU, GRUCell, gru_cell

BACKENDS = ["torch", "reference"]


def results(cell, x, hx):
    h = cell(x, hx)
    inputs = [t for t in (x, hx, *cell.parameters()) if t is not None]
    return h, *torch.autograd.grad(h.sin().sum(), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(), (3,), (0,)])
@pytest.mark.parametrize("with_hx", [True, False])
@pytest.mark.compat("input", "GRUCell: input [B, I] or [I], hx or none, bias", "works")
def test_equals_nn_gru_cell(with_hx, shape, bias, backend):
    theirs = nn.GRUCell(5, 7, bias, dtype=torch.float64)
    ours = GRUCell.from_torch(theirs, backend=backend)
    x = torch.randn(*shape, 5, dtype=torch.float64, requires_grad=True)
    hx = torch.randn(*shape, 7, dtype=torch.float64, requires_grad=True) if with_hx else None
    assert_close(results(ours, x, hx), results(theirs, x, hx))


@pytest.mark.parametrize("reset_after", [True, False])
def test_a_cell_step_by_step_is_the_layer(reset_after):
    layer = GRU(5, 7, reset_after=reset_after, dtype=torch.float64)
    cell = GRUCell(5, 7, reset_after=reset_after, dtype=torch.float64)
    for ours, theirs in zip(cell.parameters(), layer.parameters(), strict=True):
        ours.data.copy_(theirs.data)
    x = torch.randn(6, 3, 5, dtype=torch.float64)
    h = None
    for t, expected in enumerate(layer(x)[0]):
        h = cell(x[t], h)
        assert_close(h, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("h_dtype", [torch.float32, None])
@pytest.mark.compat("training", "dtypes under autocast", "works")
def test_autocast_gives_the_dtypes_of_nn_gru_cell(h_dtype, dtype, backend):
    theirs = nn.GRUCell(5, 7)
    ours = GRUCell.from_torch(theirs, backend=backend)
    x, hx = torch.randn(3, 5), torch.randn(3, 7, dtype=h_dtype or dtype)
    with torch.autocast("cpu", dtype):
        assert ours(x).dtype == theirs(x).dtype
        actual, expected = ours(x, hx), theirs(x, hx)
    assert actual.dtype == expected.dtype
    assert_close(actual, expected, dtype=dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.compat("attributes", "state_dict, load_state_dict", "works")
def test_parameters_state_dict_and_copies(bias):
    torch.manual_seed(3)
    theirs = nn.GRUCell(5, 7, bias)
    torch.manual_seed(3)
    ours = GRUCell(5, 7, bias, reset_after=False)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for actual, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(actual, expected)
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 5)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert_close(twin(x), ours(x))
        assert not twin.reset_after


def test_from_torch_and_back():
    theirs = nn.GRUCell(5, 7, bias=False, dtype=torch.float64).eval()
    ours = GRUCell.from_torch(theirs)
    back = ours.to_torch()
    assert type(ours) is GRUCell and type(back) is nn.GRUCell
    x = torch.randn(3, 5, dtype=torch.float64)
    for module in (ours, back):
        assert_close(module(x), theirs(x))
        assert not module.training and not module.bias
    with pytest.raises(ValueError, match="reset_after=True"):
        GRUCell(5, 7, reset_after=False).to_torch()
    with pytest.raises(TypeError, match=r"expects a torch\.nn\.GRUCell, got: GRU"):
        GRUCell.from_torch(nn.GRU(5, 7))

    class Cell(nn.GRUCell):
        pass

    with pytest.raises(TypeError, match="got: Cell, a subclass, whose forward may"):
        GRUCell.from_torch(Cell(5, 7))
    nn.utils.parametrizations.weight_norm(theirs, "weight_hh")
    assert_close(GRUCell.from_torch(theirs)(x), theirs(x))


def test_repr_and_explain():
    assert repr(GRUCell(5, 7)) == repr(nn.GRUCell(5, 7))
    cell = GRUCell(5, 7, bias=False, reset_after=False)
    assert repr(cell) == "GRUCell(5, 7, bias=False, reset_after=False)"
    assert "'torch' will run" in GRUCell(5, 7, backend="torch").explain(torch.randn(3, 5))
    text = "No backend will run. input has inconsistent input_size: got 6 expected 5."
    assert cell.explain(torch.randn(3, 6)) == text


def test_functional_cell():
    cell = GRUCell(5, 7, reset_after=False)
    x, hx = torch.randn(3, 5), torch.randn(3, 7)
    assert_close(gru_cell(x, hx, *cell.parameters(), reset_after=False), cell(x, hx))


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("sizes", [(5, 0), (0, 7), (0, 0)], ids=str)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.compat("input", "GRUCell without features or without states", "works")
def test_sizes_of_zero(sizes, backend):
    """torch.nn.GRUCell takes them, which torch.nn.GRU does not."""
    ours, theirs = GRUCell(*sizes, backend=backend), nn.GRUCell(*sizes)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, sizes[0])
    assert_close(ours(x), theirs(x))
    ours(x).sum().backward()
