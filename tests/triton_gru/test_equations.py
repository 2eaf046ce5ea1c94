"""The scan and its derivatives against autograd over a loop, nn.RNN and nn.GRU."""

import itertools

import pytest
import torch
from torch import nn

from tests.tolerances import assert_close
from triton_gru import GRU, equations
from triton_gru.engines.autograd import Recurrence, last_states

VARIANTS = [True, False]


def make_inputs(T, B, I, H, D=1, bias=True, dtype=torch.float64):  # noqa: E741
    """x, h0 and the parameters of a layer, of the size that training has them in."""
    shapes = [(T, B, I), (D, B, H), (D, 3 * H, I), (D, 3 * H, H), (D, 3 * H), (D, 3 * H)]
    inputs = [torch.randn(shape, dtype=dtype) for shape in shapes[: 6 if bias else 4]]
    return [t.requires_grad_() for t in inputs]


def run(inputs, reset_after, lengths=None, resets=None):
    biases = () if len(inputs) == 6 else (None, None)
    options = equations.ScanOptions(reset_after, lengths, resets)
    y, _ = Recurrence.apply(*inputs, *biases, *options, "reference", False)
    last = last_states(y, inputs[1])
    return y.unflatten(-1, last.shape[::2]), last  # [T, B, D, H], as the scan has it


def random_resets(T, B, D, lengths=None):
    resets = torch.rand(T, B, D) < 0.4
    if lengths is not None:
        resets &= torch.arange(T)[:, None, None] < lengths[:, None]
    return resets


def one_row_after_another(inputs, reset_after, lengths=None, resets=None):
    """The layer written the slow way: one row, one direction, one step and one gate at a time."""
    x, h0, weight_ih, weight_hh, *biases = inputs
    T, B, _ = x.shape
    D, _, H = h0.shape
    b_ih, b_hh = biases or (torch.zeros(D, 3 * H).to(x), torch.zeros(D, 3 * H).to(x))
    states = [[[None] * D for _ in range(B)] for _ in range(T)]
    last = [[None] * B for _ in range(D)]
    for d, b in itertools.product(range(D), range(B)):
        (W_ir, W_iz, W_in), (W_hr, W_hz, W_hn) = weight_ih[d].chunk(3), weight_hh[d].chunk(3)
        (b_ir, b_iz, b_in), (b_hr, b_hz, b_hn) = b_ih[d].chunk(3), b_hh[d].chunk(3)
        h = h0[d, b]
        steps = range(T if lengths is None else int(lengths[b]))
        for t in reversed(steps) if d else steps:
            x_t = x[t, b]
            if resets is not None and resets[t, b, d]:
                h = torch.zeros_like(h)
            r = torch.sigmoid(W_ir @ x_t + b_ir + W_hr @ h + b_hr)
            z = torch.sigmoid(W_iz @ x_t + b_iz + W_hz @ h + b_hz)
            if reset_after:
                n = torch.tanh(W_in @ x_t + b_in + r * (W_hn @ h + b_hn))
            else:
                n = torch.tanh(W_in @ x_t + b_in + W_hn @ (r * h) + b_hn)
            h = (1 - z) * n + z * h
            states[t][b][d] = h
        last[d][b] = h
    # Past a row's end: its last state, or its first one where direction 1 has not begun yet.
    for d, b in itertools.product(range(D), range(B)):
        for t in range(T if lengths is None else int(lengths[b]), T):
            states[t][b][d] = h0[d, b] if d else last[d][b]
    y = torch.stack([torch.stack([torch.stack(row) for row in step]) for step in states])
    return y, torch.stack([torch.stack(rows) for rows in last])


def gradients(outputs, inputs):
    """Gradients by all inputs, with cotangents that are the same at every call."""
    generator = torch.Generator().manual_seed(1)
    cotangents = [
        torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs
    ]
    return torch.autograd.grad(outputs, inputs, cotangents, materialize_grads=True)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("reset_after", VARIANTS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("ragged", "reset"), [(False, False), (True, False), (False, True), (True, True)]
)
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize(("T", "B", "F", "H"), [(1, 1, 1, 1), (1, 3, 2, 17), (5, 3, 4, 1)])
def test_scan_and_gradients_equal_a_loop_under_autograd(
    T, B, F, H, D, ragged, reset, bias, reset_after
):
    inputs = make_inputs(T, B, F, H, D, bias)
    lengths = torch.randint(0, T + 1, (B,)) if ragged else None
    resets = random_resets(T, B, D, lengths) if reset else None
    ours = run(inputs, reset_after, lengths, resets)
    expected = one_row_after_another(inputs, reset_after, lengths, resets)
    assert_close(ours, expected)
    assert_close(gradients(ours, inputs), gradients(expected, inputs))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("reset_after", VARIANTS)
@pytest.mark.parametrize(("T", "B", "H"), [(9, 1, 65), (7, 4, 17)])
def test_longer_scans_equal_a_loop_under_autograd(T, B, H, reset_after):
    inputs = make_inputs(T, B, 3, H, 2)
    lengths = torch.randint(0, T + 1, (B,))
    resets = random_resets(T, B, 2, lengths)
    ours = run(inputs, reset_after, lengths, resets)
    expected = one_row_after_another(inputs, reset_after, lengths, resets)
    assert_close(ours, expected)
    assert_close(gradients(ours, inputs), gradients(expected, inputs))


@pytest.mark.parametrize("reset_after", VARIANTS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("lengths", "reset"), [(None, False), ([3, 1], False), ([3, 2], True)])
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_derivatives_equal_finite_differences(check, D, lengths, reset, bias, reset_after):
    inputs = make_inputs(3, 2, 2, 2, D, bias)
    lengths = None if lengths is None else torch.tensor(lengths)
    resets = random_resets(3, 2, D, lengths) if reset else None
    assert check(lambda *inputs: run(inputs, reset_after, lengths, resets), inputs)


@pytest.mark.parametrize("reset_after", VARIANTS)
def test_second_derivative_equals_that_of_the_loop(reset_after):
    def penalty(layer, inputs):
        first = torch.autograd.grad(layer(inputs)[0].sin().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    inputs = make_inputs(4, 3, 2, 5, 2)
    lengths = torch.tensor([4, 0, 2])
    rows = {"lengths": lengths, "resets": random_resets(4, 3, 2, lengths)}
    assert_close(
        penalty(lambda i: run(i, reset_after, **rows), inputs),
        penalty(lambda i: one_row_after_another(i, reset_after, **rows), inputs),
    )


@pytest.mark.parametrize("reset_after", VARIANTS)
@pytest.mark.parametrize("frozen", range(6))
def test_a_frozen_input_changes_no_other_gradient(frozen, reset_after):
    inputs = make_inputs(3, 2, 2, 5)
    expected = list(gradients(run(inputs, reset_after), inputs))
    rest = inputs[:frozen] + inputs[frozen + 1 :]
    inputs[frozen].requires_grad_(False)
    assert_close(
        gradients(run(inputs, reset_after), rest), tuple(expected[:frozen] + expected[frozen + 1 :])
    )


@pytest.mark.parametrize("reset_after", VARIANTS)
def test_values_past_a_rows_end_have_no_effect(reset_after):
    inputs = make_inputs(5, 3, 2, 4, 2)
    lengths = torch.tensor([2, 5, 0])
    expected = run(inputs, reset_after, lengths)
    expected_gradients = gradients(expected, inputs)
    with torch.no_grad():
        for b, length in enumerate(lengths):
            inputs[0][length:, b] = 1e6
    ours = run(inputs, reset_after, lengths)
    assert_close(ours, expected)
    assert_close(gradients(ours, inputs), expected_gradients)


@pytest.mark.parametrize("reset_after", VARIANTS)
def test_saturated_gates_give_the_tanh_rnn(reset_after):
    """Reset gate 1 and update gate 0 bring back the standard RNN."""
    H = 17
    inputs = make_inputs(6, 3, 4, H)
    x, h0, weight_ih, weight_hh, bias_ih, bias_hh = (t.detach() for t in inputs)
    bias_ih[:, :H] = 1e4
    bias_ih[:, H : 2 * H] = -1e4
    rnn = nn.RNN(4, H, dtype=torch.float64)
    new = slice(2 * H, None)
    for parameter, value in zip(
        rnn.parameters(), (weight_ih, weight_hh, bias_ih, bias_hh), strict=True
    ):
        parameter.data = value[0, new].clone()
    y, last = run([x, h0, weight_ih, weight_hh, bias_ih, bias_hh], reset_after)
    assert_close((y[:, :, 0], last), rnn(x, h0))


@pytest.mark.parametrize("reset_after", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_closed_update_gate_copies_the_state_for_ever(dtype, reset_after):
    H = 17
    inputs = make_inputs(200, 3, 4, H, dtype=dtype)
    with torch.no_grad():
        inputs[4][:, H : 2 * H] = 1e4
    y, last = run(inputs, reset_after)
    assert_close((y[:, :, 0], last), (inputs[1].expand(200, 3, H), inputs[1]))
    dh0 = torch.autograd.grad(last.sum(), inputs[1])[0]
    assert_close(dh0, torch.ones_like(dh0))


def test_reset_before_equals_the_articles_first_formula():
    """Row vectors: z, r = sigma(x U + s W); h = tanh(x U + (s o r) W); s = (1 - z) o h + z o s."""
    T, B, I, H = 6, 3, 4, 5  # noqa: E741
    layer = GRU(I, H, bias=False, reset_after=False, dtype=torch.float64)
    U_r, U_z, U_h = (weight.t() for weight in layer.weight_ih_l0.chunk(3))
    W_r, W_z, W_h = (weight.t() for weight in layer.weight_hh_l0.chunk(3))
    x = torch.randn(T, B, I, dtype=torch.float64)
    s = torch.zeros(B, H, dtype=torch.float64)
    states = []
    for x_t in x:
        z = torch.sigmoid(x_t @ U_z + s @ W_z)
        r = torch.sigmoid(x_t @ U_r + s @ W_r)
        h = torch.tanh(x_t @ U_h + (s * r) @ W_h)
        s = (1 - z) * h + z * s
        states.append(s)
    expected = torch.stack(states), s.unsqueeze(0)
    ours = layer(x)
    assert_close(ours, expected)
    parameters = list(layer.parameters())
    assert_close(gradients(ours, parameters), gradients(expected, parameters))


def test_variants_differ():
    inputs = make_inputs(4, 3, 2, 5)
    assert not torch.allclose(run(inputs, True)[0], run(inputs, False)[0], atol=1e-3)


def test_forward_keeps_nothing_but_its_inputs_and_y():
    def storage(tensor):
        return tensor.untyped_storage().data_ptr()

    inputs, kept = make_inputs(50, 8, 4, 16), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y, _ = run(inputs, True)
    assert {storage(t) for t in kept} == {storage(t) for t in (*inputs, y)}


def test_step_is_the_scan_of_one_step():
    x, h0, weight_ih, weight_hh, bias_ih, bias_hh = make_inputs(1, 3, 2, 5)
    gates_x = x[0] @ weight_ih[0].t() + bias_ih[0]
    for reset_after in VARIANTS:
        h = equations.step(gates_x, h0[0], weight_hh[0], bias_hh[0], reset_after)
        y, _ = run([x, h0, weight_ih, weight_hh, bias_ih, bias_hh], reset_after)
        assert_close(h, y[0, :, 0])
