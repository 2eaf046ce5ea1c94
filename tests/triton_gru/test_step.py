"""GRU.step: one step after another gives what forward gives for the whole sequence."""

import pytest
import torch

from tests.tolerances import assert_close
from triton_gru import GRU

T, B, I, H = 6, 3, 5, 7  # noqa: E741

every_kind = pytest.mark.parametrize(
    ("backend", "reset_after"),
    [("auto", True), ("torch", True), ("reference", True), ("reference", False)],
)


def make_layer(**options):
    return GRU(I, H, dtype=torch.float64, **{"num_layers": 2, **options})


def step_through(layer, x, state):
    ys = []
    for x_t in x:
        y, state = layer.step(x_t, state)
        ys.append(y)
    return torch.stack(ys), state


@every_kind
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("rows", [(), (1,), (B,)])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.compat("beyond", "step", "works better", "one step at a time, for decoding")
def test_steps_equal_the_sequence(given, rows, layers, bias, backend, reset_after):
    layer = make_layer(num_layers=layers, bias=bias, backend=backend, reset_after=reset_after)
    x = torch.randn(T, *rows, I, dtype=torch.float64)
    hx = torch.randn(layers, *rows, H, dtype=torch.float64) if given else None
    expected = layer(x, hx)
    assert_close(step_through(layer, x, hx), expected)
    with torch.inference_mode():
        assert_close(step_through(layer, x, hx), expected)


@every_kind
@pytest.mark.compat("beyond", "step", "works better")
def test_gradients_through_steps_equal_those_of_the_sequence(backend, reset_after):
    layer = make_layer(backend=backend, reset_after=reset_after)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    hx = torch.randn(2, B, H, dtype=torch.float64, requires_grad=True)
    found = []
    for y, h_n in (layer(x, hx), step_through(layer, x, hx)):
        loss = y.sin().sum() + h_n.cos().sum()
        found.append(torch.autograd.grad(loss, [x, hx, *layer.parameters()]))
    assert_close(*found)


def test_batch_first_makes_no_difference():
    layer = make_layer(batch_first=True)
    x, hx = torch.randn(B, I).double(), torch.randn(2, B, H).double()
    y, state = layer.step(x, hx)
    expected, h_n = layer(x.unsqueeze(1), hx)
    assert_close((y, state), (expected[:, 0], h_n))


@pytest.mark.parametrize("backend", ["auto", "torch", "reference", "triton"])
def test_what_is_no_step_is_refused(backend):
    layer = make_layer(backend=backend)
    with pytest.raises(ValueError, match=r"one time step \[batch, input_size\].*got: \[6, 3, 5\]"):
        layer.step(torch.zeros(T, B, I).double())
    with pytest.raises(ValueError, match=r"one time step .*got: list"):
        layer.step([0.0])
    with pytest.raises(RuntimeError, match=r"Expected hidden size \(2, 3, 7\), got \[1, 3, 7\]"):
        layer.step(torch.zeros(B, I).double(), torch.zeros(1, B, H).double())
    with pytest.raises(ValueError, match="step needs bidirectional=False"):
        make_layer(backend=backend, bidirectional=True).step(torch.zeros(B, I).double())
