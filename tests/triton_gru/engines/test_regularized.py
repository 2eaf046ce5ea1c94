"""Recurrent dropout, DropConnect, zoneout and layer normalisation against a loop written out."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.tolerances import assert_close
from triton_gru import GRU, gru

T, B, I, H = 5, 3, 4, 6  # noqa: E741

KINDS = {
    "recurrent_dropout": {"recurrent_dropout": 0.5},
    "weight_dropout": {"weight_dropout": 0.5},
    "zoneout": {"zoneout": 0.4},
    "layer_norm": {"layer_norm": True},
    "all": {
        "recurrent_dropout": 0.3,
        "weight_dropout": 0.2,
        "zoneout": 0.4,
        "layer_norm": True,
    },
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_variant = pytest.mark.parametrize("reset_after", [True, False])


def make_layer(kind=None, **options):
    settings = {"num_layers": 2, "dtype": torch.float64, **options}
    layer = GRU(I, H, **settings, **(KINDS[kind] if kind else {}))
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.startswith("gain"):
                parameter.uniform_(0.5, 2)  # where 1 would hide a gain that is left out
    return layer


def make_input(layer):
    D = 2 if layer.bidirectional else 1
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    hx = torch.randn(layer.num_layers * D, B, H, dtype=torch.float64, requires_grad=True)
    return x, hx


def normalise(products, gain):
    """Each of the three gates of one row by itself."""
    parts = []
    for part in products.chunk(3):
        mean = part.mean()
        variance = (part - mean).square().mean()
        parts.append((part - mean) / (variance + 1e-5).sqrt())
    return torch.cat(parts) * gain


def written_out(layer, x, hx):
    """The layer one row, direction and step at a time; draws what the layer draws, in its order."""
    D = 2 if layer.bidirectional else 1
    names = [f"l{k}{suffix}" for k in range(layer.num_layers) for suffix in ("", "_reverse")[:D]]
    training, p = layer.training, layer.zoneout
    hidden = {n: getattr(layer, f"weight_hh_{n}") for n in names}
    if training and layer.weight_dropout:
        hidden = {n: F.dropout(w, layer.weight_dropout) for n, w in hidden.items()}
    last = []
    for k in range(layer.num_layers):
        mask = torch.ones(D, B, H, dtype=torch.float64)
        if training and layer.recurrent_dropout:
            mask = F.dropout(mask, layer.recurrent_dropout)
        held = torch.rand(T, D, B, H) < p if training and p else None
        outputs = [[[None] * D for _ in range(B)] for _ in range(T)]
        for d in range(D):
            name = names[k * D + d]
            W_ih, W_hh = getattr(layer, f"weight_ih_{name}"), hidden[name]
            b_ih, b_hh = getattr(layer, f"bias_ih_{name}"), getattr(layer, f"bias_hh_{name}")
            ends = []
            for b in range(B):
                h = hx[k * D + d, b]
                for t in reversed(range(T)) if d else range(T):
                    seen = h * mask[d, b]
                    in_x, in_h = W_ih @ x[t, b], W_hh @ seen
                    if layer.layer_norm:
                        in_x = normalise(in_x, getattr(layer, f"gain_ih_{name}"))
                        in_h = normalise(in_h, getattr(layer, f"gain_hh_{name}"))
                    x_r, x_z, x_n = (in_x + b_ih).chunk(3)
                    h_r, h_z, h_n = (in_h + b_hh).chunk(3)
                    r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
                    if not layer.reset_after:
                        h_n = W_hh[2 * H :] @ (r * seen)
                        if layer.layer_norm:
                            scaled = normalise(torch.cat([h_n] * 3), 1)[:H]
                            h_n = scaled * getattr(layer, f"gain_hh_{name}")[2 * H :]
                        n = torch.tanh(x_n + h_n + b_hh[2 * H :])
                    else:
                        n = torch.tanh(x_n + r * h_n)
                    new = (1 - z) * n + z * h
                    if held is not None:
                        new = torch.where(held[t, d, b], h, new)
                    else:
                        new = p * h + (1 - p) * new
                    h = outputs[t][b][d] = new
                ends.append(h)
            last.append(torch.stack(ends))
        x = torch.stack([torch.stack([torch.cat(row) for row in step]) for step in outputs])
        if training and layer.dropout and k < layer.num_layers - 1:
            x = F.dropout(x, layer.dropout)
    return x, torch.stack(last)


def results(run, layer, x, hx, seed=5):
    torch.manual_seed(seed)
    y, h_n = run(x, hx)
    inputs = [x, hx, *layer.parameters()]
    return y, h_n, *torch.autograd.grad(y.sin().sum() + h_n.cos().sum(), inputs)


@every_variant
@every_kind
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.compat(
    "beyond",
    "recurrent_dropout, weight_dropout, zoneout, layer_norm",
    "works better",
    "on the equations in plain torch; `weight_dropout` on every backend",
)
def test_equals_the_loop(dropout, bidirectional, training, kind, reset_after):
    layer = make_layer(kind, bidirectional=bidirectional, reset_after=reset_after, dropout=dropout)
    layer.train(training)
    x, hx = make_input(layer)
    expected = results(lambda x, hx: written_out(layer, x, hx), layer, x, hx)
    assert_close(results(layer, layer, x, hx), expected)


@every_variant
@every_kind
@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_derivatives_equal_finite_differences(check, kind, reset_after):
    layer = GRU(2, 3, reset_after=reset_after, dtype=torch.float64, **KINDS[kind])
    names = [name for name, _ in layer.named_parameters()]
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    hx = torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True)

    def run(x, hx, *parameters):
        torch.manual_seed(3)
        values = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, values, (x, hx))

    assert check(run, (x, hx, *layer.parameters()))


@every_kind
def test_a_seed_decides_and_another_differs(kind):
    layer = make_layer(kind)
    x, hx = make_input(layer)
    assert_close(results(layer, layer, x, hx), results(layer, layer, x, hx))
    another = results(layer, layer, x, hx, seed=6)[0]
    assert torch.equal(results(layer, layer, x, hx)[0], another) == (kind == "layer_norm")


@pytest.mark.parametrize("reset_after", [True, False])
@pytest.mark.parametrize("kind", ["recurrent_dropout", "weight_dropout"])
@pytest.mark.parametrize("backend", ["auto", "reference", "torch"])
def test_dropping_is_the_plain_gru_in_evaluation(backend, kind, reset_after):
    if backend == "torch" and not reset_after:
        return
    layer = make_layer(kind, backend=backend, reset_after=reset_after).eval()
    plain = make_layer(backend=backend, reset_after=reset_after).eval()
    plain.load_state_dict(layer.state_dict())
    x, hx = make_input(layer)
    state = torch.get_rng_state()
    assert_close(layer(x, hx), plain(x, hx))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.compat(
    "beyond", "recurrent_dropout, weight_dropout, zoneout, layer_norm", "works better"
)
def test_off_is_the_plain_gru_and_draws_no_numbers():
    layer = GRU(I, H, 2, recurrent_dropout=0.0, weight_dropout=0.0, zoneout=0.0, layer_norm=False)
    assert [name for name, _ in layer.named_parameters()] == [
        name for name, _ in nn.GRU(I, H, 2).named_parameters()
    ]
    state = torch.get_rng_state()
    layer(torch.randn(T, B, I, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), state)
    assert "Backend 'torch' will run" in layer.explain()


@pytest.mark.compat(
    "beyond", "recurrent_dropout, weight_dropout, zoneout, layer_norm", "works better"
)
def test_weight_dropout_is_the_same_on_every_backend_under_a_seed():
    layer = make_layer("weight_dropout", bidirectional=True, dropout=0.5)
    x, hx = make_input(layer)
    found = []
    for backend in ("torch", "reference"):
        layer.backend = backend
        found.append(results(layer, layer, x, hx))
    assert_close(*found)
    assert not torch.allclose(found[0][0], layer.eval()(x, hx)[0], atol=1e-3)


@every_variant
@pytest.mark.parametrize("kind", ["recurrent_dropout", "weight_dropout", "zoneout"])
def test_what_enters_a_step_is_right_on_average(kind, reset_after):
    """Over many rows that are alike, or many calls where one mask serves all rows."""
    layer = make_layer(kind, num_layers=1, reset_after=reset_after)
    draws = 20_000
    if kind == "weight_dropout":
        weight = torch.stack([F.dropout(layer.weight_hh_l0, 0.5) for _ in range(draws)])
        torch.testing.assert_close(weight.mean(0), layer.weight_hh_l0, rtol=0, atol=0.02)
        return
    x = torch.randn(1, 1, I).double()
    hx = torch.randn(1, 1, H).double()
    many = x.expand(1, draws, I), hx.expand(1, draws, H)
    if kind == "recurrent_dropout":
        with torch.no_grad():
            layer.weight_hh_l0.mul_(0.05)  # so that a step is all but linear in the masked state
    y = layer(*many)[0]
    assert y.std(1).min() > 1e-4
    limit = 0.02 if kind == "zoneout" else 2e-3
    torch.testing.assert_close(y.mean(1), layer.eval()(x, hx)[0][0], rtol=0, atol=limit)
    if kind == "zoneout":
        held = (y[0] == hx[0]).double().mean(0)
        torch.testing.assert_close(held, torch.full((H,), 0.4).double(), rtol=0, atol=0.02)


@every_variant
@pytest.mark.parametrize("bidirectional", [False, True])
def test_rows_with_lengths_resets_and_packing_equal_the_rows_alone(bidirectional, reset_after):
    """In evaluation, where nothing is drawn: zoneout's expectation and layer normalisation."""
    layer = make_layer("all", bidirectional=bidirectional, reset_after=reset_after).eval()
    x, _ = make_input(layer)
    lengths = [5, 2, 0]
    y, h_n = layer(x, lengths=torch.tensor(lengths))
    for b, n in enumerate(lengths[:2]):
        expected_y, expected_h = layer(x[:n, b])
        assert_close(y[:n, b], expected_y)
        assert_close(h_n[:, b], expected_h)
        assert not y[n:, b].any()
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[2] = True
    whole, _ = layer(x, resets=resets)
    assert_close(whole, torch.cat([layer(x[:2])[0], layer(x[2:])[0]]))
    packed, _ = layer(nn.utils.rnn.pack_sequence([x[:5, 0], x[:2, 1]]))
    rows, _ = nn.utils.rnn.pad_packed_sequence(packed)
    assert_close(rows, y[:, :2])


@every_kind
def test_training_with_lengths_and_resets_reaches_nothing_past_the_end(kind):
    layer = make_layer(kind, bidirectional=True)
    x, hx = make_input(layer)
    lengths, resets = torch.tensor([5, 2, 0]), torch.rand(T, B) < 0.3
    torch.manual_seed(2)
    y, h_n = layer(x, hx, lengths=lengths, resets=resets)
    (dx,) = torch.autograd.grad(y.sin().sum() + h_n.cos().sum(), x)
    assert not y[2:, 1].any() and not dx[2:, 1].any() and not dx[:, 2].any()
    assert dx[:2, 1].any() and not torch.equal(h_n[:, 1], hx[:, 1])
    assert_close(h_n[:, 2], hx[:, 2])


@pytest.mark.parametrize("kind", ["recurrent_dropout", "zoneout", "layer_norm", "all"])
@pytest.mark.compat(
    "beyond", "recurrent_dropout, weight_dropout, zoneout, layer_norm", "works better"
)
def test_explain_says_which_backend_takes_it_and_why(kind):
    layer = make_layer(kind)
    name = "recurrent_dropout" if kind == "all" else kind
    assert layer.explain().startswith(f"Backend 'reference' will run: {name} ")
    for layer.backend in ("torch", "triton"):
        words = f"backend='{layer.backend}' cannot run: {name} .*only the equations.*backend='auto'"
        with pytest.raises(RuntimeError, match=words):
            layer(*make_input(layer))
        assert layer.explain().startswith("No backend will run. backend=")


def test_steps_in_evaluation_equal_the_sequence():
    layer = make_layer("all")
    x, hx = make_input(layer)
    with pytest.raises(RuntimeError, match="draw one mask for a whole sequence"):
        layer.step(x[0], hx)
    layer.eval()
    y, h_n = layer(x, hx)
    for t in range(T):
        step, hx = layer.step(x[t], hx)
        assert_close(step, y[t])
    assert_close(hx, h_n)


def test_layer_norm_does_not_see_the_scale_of_the_weights():
    layer = make_layer("layer_norm")
    x, hx = make_input(layer)
    expected = layer(x, hx)[0]
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.startswith("weight"):
                parameter.mul_(1000)
    torch.testing.assert_close(layer(x, hx)[0], expected, rtol=1e-2, atol=1e-2)


def test_gains_are_parameters_beside_those_of_nn_gru():
    theirs = nn.GRU(I, H, 2, bidirectional=True)
    torch.manual_seed(4)
    layer = GRU(I, H, 2, bidirectional=True, layer_norm=True)
    extra = [name for name, _ in layer.named_parameters() if name.startswith("gain")]
    assert extra == [
        f"gain_{kind}_l{k}{suffix}"
        for k in range(2)
        for suffix in ("", "_reverse")
        for kind in ("ih", "hh")
    ]
    missing = layer.load_state_dict(theirs.state_dict(), strict=False)
    assert sorted(missing.missing_keys) == sorted(extra) and not missing.unexpected_keys
    for name in extra:
        gain = getattr(layer, name)
        assert gain.shape == (3 * H,) and torch.equal(gain, torch.ones(3 * H))
    layer(torch.randn(T, B, I))[0].sum().backward()
    assert all(getattr(layer, name).grad.any() for name in extra)
    with torch.no_grad():
        layer.gain_ih_l0.zero_()
    layer.reset_parameters()
    assert torch.equal(layer.gain_ih_l0, torch.ones(3 * H))


def test_copies_and_conversions_keep_the_settings():
    layer = make_layer("all").eval()
    x, hx = make_input(layer)
    expected = layer(x, hx)[0]
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), GRU.from_torch(layer)):
        assert_close(twin(x, hx)[0], expected)
        for name, value in KINDS["all"].items():
            assert getattr(twin, name) == value and f"{name}={value}" in repr(twin)
    for name in ("layer_norm", "zoneout"):
        with pytest.raises(ValueError, match=rf"to_torch\(\) needs {name} off"):
            make_layer(name).to_torch()
        with pytest.raises(ValueError, match=rf"trace\(\) needs {name} off"):
            make_layer(name).trace(x, hx)
    for name in ("recurrent_dropout", "weight_dropout"):
        layer = make_layer(name).eval()
        assert_close(layer.to_torch()(x, hx), layer(x, hx))


def test_meta_device_and_autocast():
    layer = GRU(I, H, 2, device="meta", **KINDS["all"])
    y, h_n = layer(torch.empty(T, B, I, device="meta"))
    assert y.shape == (T, B, H) and h_n.shape == (2, B, H) and y.is_meta
    layer = GRU(I, H, 2, **KINDS["all"])
    with torch.autocast("cpu", torch.bfloat16):
        y, h_n = layer(torch.randn(T, B, I))
    assert y.dtype == h_n.dtype == torch.float32


@pytest.mark.parametrize("name", ["recurrent_dropout", "weight_dropout", "zoneout"])
@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (-0.1, ValueError, "at least 0 and below 1, got: -0.1"),
        (1.0, ValueError, "at least 0 and below 1, got: 1.0"),
        (float("nan"), ValueError, "got: nan"),
        ("0.5", TypeError, "should be a number, got: str"),
        (True, TypeError, "should be a number, got: bool"),
    ],
)
def test_what_is_no_probability_is_refused(value, error, words, name):
    with pytest.raises(error, match=f"{name} should be .*{words.split(', ')[-1]}"):
        GRU(I, H, **{name: value})
    with pytest.raises(error, match=f"{name} should be "):
        gru(torch.zeros(T, B, I), None, list(nn.GRU(I, H).parameters()), **{name: value})


def test_other_refusals():
    with pytest.raises(TypeError, match="layer_norm should be of type bool, got: int"):
        GRU(I, H, layer_norm=1)
    parameters = list(nn.GRU(I, H).parameters())
    with pytest.raises(ValueError, match=r"gains should hold 2 tensors of shape \[18\]"):
        gru(torch.zeros(T, B, I), None, parameters, gains=[torch.ones(18)])
