"""ONNX: what onnxruntime computes from an exported model is what the model computes."""

import io

import pytest
import torch
from torch import nn
from torch.export import Dim

from tests.tolerances import assert_close
from triton_gru import GRU, GRUCell, dispatch

onnxruntime = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own

T, B, IN, H = 4, 3, 5, 7


def exported(model, *args, dynamic_shapes=None, **kwargs):
    """A session of onnxruntime, called like the model, and the GRU nodes."""
    program = torch.onnx.export(
        model.eval(), args, kwargs=kwargs, dynamic_shapes=dynamic_shapes, verbose=False
    )
    proto = program.model_proto
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString())

    def run(*inputs):
        names = [given.name for given in session.get_inputs()]
        values = [x.numpy() for x in inputs if x is not None]
        outputs = session.run(None, dict(zip(names, values, strict=True)))
        return tuple(torch.from_numpy(output) for output in outputs)

    return run, [node for node in proto.graph.node if node.op_type == "GRU"]


def linear_before_reset(nodes):
    attributes = [a for node in nodes for a in node.attribute]
    return [a.i for a in attributes if a.name == "linear_before_reset"]


@pytest.mark.parametrize("reset_after", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {"batch_first": True},
        {"bidirectional": True, "backend": "reference"},
        {"num_layers": 2, "bidirectional": True, "bias": False, "backend": "triton"},
    ],
    ids=["plain", "bidirectional", "two layers"],
)
@pytest.mark.compat(
    "graphs",
    "torch.onnx.export",
    "works better",
    "both variants, `linear_before_reset` right, sizes dynamic; from any backend",
)
def test_both_variants(reset_after, settings):
    layer = GRU(IN, H, reset_after=reset_after, **settings)
    layers, directions = layer.num_layers, 1 + layer.bidirectional

    def inputs(rows, steps):
        x = torch.randn((rows, steps, IN) if layer.batch_first else (steps, rows, IN))
        return x, torch.randn(layers * directions, rows, H)

    dynamic = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, {1: Dim.DYNAMIC})
    run, nodes = exported(layer, *inputs(B, T), dynamic_shapes=dynamic)
    assert linear_before_reset(nodes) == [int(reset_after)] * layers
    layer.backend = "reference"
    for given in (inputs(B, T), inputs(6, 9)):
        assert_close(run(*given), layer(*given))


@pytest.mark.parametrize("reset_after", [True, False])
def test_lengths(reset_after):
    layer = GRU(IN, H, 2, bidirectional=True, reset_after=reset_after)
    x, lengths = torch.randn(T, B, IN), torch.tensor([T, 1, 2])
    run, _ = exported(layer, x, lengths=lengths)
    assert_close(run(x, lengths), layer(x, lengths=lengths))


@pytest.mark.compat(
    "graphs", "torch.onnx.export with layer_norm", "works better", "step by step; nn.GRU has none"
)
def test_layer_norm():
    layer, x = GRU(IN, H, layer_norm=True), torch.randn(T, B, IN)
    run, nodes = exported(layer, x)
    assert not nodes
    assert_close(run(x), layer(x))


@pytest.mark.compat("graphs", "torch.onnx.export with resets", "differs", "an error")
def test_resets_are_refused(monkeypatch):
    """Asked directly: torch.onnx.export reports the error of the last way that it tries."""
    monkeypatch.setattr(dispatch, "eager", lambda: False)
    monkeypatch.setattr(dispatch, "exporting_to_onnx", lambda: True)
    with pytest.raises(ValueError, match=r"resets cannot be exported to ONNX.* lengths"):
        GRU(IN, H)(torch.randn(T, B, IN), resets=torch.zeros(T, B, dtype=torch.bool))


@pytest.mark.parametrize("reset_after", [True, False])
def test_a_model_with_a_layer_and_a_cell(reset_after):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = GRU(IN, H, batch_first=True, reset_after=reset_after)
            self.cell = GRUCell(H, H, reset_after=reset_after)
            self.output = nn.Linear(H, 2)

        def forward(self, x):
            y, h_n = self.rnn(x)
            return self.output(self.cell(y[:, -1], h_n[0]))

    model, x = Model(), torch.randn(B, T, IN)
    run, nodes = exported(model, x)
    assert linear_before_reset(nodes) == [int(reset_after)] * 2
    assert_close(run(x)[0], model(x))


@pytest.mark.parametrize("dynamo", [True, False], ids=["default", "TorchScript"])
def test_through_to_torch(dynamo, tmp_path):
    layer, x = GRU(IN, H, 2, bidirectional=True).eval(), torch.randn(T, B, IN)
    file = tmp_path / "model.onnx"
    torch.onnx.export(layer.to_torch(), (x,), file, dynamo=dynamo, verbose=False)
    nodes = [node for node in onnx.load(file).graph.node if node.op_type == "GRU"]
    assert linear_before_reset(nodes) == [1, 1]
    session = onnxruntime.InferenceSession(file)
    outputs = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close([torch.from_numpy(output) for output in outputs], list(layer(x)))


class Model(nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x):
        return self.rnn(x)[0]


def export_by_torchscript(module, x):
    file = io.BytesIO()
    sizes = {"input_names": ["x"], "dynamic_axes": {"x": [0, 1]}}
    torch.onnx.export(module, (x,), file, dynamo=False, verbose=False, **sizes)
    return file.getvalue()


@pytest.mark.parametrize("wrap", [Model, lambda rnn: rnn], ids=["inside a model", "alone"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_by_torchscript_it_is_torchs_own_gru(backend, wrap):
    layer = GRU(IN, H, 2, bidirectional=True, backend=backend).eval()
    data = export_by_torchscript(wrap(layer), torch.randn(T, B, IN))
    nodes = [node for node in onnx.load_from_string(data).graph.node if node.op_type == "GRU"]
    assert linear_before_reset(nodes) == [1, 1]
    x = torch.randn(9, 6, IN)
    y, *_ = onnxruntime.InferenceSession(data).run(None, {"x": x.numpy()})
    assert_close(torch.from_numpy(y), layer(x)[0])


@pytest.mark.parametrize("bidirectional", [False, True])
def test_by_torchscript_with_lengths(bidirectional):
    class Padded(Model):
        def forward(self, x, lengths):
            return self.rnn(x, lengths=lengths)[0]

    layer, file = GRU(IN, H, 2, bidirectional=bidirectional).eval(), io.BytesIO()
    sizes = {"input_names": ["x", "lengths"], "dynamic_axes": {"x": [0, 1], "lengths": [0]}}
    example = torch.randn(T, B, IN), torch.tensor([T, 0, 2])
    torch.onnx.export(Padded(layer), example, file, dynamo=False, verbose=False, **sizes)
    x, lengths = torch.randn(9, 6, IN), torch.tensor([3, 9, 0, 1, 7, 2])
    session = onnxruntime.InferenceSession(file.getvalue())
    (y,) = session.run(None, {"x": x.numpy(), "lengths": lengths.numpy()})
    assert_close(torch.from_numpy(y), layer(x, lengths=lengths)[0])


@pytest.mark.parametrize("wrap", [Model, lambda rnn: rnn], ids=["inside a model", "alone"])
@pytest.mark.parametrize(
    ("options", "what"),
    [({"reset_after": False}, "reset_after=False"), ({"layer_norm": True}, "layer_norm")],
)
@pytest.mark.compat(
    "graphs",
    "torch.onnx.export(dynamo=False), by TorchScript",
    "differs",
    "as nn.GRU, where the layer computes nn.GRU's formula; else an error that names the default",
)
def test_by_torchscript_the_rest_is_refused(options, what, wrap):
    with pytest.raises(RuntimeError, match=rf"dynamo=False.* {what}.* dynamo=True"):
        export_by_torchscript(wrap(GRU(IN, H, **options)), torch.randn(T, B, IN))
