"""PackedSequence and lengths= against nn.GRU, over configurations that hypothesis draws."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.tolerances import assert_close
from triton_gru import GRU
from triton_gru.engines.cpu import library

BACKENDS = ["auto", "reference", "torch"]
if library.obstacle() is None:
    BACKENDS.append("cpu")


@st.composite
def configurations(draw):
    steps = draw(st.integers(1, 9))
    lengths = draw(st.lists(st.integers(1, steps), min_size=1, max_size=5))
    enforce_sorted = draw(st.booleans())
    return {
        "lengths": sorted(lengths, reverse=True) if enforce_sorted else lengths,
        "enforce_sorted": enforce_sorted,
        "padding": draw(st.integers(0, 2)),  # steps that no row has
        "hx": draw(st.booleans()),
        "backend": draw(st.sampled_from(BACKENDS)),
        "dtype": draw(st.sampled_from([torch.float32, torch.float64])),
        "seed": draw(st.integers(0, 2**31)),
        "module": {
            "input_size": draw(st.integers(1, 6)),
            "hidden_size": draw(st.integers(1, 9)),
            "num_layers": draw(st.integers(1, 3)),
            "bias": draw(st.booleans()),
            "batch_first": draw(st.booleans()),
            "bidirectional": draw(st.booleans()),
        },
    }


def gradients(outputs, cotangents, inputs):
    return torch.autograd.grad(outputs, inputs, cotangents)


@pytest.mark.slow
@settings(
    max_examples=500,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(configurations())
@pytest.mark.compat("input", "PackedSequence, sorted or not", "works")
@pytest.mark.compat("beyond", "lengths", "works better")
def test_packed_and_lengths_agree_with_nn_gru(configuration):
    torch.manual_seed(configuration["seed"])
    dtype, module = configuration["dtype"], configuration["module"]
    if configuration["backend"] == "cpu":
        dtype = torch.float32
    theirs = nn.GRU(**module, dtype=dtype)
    ours = GRU.from_torch(theirs, backend=configuration["backend"])
    lengths = torch.tensor(configuration["lengths"])
    T, B = int(lengths.max()) + configuration["padding"], len(lengths)
    batch_first = module["batch_first"]
    layout = (B, T) if batch_first else (T, B)
    x = torch.randn(*layout, module["input_size"], dtype=dtype, requires_grad=True)
    hx = None
    if configuration["hx"]:
        rows = module["num_layers"] * (2 if module["bidirectional"] else 1)
        hx = torch.randn(rows, B, module["hidden_size"], dtype=dtype, requires_grad=True)
    given_tensors = [x] if hx is None else [x, hx]

    def packed(gru):
        options = {"batch_first": batch_first, "enforce_sorted": configuration["enforce_sorted"]}
        rows = pack_padded_sequence(x, lengths, **options)
        y, h_n = gru(rows, hx)
        for field in ("batch_sizes", "sorted_indices", "unsorted_indices"):
            assert getattr(y, field) is getattr(rows, field)
        return pad_packed_sequence(y, batch_first=batch_first, total_length=T)[0], h_n

    expected = packed(theirs)
    cotangents = [torch.randn_like(output) for output in expected]
    expected_gradients = gradients(expected, cotangents, [*given_tensors, *theirs.parameters()])
    for outcome in (packed(ours), ours(x, hx, lengths=lengths)):
        assert_close(outcome, expected)
        found = gradients(outcome, cotangents, [*given_tensors, *ours.parameters()])
        assert_close(found, expected_gradients)
