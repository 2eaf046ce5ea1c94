"""A PackedSequence through what traces, exports and takes a layer apart, as with nn.GRU."""

import io
import sys
import typing

import pytest
import torch
from torch import nn
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
    pad_sequence,
)

from tests.tolerances import assert_close
from triton_gru import GRU

IN, H = 3, 4
LAYERS = {
    "auto": {},
    "reference": {"backend": "reference"},
    "reset before": {"reset_after": False},
    "two layers, both directions": {"num_layers": 2, "bidirectional": True},
}
each_layer = pytest.mark.parametrize("settings", LAYERS.values(), ids=LAYERS)


class Model(nn.Module):
    """Pack, run, pad: what a user's model does with lengths."""

    def __init__(self, rnn, enforce_sorted=False):
        super().__init__()
        self.rnn, self.enforce_sorted = rnn, enforce_sorted

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, enforce_sorted=self.enforce_sorted)
        y, h_n = self.rnn(packed)
        return pad_packed_sequence(y)[0], h_n


@pytest.mark.parametrize(
    ("settings", "enforce_sorted"),
    [({}, True), ({}, False), ({"backend": "reference"}, False), ({"reset_after": False}, True)],
    ids=str,
)
@pytest.mark.compat(
    "graphs", "torch.compile of a PackedSequence", "works", "with a break of the graph, as there"
)
def test_compile(settings, enforce_sorted):
    torch._dynamo.reset()
    layer, x = GRU(IN, H, **settings), torch.randn(5, 2, IN)
    packed = pack_padded_sequence(x, torch.tensor([5, 2]), enforce_sorted=enforce_sorted)
    outcomes = []
    for call in (torch.compile(layer, backend="eager"), layer):
        y, h_n = call(packed)
        assert isinstance(y, PackedSequence)
        grads = torch.autograd.grad(y.data.sin().sum() + h_n.sum(), [*layer.parameters()])
        outcomes.append([y.data, h_n, *grads])
        for ours, theirs in zip(y[1:], packed[1:], strict=True):
            assert (ours is None and theirs is None) or torch.equal(ours, theirs)
    assert_close(*outcomes)


@each_layer
@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.compat("graphs", "torch.jit.trace of pack, GRU, pad", "works", "for all sizes")
def test_jit_trace(settings):
    model, file = Model(GRU(IN, H, **settings)), io.BytesIO()
    traced = torch.jit.trace(
        model, (torch.randn(5, 2, IN), torch.tensor([5, 2])), check_trace=False
    )
    torch.jit.save(traced, file)
    file.seek(0)
    for sizes in ([3, 7, 1], [1], [2, 2]):
        x, lengths = torch.randn(max(sizes), len(sizes), IN), torch.tensor(sizes)
        assert_close(traced(x, lengths), model(x, lengths))
    assert_close(torch.jit.load(file)(x, lengths), model(x, lengths))


@pytest.mark.filterwarnings("ignore")  # the exporter's own
@pytest.mark.parametrize("settings", [{}, {"backend": "reference"}, {"bidirectional": True}])
@pytest.mark.compat(
    "graphs", "torch.onnx.export(dynamo=False) of pack, GRU, pad", "works", "for all sizes"
)
def test_onnx_by_torchscript(settings):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    model, file = Model(GRU(IN, H, **settings), enforce_sorted=True).eval(), io.BytesIO()
    torch.onnx.export(
        *(model, (torch.randn(5, 2, IN), torch.tensor([5, 2])), file),
        dynamo=False,
        input_names=["x", "lengths"],
        output_names=["y", "h_n"],
        dynamic_axes={"x": {0: "T", 1: "B"}, "lengths": {0: "B"}},
    )
    session = onnxruntime.InferenceSession(file.getvalue())
    x, lengths = torch.randn(7, 3, IN), torch.tensor([7, 3, 1])
    found = session.run(None, {"x": x.numpy(), "lengths": lengths.numpy()})
    assert_close([torch.from_numpy(output) for output in found], list(model(x, lengths)))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("settings", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.compat(
    "derivatives", "expanded weights: torch.nn.utils._per_sample_grad", "works", "with `torch`"
)
def test_expanded_weights(settings, packed):
    """They are tensors that know torch's own operator alone."""
    theirs = nn.GRU(IN, H, batch_first=True, **settings)
    rows = [torch.randn(steps, IN) for steps in (5, 2, 4)]
    x = pack_sequence(rows, enforce_sorted=False) if packed else pad_sequence(rows, True)
    found = []
    for module in (GRU.from_torch(theirs), theirs):
        y, _ = call_for_per_sample_grads(module, batch_size=len(rows))(x)
        (y.data if packed else y).sin().sum().backward()
        found.append([parameter.grad_sample for parameter in module.parameters()])
    assert_close(*found)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="get_overloads is of Python 3.11")
@pytest.mark.compat("attributes", "types: forward(tensor) is (Tensor, Tensor)", "works")
def test_type_checkers_see_what_comes_back():
    hints = [typing.get_type_hints(overload) for overload in typing.get_overloads(GRU.forward)]
    found = {hint["input"]: hint["return"] for hint in hints}
    assert found == {
        torch.Tensor: tuple[torch.Tensor, torch.Tensor],
        PackedSequence: tuple[PackedSequence, torch.Tensor],
    }
