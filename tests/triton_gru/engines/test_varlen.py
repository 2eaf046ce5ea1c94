"""lengths= and resets=: a sequence gives what it gives alone, whatever else stands in its row."""

import pytest
import torch
from torch import nn

from tests.tolerances import assert_close
from triton_gru import GRU

T, B, I, H = 11, 3, 5, 7  # noqa: E741
# Where sequences begin in each row: one that is reset at once, one of one step, none.
BEGINNINGS = [[0, 3, 4, 9], [5, 10], []]

every_variant = pytest.mark.parametrize("reset_after", [True, False])
every_direction = pytest.mark.parametrize("bidirectional", [False, True])


def make_layer(**options):
    options = {"num_layers": 2, "dtype": torch.float64, "backend": "reference", **options}
    return GRU(I, H, **options)


def make_resets():
    resets = torch.zeros(T, B, dtype=torch.bool)
    for row, beginnings in enumerate(BEGINNINGS):
        resets[beginnings, row] = True
    return resets


def one_by_one(layer, x, hx, lengths=None):
    """y and h_n of rows cut at BEGINNINGS, each sequence run alone."""
    D = 2 if layer.bidirectional else 1
    ys, last = [], []
    for row, beginnings in enumerate(BEGINNINGS):
        end = T if lengths is None else int(lengths[row])
        starts = sorted({0, *(b for b in beginnings if b < end)})
        pieces = []
        for start, stop in zip(starts, [*starts[1:], end], strict=True):
            first = torch.zeros_like(hx[:, row])
            # hx enters the first sequence forwards, the last one backwards.
            if start == 0 and 0 not in beginnings:
                first[0::D] = hx[0::D, row]
            if D == 2 and stop == end:
                first[1::2] = hx[1::2, row]
            pieces.append(layer(x[start:stop, row], first))
        y = torch.cat([piece for piece, _ in pieces])
        ys.append(torch.cat([y, y.new_zeros(T - end, y.shape[1])]))
        # Forwards the last state is that of the last sequence, backwards that of the first.
        h_n = pieces[-1][1].clone()
        if D == 2:
            h_n[1::2] = pieces[0][1][1::2]
        last.append(h_n)
    return torch.stack(ys, 1), torch.stack(last, 1)


def results(outputs, inputs):
    y, h_n = outputs
    return y, h_n, *torch.autograd.grad(y.sin().sum() + h_n.cos().sum(), inputs)


@every_variant
@every_direction
@pytest.mark.parametrize("lengths", [None, [10, 11, 4]])
@pytest.mark.compat("beyond", "resets", "works better", "several sequences in a row")
def test_sequences_in_one_row_equal_the_sequences_alone(lengths, bidirectional, reset_after):
    layer = make_layer(bidirectional=bidirectional, reset_after=reset_after)
    D = 2 if bidirectional else 1
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    hx = torch.randn(2 * D, B, H, dtype=torch.float64, requires_grad=True)
    inputs = [x, hx, *layer.parameters()]
    lengths = None if lengths is None else torch.tensor(lengths)
    resets = make_resets()
    ours = results(layer(x, hx, lengths=lengths, resets=resets), inputs)
    assert_close(ours, results(one_by_one(layer, x, hx, lengths), inputs))


every_backend = pytest.mark.parametrize(
    ("backend", "reset_after"),
    [("torch", True), ("reference", True), ("reference", False), ("auto", True), ("auto", False)],
)


@every_backend
@every_direction
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.compat(
    "beyond",
    "lengths",
    "works better",
    "on the device, in any order; nn.GRU wants them packed on the host",
)
def test_rows_with_lengths_equal_the_rows_alone(batch_first, bidirectional, backend, reset_after):
    layer = make_layer(
        bidirectional=bidirectional,
        reset_after=reset_after,
        batch_first=batch_first,
        backend=backend,
    )
    D = 2 if bidirectional else 1
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    hx = torch.randn(2 * D, B, H, dtype=torch.float64, requires_grad=True)
    lengths = [4, 0, T]
    y, h_n = layer(x.transpose(0, 1) if batch_first else x, hx, lengths=torch.tensor(lengths))
    y = y.transpose(0, 1) if batch_first else y
    inputs = [x, hx, *layer.parameters()]
    rows = [layer(x[:n, b], hx[:, b]) if n else None for b, n in enumerate(lengths)]
    expected = torch.zeros_like(y), hx.clone()  # a row without a step keeps the states of hx
    for b, row in enumerate(rows):
        if row is not None:
            expected[0][: lengths[b], b] = row[0]
            expected[1][:, b] = row[1]
    assert_close(results((y, h_n), inputs), results(expected, inputs))
    assert not y[4:, 0].any() and not y[:, 1].any()


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    ("backend", "reset_after", "dtype"),
    [
        *((b, after, torch.float64) for b, after in every_backend.args[1]),
        ("cpu", True, torch.float32),
        ("cpu", False, torch.float32),
    ],
)
@pytest.mark.compat("beyond", "lengths", "works better")
def test_values_past_the_end_have_no_effect(backend, reset_after, dtype, garbage):
    """Not even the weights' gradients, where 0 meets the input or a state and 0 * NaN is NaN.

    Those are the input, the derivative by the output, and the first states of a row without steps.
    """
    layer = make_layer(bidirectional=True, reset_after=reset_after, backend=backend, dtype=dtype)
    lengths = torch.tensor([4, 0, T])
    past_end = torch.arange(T).unsqueeze(1) >= lengths
    x, hx = torch.randn(T, B, I, dtype=dtype), torch.randn(4, B, H, dtype=dtype)
    dy, dh = torch.randn(T, B, 2 * H, dtype=dtype), torch.randn(4, B, H, dtype=dtype)
    resets = torch.rand(T, B) < 0.3
    outcomes = []
    for value in (0.0, garbage):
        x[past_end], dy[past_end], hx[:, 1] = value, value, value
        resets[past_end] = value != 0
        inputs = [x.clone().requires_grad_(), hx.clone().requires_grad_(), *layer.parameters()]
        rows = {"lengths": lengths, "resets": None if backend == "torch" else resets}
        y, h_n = layer(*inputs[:2], **rows)
        assert_close(h_n[:, 1], hx[:, 1], equal_nan=True)
        found = torch.autograd.grad([y, h_n], inputs, [dy, dh])
        outcomes.append([y, h_n[:, [0, 2]], *found])
    assert_close(outcomes[1], outcomes[0])


@every_direction
def test_one_row_takes_lengths_and_resets_without_the_batch(bidirectional):
    layer = make_layer(bidirectional=bidirectional)
    x, hx = torch.randn(T, I).double(), torch.randn(4 if bidirectional else 2, H).double()
    resets = torch.rand(T) < 0.4
    for batch_first in (False, True):
        layer.batch_first = batch_first
        y, h_n = layer(x, hx, lengths=torch.tensor(6), resets=resets)
        layer.batch_first = False
        expected, last = layer(
            x[:, None], hx[:, None], lengths=torch.tensor([6]), resets=resets[:, None]
        )
        assert_close((y, h_n), (expected[:, 0], last[:, 0]))
        assert y.shape[0] == T and not y[6:].any()


def test_resets_are_laid_out_as_the_input():
    layer, x, resets = make_layer(), torch.randn(T, B, I).double(), make_resets()
    expected, last = layer(x, resets=resets)
    layer.batch_first = True
    y, h_n = layer(x.transpose(0, 1), resets=resets.t())
    assert_close((y.transpose(0, 1), h_n), (expected, last))


def test_resets_that_are_all_false_change_nothing_and_all_true_forget_everything():
    layer, x = make_layer(num_layers=1, bidirectional=True), torch.randn(T, B, I).double()
    hx = torch.randn(2, B, H).double()
    none = torch.zeros(T, B, dtype=torch.bool)
    assert_close(layer(x, hx, resets=none), layer(x, hx))
    y, _ = layer(x, hx, resets=~none)
    alone, _ = layer(x.reshape(1, T * B, I))  # one step a sequence
    alone = alone.reshape(T, B, 2 * H)
    assert_close(y[:, :, :H], alone[:, :, :H])
    assert_close(y[:-1, :, H:], alone[:-1, :, H:])
    assert not torch.allclose(y[-1, :, H:], alone[-1, :, H:])  # where hx enters backwards


INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32]
INTEGERS += [torch.int64, torch.uint64]


@every_backend
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integers_of_every_kind_are_lengths(dtype, backend, reset_after):
    """T is past what 8 bits hold, and a row without steps shows where 1 is taken from 0."""
    steps = 300
    options = {"bidirectional": True, "num_layers": 1, "reset_after": reset_after}
    layer = make_layer(backend=backend, **options)
    x = torch.randn(steps, B, I).double()
    most = min(steps, torch.iinfo(dtype).max)
    lengths = torch.tensor([4, 0, most])
    expected = layer(x, lengths=lengths)
    assert_close(layer(x, lengths=lengths.to(dtype)), expected)
    if most == steps:
        with pytest.raises(ValueError, match="within 0 and 300, the input's steps, got: 301"):
            layer(x, lengths=torch.tensor([4, 0, 301]).to(dtype))


@every_backend
@pytest.mark.compat("derivatives", "double backward with lengths and resets", "works better")
def test_second_derivatives_with_lengths_and_resets(backend, reset_after):
    options = {"num_layers": 1, "bidirectional": True, "reset_after": reset_after}
    layer = make_layer(backend=backend, **options).requires_grad_(False)
    lengths = torch.tensor([4, 0, 5])
    x = torch.randn(5, B, I, dtype=torch.float64, requires_grad=True)
    resets = None if backend == "torch" else torch.rand(5, B) < 0.3
    assert torch.autograd.gradgradcheck(lambda x: layer(x, lengths=lengths, resets=resets), [x])


@pytest.mark.parametrize("reset_after", [True, False])
@every_direction
def test_gradients_of_each_row_by_vmap_add_up(bidirectional, reset_after):
    layer = make_layer(bidirectional=bidirectional, backend="auto", reset_after=reset_after)
    parameters = dict(layer.named_parameters())
    x, resets = torch.randn(T, B, I).double(), torch.rand(T, B) < 0.3
    lengths = torch.tensor([4, 0, T])

    def loss(parameters, x, lengths, resets):
        rows = {"lengths": lengths, "resets": resets}
        y, h_n = torch.func.functional_call(layer, parameters, (x,), rows)
        return y.sin().sum() + h_n.cos().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 1, 0, 1))(parameters, x, lengths, resets)
    expected = torch.func.grad(loss)(parameters, x, lengths, resets)
    for name in parameters:
        assert each[name].shape == (B, *parameters[name].shape)
        assert_close(each[name].sum(0), expected[name])


@every_variant
@pytest.mark.compat("graphs", "torch.compile with lengths and resets", "works better")
def test_compiles_into_one_graph_for_all_sizes(reset_after):
    layer = make_layer(bidirectional=True, reset_after=reset_after)
    graphs = []

    def count(graph, example):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=count)
    for rows in (3, 5):
        x = torch.randn(6, rows, I).double()
        options = {"lengths": torch.randint(0, 7, (rows,)), "resets": torch.rand(6, rows) < 0.3}
        assert_close(compiled(x, **options), layer(x, **options))
    assert len(graphs) == 1
    with pytest.raises(RuntimeError, match="lengths should be within 0 and the input's steps"):
        compiled(x, **{**options, "lengths": torch.full((5,), 7)})


@every_backend
@pytest.mark.compat("beyond", "lengths", "works better")
def test_nothing_waits_for_the_device(backend, reset_after):
    """The meta device has no values to wait for: whoever asks for one raises there."""
    layer = make_layer(bidirectional=True, reset_after=reset_after, backend=backend, device="meta")
    x = torch.randn(T, B, I, dtype=torch.float64, device="meta", requires_grad=True)
    lengths = torch.empty(B, dtype=torch.int64, device="meta")
    resets = torch.empty(T, B, dtype=torch.bool, device="meta")
    with pytest.raises(RuntimeError):
        lengths.max().item()
    resets = None if backend == "torch" else resets
    y, h_n = layer(x, lengths=lengths, resets=resets)
    torch.autograd.grad(y.sum() + h_n.sum(), [x, *layer.parameters()])
    if backend == "torch":
        return  # its PackedSequence is ATen's own
    packed = nn.utils.rnn.PackedSequence(
        torch.randn(6, I, dtype=torch.float64, device="meta", requires_grad=True),
        torch.tensor([3, 2, 1]),
        sorted_indices=torch.empty(3, dtype=torch.int64, device="meta"),
        unsorted_indices=torch.empty(3, dtype=torch.int64, device="meta"),
    )
    y, h_n = layer(packed)
    torch.autograd.grad(y.data.sum() + h_n.sum(), [packed.data, *layer.parameters()])


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "no_grad"])
def test_cudnn_runs_in_training_mode_if_a_backward_follows(monkeypatch, recorded, mode):
    """Its forward keeps nothing for the backward unless it is called in training mode."""
    flags = []
    own = torch.gru

    def spy(*args):
        flags.append(args[6])
        return own(*args)

    monkeypatch.setattr(torch, "gru", spy)
    layer = make_layer(backend="torch", bidirectional=True, dropout=0.5).train(mode)
    with torch.set_grad_enabled(recorded):
        layer(torch.randn(T, B, I).double(), lengths=torch.tensor([4, 0, T]))
    assert flags == [recorded] * 4  # each direction of each layer
    if recorded:
        layer.requires_grad_(False)
        flags.clear()
        layer(torch.randn(T, B, I).double(), lengths=torch.tensor([4, 0, T]))
        assert not any(flags)


@every_direction
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lengths_under_autocast_have_the_dtypes_of_nn_gru(dtype, bidirectional):
    theirs = nn.GRU(I, H, 2, bidirectional=bidirectional)
    x, lengths = torch.randn(T, B, I), torch.tensor([T, 6, 2])
    outcomes = []
    with torch.autocast("cpu", dtype):
        y, h_n = theirs(nn.utils.rnn.pack_padded_sequence(x, lengths))
        expected = nn.utils.rnn.pad_packed_sequence(y)[0], h_n
        for backend in ("torch", "reference"):
            ours = GRU.from_torch(theirs, backend=backend)
            outcomes.append(ours(x, lengths=lengths))
    for outcome in outcomes:
        assert [t.dtype for t in outcome] == [t.dtype for t in expected]
        assert_close(outcome, expected, dtype=dtype)


def test_packed_rows_without_gradients_are_atens_own_and_equal():
    theirs = nn.GRU(I, H, 2, bidirectional=True)
    ours = GRU.from_torch(theirs)
    packed = nn.utils.rnn.pack_sequence([torch.randn(n, I) for n in (5, 3, 1)])
    with torch.no_grad():
        (y, h_n), (expected, last) = ours(packed), theirs(packed)
    assert_close((y.data, h_n), (expected.data, last))


def test_dropout_between_layers_is_the_same_on_every_backend_under_a_seed():
    layer = make_layer(dropout=0.5, backend="torch")
    x, lengths = torch.randn(T, B, I).double(), torch.tensor([4, 0, T])
    found = []
    for layer.backend in ("torch", "reference"):
        torch.manual_seed(3)
        found.append(layer(x, lengths=lengths))
    assert_close(*found)
    assert not torch.allclose(layer.eval()(x, lengths=lengths)[0], found[0][0], atol=1e-3)
