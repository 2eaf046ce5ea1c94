"""GRU.trace against the formulas, written out here step by step in float64."""

import itertools

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from tests.tolerances import assert_close
from triton_gru import GRU

T, B, INPUT, H = 7, 3, 5, 11


def expected(module, x, hx):
    """r, z, n, h of every layer and direction, [L, D, T, B, H], one step after another."""
    D = 2 if module.bidirectional else 1
    layers = []
    for layer in range(module.num_layers):
        directions = []
        for d in range(D):
            suffix = f"_l{layer}" + "_reverse" * d
            W_ir, W_iz, W_in = getattr(module, "weight_ih" + suffix).chunk(3)
            W_hr, W_hz, W_hn = getattr(module, "weight_hh" + suffix).chunk(3)
            none = torch.zeros(3, module.hidden_size, dtype=x.dtype)
            b_ir, b_iz, b_in = getattr(module, "bias_ih" + suffix).chunk(3) if module.bias else none
            b_hr, b_hz, b_hn = getattr(module, "bias_hh" + suffix).chunk(3) if module.bias else none
            h, steps = hx[layer * D + d], [None] * len(x)
            for t in reversed(range(len(x))) if d else range(len(x)):
                r = torch.sigmoid(x[t] @ W_ir.T + b_ir + h @ W_hr.T + b_hr)
                z = torch.sigmoid(x[t] @ W_iz.T + b_iz + h @ W_hz.T + b_hz)
                if module.reset_after:
                    n = torch.tanh(x[t] @ W_in.T + b_in + r * (h @ W_hn.T + b_hn))
                else:
                    n = torch.tanh(x[t] @ W_in.T + b_in + (r * h) @ W_hn.T + b_hn)
                h = (1 - z) * n + z * h
                steps[t] = torch.stack([r, z, n, h])
            directions.append(torch.stack(steps, 1))
        layers.append(torch.stack(directions, 1))
        x = torch.cat([direction[3] for direction in directions], -1)
    return torch.stack(layers, 1).unbind(0)


SETTINGS = [
    {"num_layers": L, "bias": bias, "bidirectional": two, "reset_after": after, "backend": backend}
    for L, bias, two, after, backend in itertools.product(
        (1, 3), (True, False), (False, True), (True, False), ("torch", "reference", "auto")
    )
    if after or backend != "torch"
]


@pytest.mark.parametrize(
    "settings", SETTINGS, ids=lambda settings: "-".join(map(str, settings.values()))
)
@pytest.mark.compat("beyond", "trace", "works better", "gates, candidates and states of every step")
def test_equals_the_equations(settings):
    module = GRU(INPUT, H, dtype=torch.float64, **settings)
    directions = 2 if settings["bidirectional"] else 1
    x = torch.randn(T, B, INPUT, dtype=torch.float64)
    hx = torch.randn(settings["num_layers"] * directions, B, H, dtype=torch.float64)
    traced = module.trace(x, hx)
    assert traced._fields == ("r", "z", "n", "h")
    assert traced.z.shape == (settings["num_layers"], directions, T, B, H)
    assert_close(list(traced), list(expected(module, x, hx)))
    assert_close(list(module.trace(x)), list(expected(module, x, torch.zeros_like(hx))))


@pytest.mark.parametrize("reset_after", [True, False])
def test_has_the_layout_of_the_input_and_the_states_of_forward(reset_after):
    options = {"num_layers": 2, "bidirectional": True, "reset_after": reset_after}
    module = GRU(INPUT, H, batch_first=True, dtype=torch.float64, **options)
    x, hx = torch.randn(B, T, INPUT, dtype=torch.float64), torch.randn(4, B, H, dtype=torch.float64)
    whole = module.trace(x, hx)
    assert whole.r.shape == (2, 2, B, T, H)
    y, _ = module(x, hx)
    assert_close(torch.cat([*whole.h[-1]], -1), y)
    row = module.trace(x[1], hx[:, 1])
    assert row.r.shape == (2, 2, T, H)
    assert_close(list(row), [tensor[:, :, 1] for tensor in whole])


def test_states_are_those_of_the_backend():
    module = GRU(INPUT, H, num_layers=2)
    x = torch.randn(T, B, INPUT)
    assert_close(module.trace(x).h[-1, 0], module(x)[0])


def test_has_no_dropout_and_leaves_the_mode():
    module = GRU(INPUT, H, num_layers=2, dropout=0.9, dtype=torch.float64).train()
    x = torch.randn(T, B, INPUT, dtype=torch.float64)
    traced = module.trace(x)
    assert module.training
    assert_close(traced.h[-1, 0], module.eval()(x)[0])


def test_standard_rnn_limit():
    """r = 1 and z = 0, the limit in which the state is the candidate of a tanh RNN."""
    module = GRU(INPUT, H, dtype=torch.float64)
    with torch.no_grad():
        module.bias_ih_l0[:H] = 1e4
        module.bias_ih_l0[H : 2 * H] = -1e4
    traced = module.trace(torch.randn(T, B, INPUT, dtype=torch.float64))
    assert_close(traced.r, torch.ones_like(traced.r))
    assert_close(traced.z, torch.zeros_like(traced.z))
    assert_close(traced.n, traced.h)


def test_gradients_flow_through_all_four():
    module = GRU(2, 3, num_layers=2, reset_after=False, backend="reference", dtype=torch.float64)
    x = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: tuple(module.trace(x)), x)


def test_autocast_keeps_the_gates_in_the_dtype_of_the_states():
    module = GRU(INPUT, H)
    x = torch.randn(T, B, INPUT)
    with torch.autocast("cpu", torch.bfloat16):
        traced = module.trace(x)
        y, _ = module(x)
    assert_close(traced.h[-1, 0], y)
    assert {tensor.dtype for tensor in traced} == {y.dtype}
    assert_close(list(traced), list(module.trace(x)), dtype=torch.bfloat16)


@pytest.mark.parametrize("reset_after", [True, False])
def test_on_the_meta_device(reset_after):
    module = GRU(INPUT, H, num_layers=2, reset_after=reset_after, device="meta")
    traced = module.trace(torch.empty(T, B, INPUT, device="meta"))
    assert all(tensor.is_meta and tensor.shape == (2, 1, T, B, H) for tensor in traced)


def test_errors_say_what_to_do():
    module = GRU(INPUT, H)
    with pytest.raises(TypeError, match="one by one"):
        module.trace(pack_sequence([torch.randn(3, INPUT)]))
    with pytest.raises(RuntimeError, match="Expected hidden size"):
        module.trace(torch.randn(T, B, INPUT), torch.randn(2, B, H))
    with pytest.raises(RuntimeError, match="input_size"):
        module.trace(torch.randn(T, B, INPUT + 1))
