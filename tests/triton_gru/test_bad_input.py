"""What does not fit is refused by every backend in the same words, with nn.GRU's exception type."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from triton_gru import GRU, GRUCell, gru, gru_cell

BACKENDS = ["auto", "torch", "reference"]
T, B, I, H = 4, 3, 5, 7  # noqa: E741


def x(*shape, **options):
    return torch.zeros(shape or (T, B, I), **options)


def packed(features=I, **options):
    return pack_sequence([x(3, features, **options), x(2, features, **options)])


# What goes into a layer of two layers, and what the message says of it. The type is nn.GRU's own.
LAYER_CASES = {
    "1-D input": ((x(I),), ["Expected input to be 2D or 3D, got 1D", "[5]"]),
    "4-D input": ((x(1, T, B, I),), ["Expected input to be 2D or 3D, got 4D", "[1, 4, 3, 5]"]),
    "features": ((x(T, B, 6),), ["Expected 5, got 6", "[4, 3, 6]"]),
    "no steps": ((x(0, B, I),), ["sequence length to be larger than 0", "[0, 3, 5]"]),
    "no steps, one row": ((x(0, I),), ["sequence length to be larger than 0", "[0, 5]"]),
    "input dtype": ((x(dtype=torch.float64),), ["(torch.float64)", "input.to(torch.float32)"]),
    "integer input": ((x(dtype=torch.int64),), ["(torch.int64)", "input.to(torch.float32)"]),
    "input device": ((x(device="meta"),), ["input tensor at meta", "input.to('cpu')"]),
    "hx rows": ((x(), x(2, B + 1, H)), ["Expected hidden size (2, 3, 7), got [2, 4, 7]"]),
    "hx features": ((x(), x(2, B, H + 1)), ["Expected hidden size (2, 3, 7), got [2, 3, 8]"]),
    "hx layers": ((x(), x(1, B, H)), ["Expected hidden size (2, 3, 7), got [1, 3, 7]"]),
    "hx directions": ((x(), x(4, B, H)), ["Expected hidden size (2, 3, 7), got [4, 3, 7]"]),
    "hx 2-D": ((x(), x(2, H)), ["batched 3-D input, hx should also be 3-D but got 2-D"]),
    "hx 3-D": ((x(T, I), x(2, 1, H)), ["unbatched 2-D input, hx should also be 2-D but got 3-D"]),
    "hx dtype": (
        (x(), x(2, B, H, dtype=torch.float64)),
        ["hx dtype (torch.float64)", "input dtype (torch.float32)", "hx.to(torch.float32)"],
    ),
    "hx device": ((x(), x(2, B, H, device="meta")), ["hidden tensor at meta", "hx.to('cpu')"]),
    "packed features": ((packed(6),), ["Expected 5, got 6"]),
    "packed dtype": ((packed(dtype=torch.float64),), ["(torch.float64)", "input.to("]),
    "packed hx": ((packed(), x(2, B, H)), ["Expected hidden size (2, 2, 7), got [2, 3, 7]"]),
    "packed hx 2-D": ((packed(), x(2, H)), ["Expected hidden size (2, 2, 7), got [2, 7]"]),
}

CELL_CASES = {
    "3-D input": ((x(),), ["Expected input to be 1D or 2D, got 3D", "[4, 3, 5]"]),
    "3-D hx": ((x(B, I), x(1, B, H)), ["Expected hidden to be 1D or 2D, got 3D", "[1, 3, 7]"]),
    "1-D hx": ((x(B, I), x(H)), ["2-D input, hx should also be 2-D but got 1-D"]),
    "2-D hx": ((x(I), x(1, H + 1)), ["1-D input, hx should also be 1-D but got 2-D"]),
    "features": ((x(B, 6),), ["inconsistent input_size: got 6 expected 5"]),
    "hx features": ((x(B, I), x(B, 8)), ["inconsistent hidden_size: got 8, expected 7"]),
    "hx rows": ((x(B, I), x(2, H)), ["batch size 3 doesn't match hidden0 batch size 2"]),
    "input dtype": ((x(B, I, dtype=torch.float64),), ["(torch.float64)", "input.to("]),
    "hx dtype": ((x(B, I), x(B, H, dtype=torch.float64)), ["(torch.float64)", "hx.to("]),
    "input device": ((x(B, I, device="meta"),), ["input tensor at meta", "input.to('cpu')"]),
    "hx device": ((x(B, I), x(B, H, device="meta")), ["hidden tensor at meta", "hx.to('cpu')"]),
}


def starts(*shape, **options):
    return {"resets": torch.zeros(shape or (T, B), dtype=torch.bool, **options)}


def ends(*values, **options):
    return {"lengths": torch.tensor(values, **options)}


# What nn.GRU has no counterpart for: input, keywords, the type and what the message says.
ROWS_CASES = {
    "negative lengths": (x(), ends(4, -1, 2), ValueError, ["within 0 and 4", "got: -1"]),
    "lengths too long": (x(), ends(5, 1, 6), ValueError, ["within 0 and 4", "got: 5, 6"]),
    "lengths too long, one row": (
        x(T, I),
        {"lengths": torch.tensor(5)},
        ValueError,
        ["within 0 and 4", "got: 5"],
    ),
    "floating lengths": (
        x(),
        ends(1.0, 2.0, 3.0),
        ValueError,
        ["integer dtype, got: torch.float32", "lengths.long()"],
    ),
    "lengths of bool": (x(), ends(True, True, True), ValueError, ["got: torch.bool"]),
    "lengths of another device": (
        x(),
        ends(1, 2, 3, device="meta"),
        RuntimeError,
        ["input tensor at cpu and lengths at meta", "lengths.to('cpu')"],
    ),
    "too many lengths": (x(), ends(1, 2, 3, 4), RuntimeError, ["shape [3]", "got [4]"]),
    "lengths with a dimension too many": (
        x(),
        ends([1, 2, 3]),
        RuntimeError,
        ["shape [3]", "got [1, 3]"],
    ),
    "lengths for one row": (x(T, I), ends(4), RuntimeError, ["shape []", "got [1]"]),
    "lengths in a list": (
        x(),
        {"lengths": [4, 2, 1]},
        TypeError,
        ["lengths to be a tensor", "list"],
    ),
    "lengths of packed input": (
        packed(),
        ends(3, 2),
        ValueError,
        ["lengths cannot be given for a PackedSequence", "padded rows and lengths="],
    ),
    "resets of another shape": (
        x(),
        starts(B, T),
        RuntimeError,
        ["shape [4, 3]", "got [3, 4]", "input is [4, 3, 5]"],
    ),
    "resets with features": (x(), starts(T, B, 1), RuntimeError, ["got [4, 3, 1]"]),
    "resets for one row": (x(T, I), starts(T, 1), RuntimeError, ["shape [4]", "got [4, 1]"]),
    "resets of integers": (
        x(),
        {"resets": torch.zeros(T, B, dtype=torch.int64)},
        ValueError,
        ["dtype torch.bool, got: torch.int64", "resets.bool()"],
    ),
    "resets of another device": (
        x(),
        starts(device="meta"),
        RuntimeError,
        ["input tensor at cpu and resets at meta", "resets.to('cpu')"],
    ),
    "resets in a list": (x(), {"resets": [True]}, TypeError, ["resets to be a tensor", "list"]),
    "resets of packed input": (
        packed(),
        starts(3, 2),
        ValueError,
        ["resets cannot be given for a PackedSequence"],
    ),
}


def refuses(module, theirs, args, words):
    with pytest.raises(Exception) as expected:
        theirs(*args)
    with pytest.raises(expected.type) as caught:
        module(*args)
    assert caught.type is expected.type
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("case", LAYER_CASES)
@pytest.mark.compat("input", "errors of a wrong input or hx", "works better", "they say what to do")
def test_layer(case):
    """In the very same words on every backend, even one that could not run here."""
    args, words = LAYER_CASES[case]
    said = set()
    for backend in [*BACKENDS, "triton"]:
        said.add(refuses(GRU(I, H, 2, backend=backend), nn.GRU(I, H, 2), args, words))
    assert len(said) == 1


@pytest.mark.parametrize("case", LAYER_CASES)
def test_layer_with_reset_before(case):
    refuses(GRU(I, H, 2, reset_after=False), nn.GRU(I, H, 2), *LAYER_CASES[case])


@pytest.mark.parametrize("case", ROWS_CASES)
@pytest.mark.compat("beyond", "lengths", "works better")
@pytest.mark.compat("beyond", "resets", "works better")
def test_lengths_and_resets(case):
    """In the very same words on every backend."""
    given, options, error, words = ROWS_CASES[case]
    said = set()
    for backend in [*BACKENDS, "triton"]:
        with pytest.raises(error) as caught:
            GRU(I, H, 2, backend=backend)(given, **options)
        assert caught.type is error
        said.add(str(caught.value))
    (message,) = said
    for word in words:
        assert word in message


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_and_resets_with_batch_first(backend):
    layer = GRU(I, H, batch_first=True, backend=backend)
    with pytest.raises(RuntimeError, match=r"shape \[3, 4\].*got \[4, 3\]; input is \[3, 4, 5\]"):
        layer(x(B, T, I), **starts(T, B))
    with pytest.raises(ValueError, match="within 0 and 4"):
        layer(x(B, T, I), **ends(1, 2, 5))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CELL_CASES)
def test_cell(case, backend):
    refuses(GRUCell(I, H, backend=backend), nn.GRUCell(I, H), *CELL_CASES[case])


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_first_layout_is_named(backend):
    layer = GRU(I, H, batch_first=True, backend=backend)
    with pytest.raises(RuntimeError, match=r"\[batch, steps, input_size\], and is \[3, 4, 6\]"):
        layer(x(B, T, 6))
    with pytest.raises(RuntimeError, match="sequence length to be larger than 0"):
        layer(x(B, 0, I))
    with pytest.raises(RuntimeError, match=r"\(1, 3, 7\), got \[3, 1, 7\].*with batch_first too"):
        layer(x(B, T, I), x(B, 1, H))


@pytest.mark.parametrize("backend", BACKENDS)
def test_arguments_that_are_not_tensors(backend):
    with pytest.raises(TypeError, match="GRU: Expected input to be a tensor, got list"):
        GRU(I, H, backend=backend)([1.0])
    with pytest.raises(TypeError, match="GRU: Expected hx to be a tensor, got tuple"):
        GRU(I, H, backend=backend)(x(), (x(1, B, H), x(1, B, H)))
    with pytest.raises(TypeError, match="GRUCell: Expected input to be a tensor, got NoneType"):
        GRUCell(I, H, backend=backend)(None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", ["x", "weights", "hx"])
def test_autocast_refuses_to_mix_float64(which, backend):
    dtypes = {name: torch.float64 if name == which else torch.float32 for name in ("x", "hx")}
    layer = GRU(I, H, backend=backend)
    if which == "weights":
        layer.double()
    hx = x(1, B, H, dtype=dtypes["hx"])
    with torch.autocast("cpu"), pytest.raises(RuntimeError, match="all have it or none"):
        layer(x(dtype=dtypes["x"]), hx)


@pytest.mark.parametrize("cls", [GRU, GRUCell])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"backend": "cudnn"},
            ValueError,
            "one of 'auto', 'triton', 'cpu', 'torch', 'reference', got: 'cudnn'",
        ),
        ({"backend": None}, ValueError, "got: None"),
        ({"backend": "torch", "reset_after": False}, ValueError, "reset_after=True only"),
        ({"reset_after": 1}, TypeError, "reset_after should be of type bool, got: int"),
        ({"input_size": -1}, ValueError, "input_size must (be greater|not be)"),
        ({"hidden_size": -3}, ValueError, "hidden_size must (be greater|not be)"),
        ({"hidden_size": 7.0}, TypeError, "hidden_size should be of type int, got: float"),
        ({"input_size": "5"}, TypeError, "input_size should be of type int, got: str"),
    ],
)
@pytest.mark.compat("input", "errors of wrong arguments", "works")
def test_construction(arguments, error, message, cls):
    with pytest.raises(error, match=message):
        cls(**{"input_size": I, "hidden_size": H, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_size": 0}, ValueError, "input_size must be greater than zero"),
        ({"hidden_size": 0}, ValueError, "hidden_size must be greater than zero"),
        ({"num_layers": 0}, ValueError, "num_layers must be greater than zero"),
        ({"num_layers": -1}, ValueError, "num_layers must be greater than zero"),
        ({"num_layers": 2.0}, TypeError, "num_layers should be of type int, got: float"),
        ({"proj_size": 0}, ValueError, "proj_size argument is only supported for LSTM"),
        ({"save_gates": 1}, TypeError, "save_gates should be of type bool, got: int"),
        ({"layer_norm": 1}, TypeError, "layer_norm should be of type bool, got: int"),
        ({"zoneout": True}, TypeError, "zoneout should be a number, got: bool"),
        ({"zoneout": "0.1"}, TypeError, "zoneout should be a number, got: str"),
        ({"recurrent_dropout": 1}, ValueError, "recurrent_dropout should be at least 0 and below"),
        ({"dropout": 1.5}, ValueError, "dropout should be a number in range"),
        ({"dropout": -0.1}, ValueError, "dropout should be a number in range"),
        ({"bias": 1}, TypeError, "bias should be of type bool, got: int"),
        ({"batch_first": 0}, TypeError, "batch_first should be of type bool, got: int"),
    ],
)
@pytest.mark.compat("arguments", "proj_size", "works", "refused with nn.GRU's message")
def test_construction_of_a_layer(arguments, error, message):
    with pytest.raises(error, match=message):
        GRU(**{"input_size": I, "hidden_size": H, **arguments})
    if "proj_size" in arguments:
        with pytest.raises(error, match=message):
            nn.GRU(I, H, **arguments)


def test_numbers_of_every_kind():
    layer = GRU(I, H, np.int64(2), dropout=np.float32(0.5), zoneout=Fraction(1, 4))
    assert layer(x())[1].shape == (2, B, H)


@pytest.mark.parametrize("case", LAYER_CASES)
def test_explain_tells_a_wrong_input(case):
    given, *hx = LAYER_CASES[case][0]
    if not hx:  # which explain is not given
        layer = GRU(I, H, 2)
        with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
            layer(given)
        assert layer.explain(given).startswith(f"No backend will run. {caught.value}")


@pytest.mark.parametrize("case", ROWS_CASES)
def test_explain_tells_wrong_lengths_and_resets(case):
    given, options, error, _ = ROWS_CASES[case]
    layer = GRU(I, H, 2)
    with pytest.raises(error) as caught:
        layer(given, **options)
    assert layer.explain(given, **options) == f"No backend will run. {caught.value}."


def test_backend_set_later():
    layer = GRU(I, H)
    layer.backend = "fastest"
    with pytest.raises(ValueError, match="got: 'fastest'"):
        layer(x())


def test_functional_with_a_missing_parameter():
    with pytest.raises(ValueError, match=r"4 tensors for each layer with bias=True.*got 3"):
        gru(x(), None, list(nn.GRU(I, H).parameters())[:3])


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_bias_alone_is_refused(backend):
    weights = (torch.zeros(3 * H, I), torch.zeros(3 * H, H))
    for biases, given in (((x(3 * H), None), "bias_ih"), ((None, x(3 * H)), "bias_hh")):
        with pytest.raises(ValueError, match=f"both be given or both be None, got {given}"):
            gru_cell(x(B, I), None, *weights, *biases, backend=backend)


def test_no_parameters_are_refused():
    with pytest.raises(ValueError, match="params should hold 4 tensors for each layer"):
        gru(x(), None, [])
