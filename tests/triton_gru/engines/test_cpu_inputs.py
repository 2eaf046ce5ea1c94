"""What the CPU engine is given: refused before C reads it, or taken as torch would take it."""

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence

from tests.tolerances import assert_close
from tests.triton_gru.engines.cpu_cases import draw, needs_library
from triton_gru import GRU, gru
from triton_gru.engines.cpu.layer import layer


@needs_library
@pytest.mark.parametrize(
    "rows",
    [
        {"lengths": torch.tensor([3, 6])},
        {"lengths": torch.tensor([-1, 2])},
        {"batch_sizes": torch.tensor([1, 2, 2, 2, 3])},
        {"batch_sizes": torch.tensor([3, 2, 2, 2, 1])},
        {"batch_sizes": torch.tensor([2, 2, 2, 2, 1])},
    ],
    ids=str,
)
def test_rows_that_do_not_fit_are_refused_before_memory_is_read(rows):
    case = draw(2, T=5, B=2, H=3, I=4, D=1, ragged=False, resets=False, form="steps_first")
    (x, *rest, layout), _ = case.given()
    x = x.flatten(0, 1) if "batch_sizes" in rows else x
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"within 0 and 5|should not increase"):
        layer(x, *rest, layout._replace(**rows))


@needs_library
@pytest.mark.parametrize("name", ["weight_ih", "weight_hh", "bias_ih", "bias_hh"])
@pytest.mark.parametrize("cut", [0, 1])
def test_parameters_of_another_shape_are_refused_before_memory_is_written(name, cut):
    layer = GRU(4, 6, 2, backend="cpu")
    params = [p.detach().requires_grad_() for p in layer.parameters()]
    index = 4 + ("weight_ih", "weight_hh", "bias_ih", "bias_hh").index(name)
    short = params[index]
    if cut < short.dim():
        params[index] = short.detach().narrow(cut, 0, 1).clone().requires_grad_()
    else:
        params[index] = short.detach().repeat(2).requires_grad_()
    with pytest.raises(RuntimeError, match=r"Expected|size|shape"):
        gru(torch.randn(20, 2, 4), None, params, backend="cpu")


@needs_library
@pytest.mark.parametrize("change", ["strided", "expanded", "int32"])
def test_batch_sizes_of_another_layout(change):
    sizes = torch.tensor([4, 3, 2, 1, 2, 0, 2, 0])[::2]
    if change == "expanded":
        sizes = torch.tensor([3]).expand(4)
    if change == "int32":
        sizes = torch.tensor([4, 2, 2, 2], dtype=torch.int32)
    packed = PackedSequence(torch.randn(int(sizes.sum()), 5), sizes)
    layer = GRU(5, 6, backend="cpu")
    plain = PackedSequence(packed.data, sizes.long().clone())
    assert torch.equal(layer(packed)[0].data, layer(plain)[0].data)


@needs_library
def test_a_tensor_that_is_the_negative_of_its_memory():
    layer, x = GRU(4, 6, backend="cpu"), torch.randn(20, 2, 4)
    expected = layer(-x)[0]
    assert torch.equal(layer(torch._neg_view(x))[0], expected)
    layer.backend = "auto"
    assert_close(layer(torch._neg_view(x))[0], expected)


@needs_library
@pytest.mark.parametrize("of", ["y", "last"])
def test_vmap_over_the_derivatives_of_an_eager_call(of):
    layer, x = GRU(4, 6, backend="cpu"), torch.randn(5, 2, 4, requires_grad=True)
    y = layer(x)[0 if of == "y" else 1]
    cotangents = torch.randn(3, *y.shape)

    def derivative(cotangent):
        return torch.autograd.grad(y, [x], cotangent, retain_graph=True)[0]

    found = torch.func.vmap(derivative)(cotangents)
    assert_close(found, torch.stack([derivative(c) for c in cotangents]))


@needs_library
def test_a_second_derivative_beside_a_state_without_steps_that_is_not_finite():
    layer = GRU(4, 6, backend="cpu")
    x, hx = torch.randn(5, 3, 4, requires_grad=True), torch.randn(1, 3, 6)
    hx[0, 1] = torch.nan
    y, _ = layer(x, hx, lengths=torch.tensor([5, 0, 4]))
    params = list(layer.parameters())
    first = torch.autograd.grad(y.sin().sum(), params, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), params)
    assert all(g.isfinite().all() for g in (*first, *second))


@needs_library
@pytest.mark.parametrize("name", ["lengths", "resets", "batch_sizes"])
def test_rows_changed_in_place_before_the_backward_are_found(name):
    form = "packed" if name == "batch_sizes" else "steps_first"
    case = draw(4, T=5, B=3, H=4, I=2, D=1, ragged=True, resets=True, form=form)
    given, _ = case.given()
    y, _ = layer(*given)
    getattr(given[-1], name).zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
