"""GRU against torch.nn.GRU: values, gradients, and everything else that its users rely on."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

from tests.tolerances import assert_close
from triton_gru import GRU, gru

BACKENDS = ["torch", "reference"]  # those that run without a GPU

SETTINGS = [
    {"num_layers": L, "bias": bias, "batch_first": batch_first, "bidirectional": bidirectional}
    for L, bias, batch_first, bidirectional in itertools.product(
        (1, 3), (True, False), (False, True), (False, True)
    )
]
IDS = ["-".join(str(value) for value in settings.values()) for settings in SETTINGS]


def pair(input_size=5, hidden_size=7, backend="reference", **settings):
    """An nn.GRU and a GRU with the same parameters."""
    theirs = nn.GRU(input_size, hidden_size, **settings)
    return theirs, GRU.from_torch(theirs, backend=backend)


def states(module, B, dtype=torch.float64):
    D = 2 if module.bidirectional else 1
    shape = (module.num_layers * D, B, module.hidden_size)
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def results(module, x, hx):
    """Output, last states and every gradient."""
    y, h_n = module(x, hx)
    data = y.data if isinstance(y, PackedSequence) else y
    inputs = [x.data if isinstance(x, PackedSequence) else x, hx, *module.parameters()]
    inputs = [t for t in inputs if t is not None and t.requires_grad]
    grads = torch.autograd.grad(data.sin().sum() + h_n.cos().sum(), inputs)
    return data, h_n, *grads


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
@pytest.mark.parametrize("layout", ["batched", "unbatched", "without hx"])
@pytest.mark.compat("arguments", "input_size, hidden_size", "works")
@pytest.mark.compat("arguments", "num_layers", "works")
@pytest.mark.compat("arguments", "bias", "works")
@pytest.mark.compat("arguments", "batch_first", "works")
@pytest.mark.compat("arguments", "bidirectional", "works")
@pytest.mark.compat("input", "input [T, B, I], [B, T, I] or [T, I]; hx or none", "works")
def test_equals_nn_gru(layout, settings, backend):
    theirs, ours = pair(backend=backend, dtype=torch.float64, **settings)
    T, B = 6, 3
    x = torch.randn((B, T, 5) if settings["batch_first"] else (T, B, 5), dtype=torch.float64)
    hx = states(theirs, B)
    if layout == "unbatched":
        x, hx = x.reshape(-1, 5)[:T].clone(), hx[:, 0].detach().clone().requires_grad_()
    elif layout == "without hx":
        hx = None
    x.requires_grad_()
    assert_close(results(ours, x, hx), results(theirs, x, hx))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
@pytest.mark.parametrize("order", ["sorted", "unsorted", "padded"])
@pytest.mark.compat("input", "PackedSequence, sorted or not", "works")
def test_packed_sequences_equal_nn_gru(order, settings, backend):
    theirs, ours = pair(backend=backend, dtype=torch.float64, **settings)
    lengths = [7, 4, 4, 1] if order == "sorted" else [4, 1, 7, 4]
    rows = [torch.randn(length, 5, dtype=torch.float64) for length in lengths]
    if order == "padded":
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        x = pack_padded_sequence(padded, lengths, batch_first=True, enforce_sorted=False)
    else:
        x = pack_sequence(rows, enforce_sorted=order == "sorted")
    x.data.requires_grad_()
    for hx in (None, states(theirs, 4)):
        assert_close(results(ours, x, hx), results(theirs, x, hx))
    y, _ = ours(x)
    for field in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        assert getattr(y, field) is getattr(x, field)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.compat(
    "arguments",
    "reset_after=False",
    "works better",
    "the formula of Cho et al. 2014, which torch lacks",
)
def test_packed_rows_equal_the_rows_alone_with_reset_before(bidirectional):
    """torch has no such formula to compare with, but a row must not depend on its neighbours."""
    layer = GRU(5, 7, 2, bidirectional=bidirectional, reset_after=False, dtype=torch.float64)
    rows = [torch.randn(length, 5, dtype=torch.float64) for length in (3, 6, 1)]
    y, h_n = layer(pack_sequence(rows, enforce_sorted=False))
    y, lengths = nn.utils.rnn.pad_packed_sequence(y)
    for b, row in enumerate(rows):
        expected_y, expected_h = layer(row)
        assert_close(y[: lengths[b], b], expected_y)
        assert_close(h_n[:, b], expected_h)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.compat(
    "arguments",
    "dtype (float64, float32, bfloat16, float16)",
    "works",
    "errors at most those of nn.GRU",
)
def test_reference_in_lower_precision_errs_no_more_than_nn_gru(dtype):
    exact = nn.GRU(20, 33, 2, dtype=torch.float64)
    x = torch.randn(64, 16, 20, dtype=torch.float64)
    theirs = copy.deepcopy(exact).to(dtype)
    ours = GRU.from_torch(theirs, backend="reference")
    # The exact one takes the rounded weights and inputs as well: only the arithmetic counts.
    exact.load_state_dict(theirs.state_dict())
    x = x.to(dtype)
    expected = results(exact, x.double().requires_grad_(), None)

    def errors(module):
        actual = results(module, x.clone().requires_grad_(), None)
        return [
            ((a.double() - e).norm() / e.norm()).item()
            for a, e in zip(actual, expected, strict=True)
        ]

    ours_errors, theirs_errors = errors(ours), errors(theirs)
    # Gradients go by the worst one: nn.GRU adds up that of W_hh step by step, while ours is one
    # product, as that of W_ih is in both; in 16 bits it rounds far less.
    limits = [*theirs_errors[:2], *[max(theirs_errors[2:])] * len(ours_errors[2:])]
    assert all(o <= 1.5 * limit for o, limit in zip(ours_errors, limits, strict=True))


@pytest.mark.compat("input", "non-contiguous input and hx", "works")
def test_non_contiguous_input_and_hx():
    theirs, ours = pair(num_layers=2, dtype=torch.float64)
    x = torch.randn(3, 5, 6, dtype=torch.float64).permute(2, 0, 1).requires_grad_()
    hx = torch.randn(3, 2, 7, dtype=torch.float64).transpose(0, 1).requires_grad_()
    assert not x.is_contiguous() and not hx.is_contiguous()
    assert_close(results(ours, x, hx), results(theirs, x, hx))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.compat("input", "an empty batch", "works")
def test_empty_batch(backend):
    theirs, ours = pair(num_layers=2, bidirectional=True, backend=backend)
    x = torch.randn(4, 0, 5, requires_grad=True)
    assert_close(results(ours, x, None), results(theirs, x, None))


@pytest.mark.compat(
    "arguments",
    "dropout",
    "works",
    "the same numbers under the same seed, for a PackedSequence with `auto` and `torch`; "
    "`reference` pads one and draws others",
)
def test_dropout_equals_nn_gru_under_the_same_seed():
    theirs, ours = pair(num_layers=3, dropout=0.5, backend="torch")
    x, hx = torch.randn(6, 3, 5, requires_grad=True), states(theirs, 3, torch.float32)

    def seeded(module):
        torch.manual_seed(7)
        return results(module, x, hx)

    assert_close(seeded(ours), seeded(theirs))
    # The reference draws the same numbers in the same order when input is not packed.
    ours.backend = "reference"
    assert_close(seeded(ours), seeded(theirs))
    theirs.eval()
    ours.eval()
    assert_close(seeded(ours), seeded(theirs))


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.compat("arguments", "dropout", "works")
def test_dropout_of_packed_rows_equals_nn_gru_under_the_same_seed(backend):
    theirs, ours = pair(num_layers=3, dropout=0.5, bidirectional=True, backend=backend)
    x = pack_sequence([torch.randn(n, 5) for n in (3, 7, 1)], enforce_sorted=False)
    outcomes = []
    for module in (ours, theirs):
        torch.manual_seed(7)
        outcomes.append(results(module, x, None))
    assert_close(*outcomes)


@pytest.mark.parametrize("reset_after", [True, False])
def test_dropout_zeroes_between_layers_only_in_training(reset_after):
    layer = GRU(4, 400, 2, dropout=0.9, reset_after=reset_after, backend="reference")
    x = torch.randn(2, 1, 4)
    trained, again = layer(x)[0], layer(x)[0]
    assert not torch.equal(trained, again)
    assert (trained != 0).all()
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("x_dtype", [torch.float32, None])
@pytest.mark.parametrize("h_dtype", [torch.float32, None, "absent"])
@pytest.mark.compat("training", "dtypes under autocast", "works", "those of nn.GRU")
def test_autocast_gives_the_dtypes_of_nn_gru(h_dtype, x_dtype, dtype, backend):
    theirs, ours = pair(num_layers=2, backend=backend)
    x = torch.randn(6, 3, 5, dtype=x_dtype or dtype)
    hx = None if h_dtype == "absent" else states(theirs, 3, h_dtype or dtype).detach()
    outcomes = []
    for module in (theirs, ours):
        with torch.autocast("cpu", dtype):
            y, h_n = module(x, hx)
            (y.float().sum() + h_n.float().sum()).backward()
        outcomes.append([y, h_n, *(p.grad for p in module.parameters())])
    assert [t.dtype for t in outcomes[1]] == [t.dtype for t in outcomes[0]]
    assert_close(outcomes[1][:2], outcomes[0][:2], dtype=dtype)


def test_autocast_leaves_float64_alone():
    for backend in BACKENDS:
        theirs, ours = pair(backend=backend, dtype=torch.float64)
        x = torch.randn(6, 3, 5, dtype=torch.float64)
        with torch.autocast("cpu", torch.bfloat16):
            assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
@pytest.mark.compat(
    "attributes", "initial parameters under a seed; all_weights", "works", "the same numbers"
)
def test_same_parameters_under_the_same_seed(settings):
    torch.manual_seed(3)
    theirs = nn.GRU(5, 7, **settings)
    after = torch.rand(1)
    torch.manual_seed(3)
    ours = GRU(5, 7, **settings, reset_after=False)
    assert torch.equal(torch.rand(1), after)
    expected, actual = dict(theirs.named_parameters()), dict(ours.named_parameters())
    assert list(actual) == list(expected)
    for name in expected:
        assert torch.equal(actual[name], expected[name])
    assert [[tuple(w.shape) for w in group] for group in ours.all_weights] == [
        [tuple(w.shape) for w in group] for group in theirs.all_weights
    ]


@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
@pytest.mark.compat("attributes", "state_dict, load_state_dict", "works", "both ways")
def test_state_dict_loads_both_ways(settings):
    theirs, ours = nn.GRU(5, 7, **settings), GRU(5, 7, **settings)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 4, 5)
    assert_close(ours(x), theirs(x))
    another = nn.GRU(5, 7, **settings)
    another.load_state_dict(ours.state_dict())
    assert_close(another(x), theirs(x))


@pytest.mark.parametrize("reset_after", [True, False])
def test_copies_keep_the_results_and_the_settings(reset_after):
    layer = GRU(5, 7, 2, bidirectional=True, reset_after=reset_after, backend="reference").eval()
    x = torch.randn(4, 3, 5)
    expected = layer(x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ]
    for twin in copies:
        assert_close(twin(x), expected)
        assert (twin.reset_after, twin.backend, twin.training) == (reset_after, "reference", False)
        with torch.no_grad():
            twin.weight_hh_l1.zero_()
        assert not torch.allclose(twin(x)[0], expected[0], atol=1e-3)
        assert_close(layer(x), expected)


def test_replaced_parameters_and_functional_call_are_seen():
    layer = GRU(5, 7, reset_after=False)
    x = torch.randn(4, 3, 5)
    zeros = {name: torch.zeros_like(p) for name, p in layer.named_parameters()}
    assert not torch.func.functional_call(layer, zeros, (x,))[0].any()
    for name, zero in zeros.items():
        setattr(layer, name, nn.Parameter(zero))
    assert not layer(x)[0].any()


def test_weight_norm():
    theirs, ours = pair(dtype=torch.float64)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    for module in (theirs, ours):
        nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    outcomes = []
    for module in (theirs, ours):
        y, h_n = module(x)
        y.sum().backward()
        outcomes.append([y, h_n, *(p.grad for p in module.parameters())])
    assert_close(outcomes[1], outcomes[0])
    assert_close(GRU.from_torch(ours)(x), theirs(x))


@pytest.mark.compat("attributes", "flatten_parameters and the attributes of an nn.GRU", "works")
def test_has_the_attributes_of_an_nn_gru():
    theirs, ours = pair(num_layers=2, bidirectional=True)
    assert isinstance(ours, nn.RNNBase)
    for name in vars(theirs):
        assert hasattr(ours, name)
    for name in ("mode", "proj_size", "input_size", "hidden_size", "bidirectional", "dropout"):
        assert getattr(ours, name) == getattr(theirs, name)
    ours.flatten_parameters()


@pytest.mark.parametrize("reset_after", [True, False])
def test_compiles_into_one_graph(reset_after):
    """Why GRU is no nn.GRU: Dynamo does not trace one."""
    layer = GRU(5, 7, 2, bidirectional=True, reset_after=reset_after)
    x = torch.randn(4, 3, 5)
    assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))


@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
@pytest.mark.compat("beyond", "from_torch, to_torch", "works better")
def test_from_torch_and_back(settings):
    theirs = nn.GRU(5, 7, dropout=0.25 if settings["num_layers"] > 1 else 0.0, **settings)
    theirs = theirs.double().eval()
    theirs.weight_ih_l0.requires_grad_(False)
    state = torch.get_rng_state()
    ours = GRU.from_torch(theirs, backend="reference")
    back = ours.to_torch()
    assert torch.equal(torch.get_rng_state(), state)
    assert type(ours) is GRU and type(back) is nn.GRU
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    expected = theirs(x)
    for module in (ours, back):
        for name in (*settings, "dropout", "input_size", "hidden_size", "training"):
            assert getattr(module, name) == getattr(theirs, name)
        for name, parameter in module.named_parameters():
            original = getattr(theirs, name)
            assert torch.equal(parameter, original) and parameter.dtype == original.dtype
            assert parameter.requires_grad == original.requires_grad
            assert parameter.data_ptr() != original.data_ptr()
        assert_close(module(x), expected)


def test_from_torch_keeps_the_variant_of_a_gru():
    layer = GRU(5, 7, reset_after=False)
    x = torch.randn(4, 3, 5)
    assert_close(GRU.from_torch(layer)(x), layer(x))


@pytest.mark.compat(
    "attributes",
    "to_torch with reset_after=False",
    "differs",
    "refused: nn.GRU would compute another function",
)
def test_conversions_refuse_what_would_compute_something_else():
    with pytest.raises(ValueError, match=r"to_torch\(\) needs reset_after=True.*another function"):
        GRU(5, 7, reset_after=False).to_torch()
    with pytest.raises(TypeError, match=r"expects a torch\.nn\.GRU, got: LSTM"):
        GRU.from_torch(nn.LSTM(5, 7))


@pytest.mark.parametrize("base", [nn.GRU, GRU])
@pytest.mark.compat(
    "beyond",
    "from_torch, to_torch",
    "works better",
    "nn.GRU to triton_gru.GRU and back; no subclass of it",
)
def test_from_torch_refuses_a_subclass(base):
    class Doubled(base):
        def forward(self, *args):
            y, h_n = super().forward(*args)
            return 2 * y, h_n

    with pytest.raises(TypeError, match=r"got: Doubled, a subclass, whose forward may"):
        GRU.from_torch(Doubled(5, 7))
    if base is GRU:  # which computes what its own class computes
        x = torch.randn(4, 3, 5)
        for module in (Doubled(5, 7), GRU(5, 7), nn.GRU(5, 7)):
            ours = Doubled.from_torch(module)
            twice = 1 if type(module) is Doubled else 2
            assert type(ours) is Doubled
            assert_close(ours(x)[0], twice * module(x)[0])


@pytest.mark.compat("attributes", "repr, extra_repr", "works")
def test_repr():
    assert repr(GRU(5, 7)) == repr(nn.GRU(5, 7))
    text = "GRU(5, 7, num_layers=2, batch_first=True, reset_after=False, backend='reference')"
    assert repr(GRU(5, 7, 2, batch_first=True, reset_after=False, backend="reference")) == text
    text = "GRU(5, 7, save_gates=True, zoneout=0.1, layer_norm=True)"
    assert repr(GRU(5, 7, save_gates=True, zoneout=0.1, layer_norm=True)) == text


@pytest.mark.compat("arguments", "dropout", "works")
def test_dropout_in_one_layer_warns_as_nn_gru_does():
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
        GRU(5, 7, dropout=0.5)


@pytest.mark.compat("arguments", "device", "works")
def test_meta_device():
    for reset_after in (True, False):
        layer = GRU(5, 7, 2, bidirectional=True, device="meta", reset_after=reset_after)
        y, h_n = layer(torch.empty(4, 3, 5, device="meta"))
        assert y.shape == (4, 3, 14) and h_n.shape == (4, 3, 7) and y.is_meta


@pytest.mark.parametrize("reset_after", [True, False])
@pytest.mark.compat(
    "beyond", "gru(), gru_cell(): the functions", "works better", "nn.GRU has no public one"
)
def test_functional_gru_is_what_the_layer_computes(reset_after):
    layer = GRU(5, 7, 2, bias=False, bidirectional=True, reset_after=reset_after)
    x = torch.randn(4, 3, 5)
    parameters = list(layer.parameters())
    y, h_n = gru(x, None, parameters, bias=False, bidirectional=True, reset_after=reset_after)
    expected = layer(x)
    assert_close((y, h_n), expected)
