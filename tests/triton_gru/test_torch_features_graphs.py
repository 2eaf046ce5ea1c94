"""What traces a model: torch.compile, torch.export, torch.fx, TorchScript."""

import io

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.export import Dim

from tests.tolerances import assert_close
from tests.triton_gru.counterparts import IN, B, T, pair, results
from triton_gru import GRU, GRUCell

both_variants = pytest.mark.parametrize("reset_after", [True, False])
SIZES = [(T, B), (5, 2), (9, 6)]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@both_variants
@pytest.mark.compat(
    "graphs",
    "torch.compile(fullgraph=True), forward and backward",
    "works better",
    "one graph for every batch and number of steps; Dynamo breaks the graph at nn.GRU",
)
def test_compiles_once_for_all_sizes(backend, reset_after):
    layer = GRU(IN, 7, backend=backend, reset_after=reset_after, bidirectional=True)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for steps, rows in SIZES:
        x = torch.randn(steps, rows, IN)
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        outcomes = []
        for call, leaf in zip((compiled, layer), leaves, strict=True):
            y, h_n = call(leaf)
            loss = y.sin().sum() + h_n.cos().sum()
            outcomes.append([y, h_n, *torch.autograd.grad(loss, [leaf, *layer.parameters()])])
        assert_close(outcomes[0], outcomes[1])
        frames.append(counter.frame_count)
    assert frames[0] > 0 and frames == [frames[0]] * len(SIZES)
    assert not counters["graph_break"]


@pytest.mark.compat("graphs", "torch.compile(fullgraph=True), forward and backward", "works better")
def test_nn_gru_does_not_compile_whole():
    """When this fails, torch has caught up and the row above should say so."""
    with pytest.raises(torch._dynamo.exc.Unsupported, match="GRU"):
        torch.compile(nn.GRU(IN, 7), fullgraph=True, backend="eager")(torch.randn(T, B, IN))


@pytest.mark.soak
@pytest.mark.parametrize("settings", [{}, {"reset_after": False}], ids=["after", "before"])
@pytest.mark.compat("graphs", "torch.compile with Inductor", "works")
def test_inductor(settings):
    layer = nn.Sequential(nn.Linear(IN, IN), GRU(IN, 7, **settings))
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for steps, rows in SIZES[:2]:
        x = torch.randn(steps, rows, IN)
        outcomes = []
        for call in (compiled, layer):
            y, _ = call(x)
            outcomes.append([y, *torch.autograd.grad(y.sin().sum(), [*layer.parameters()])])
        assert_close(outcomes[0], outcomes[1])


@both_variants
@pytest.mark.compat("graphs", "torch.compile of GRUCell", "works")
def test_a_cell_compiles(backend, reset_after):
    cell = GRUCell(IN, 7, backend=backend, reset_after=reset_after)
    compiled = torch.compile(cell, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 5):
        x, h = torch.randn(rows, IN), torch.randn(rows, 7)
        assert_close(compiled(x, h), cell(x, h))


@both_variants
@pytest.mark.parametrize("dynamic", [(), (1,), (0, 1)], ids=["static", "rows", "steps and rows"])
@pytest.mark.compat(
    "graphs",
    "torch.export",
    "works better",
    "the number of steps may be dynamic too; the program then holds an operator of triton_gru",
)
def test_export(backend, reset_after, dynamic):
    layer = GRU(IN, 7, bidirectional=True, backend=backend, reset_after=reset_after).eval()
    x = torch.randn(T, B, IN)
    shapes = (dict.fromkeys(dynamic, Dim.DYNAMIC),)
    # The strict mode, by Dynamo, for what is hardest.
    for strict in (False, True) if len(dynamic) == 2 else (False,):
        program = torch.export.export(layer, (x,), dynamic_shapes=shapes, strict=strict).module()
        assert_close(program(x), layer(x))
        other = torch.randn(9 if 0 in dynamic else T, 6 if 1 in dynamic else B, IN)
        assert_close(program(other), layer(other))


@pytest.mark.compat("graphs", "torch.export", "works better")
def test_nn_gru_exports_one_number_of_steps():
    """When this fails, torch has caught up and the row above should say so."""
    x = torch.randn(T, B, IN)
    with pytest.raises(torch._dynamo.exc.UserError, match="Constraints violated"):
        torch.export.export(nn.GRU(IN, 7), (x,), dynamic_shapes=({0: Dim.DYNAMIC},))


@both_variants
@pytest.mark.compat("graphs", "torch.fx.symbolic_trace", "works")
def test_symbolic_trace(backend, reset_after):
    ours, theirs = pair(backend, reset_after)

    class Model(nn.Module):
        def __init__(self, rnn):
            super().__init__()
            self.rnn = rnn

        def forward(self, x):
            y, h_n = self.rnn(x)
            return y * 2, h_n

    traced = torch.fx.symbolic_trace(Model(ours))
    x = torch.randn(T, B, IN)
    y, h_n = traced(x)
    expected_y, expected_h = theirs(x)
    assert_close((y / 2, h_n), (expected_y, expected_h))
    assert_close(traced(x[:2])[1], theirs(x[:2])[1])


@pytest.mark.compat(
    "graphs",
    "torch.jit.trace",
    "works",
    "for all sizes, on a CPU's backends; with reset_after=False the file holds an operator of "
    "ours: import triton_gru before torch.jit.load",
)
@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "no_grad"])
@both_variants
def test_jit_trace(backend, reset_after, recorded):
    ours, theirs = pair(backend, reset_after)
    x, other = torch.randn(T, B, IN), torch.randn(9, 6, IN)
    with torch.set_grad_enabled(recorded):
        traced = torch.jit.trace(ours, (x,))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    for module in (traced, torch.jit.load(file)):
        for given in (x * 2, other):
            outcomes = []
            for call in (module, theirs):
                y, h_n = call(given)
                loss = y.sin().sum() + h_n.cos().sum()
                outcomes.append([y, h_n, *torch.autograd.grad(loss, [*call.parameters()])])
            assert_close(outcomes[0], outcomes[1])


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@both_variants
def test_jit_trace_with_lengths(backend, reset_after):
    layer = GRU(IN, 7, 2, bidirectional=True, backend=backend, reset_after=reset_after)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = layer

        def forward(self, x, lengths):
            return self.rnn(x, lengths=lengths)

    traced = torch.jit.trace(Model(), (torch.randn(T, B, IN), torch.tensor([T, 0, 2])))
    x, lengths = torch.randn(9, 6, IN), torch.tensor([3, 9, 0, 1, 7, 2])
    assert_close(traced(x, lengths), layer(x, lengths=lengths))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@both_variants
def test_jit_trace_of_a_cell(reset_after):
    cell, file = GRUCell(IN, 7, reset_after=reset_after), io.BytesIO()
    torch.jit.save(torch.jit.trace(cell, (torch.randn(B, IN),)), file)
    file.seek(0)
    x = torch.randn(6, IN)
    assert_close(torch.jit.load(file)(x), cell(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(
    "option", [{"layer_norm": True}, {"zoneout": 0.3}, {"recurrent_dropout": 0.3}], ids=str
)
@pytest.mark.compat(
    "graphs",
    "torch.jit.trace with layer_norm, zoneout, recurrent_dropout",
    "differs",
    "refused: the graph would hold one number of steps and not say so",
)
def test_jit_trace_refuses_what_enters_a_step(option):
    (name,) = option
    with pytest.raises(RuntimeError, match=rf"cannot record {name}.* Use torch\.export\.export"):
        torch.jit.trace(GRU(IN, 7, **option), (torch.randn(T, B, IN),))


@pytest.mark.compat(
    "graphs", "torch.jit.script", "differs", "an error of TorchScript; script `to_torch()`"
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_jit_script():
    layer = GRU(IN, 7)
    # torch 2.11 refuses the list of parameters before it comes to the arguments.
    refusals = torch.jit.frontend.NotSupportedError, TypeError
    with pytest.raises(refusals, match=r"keyword-only arguments|_flat_weights"):
        torch.jit.script(layer)

    class Model(nn.Module):  # TorchScript compiles no nn.GRU that stands alone
        def __init__(self):
            super().__init__()
            self.rnn = layer.to_torch()

        def forward(self, x: torch.Tensor):
            return self.rnn(x)

    x = torch.randn(T, B, IN)
    assert_close(torch.jit.script(Model())(x), layer(x))


@both_variants
@pytest.mark.compat(
    "graphs", "torch.compile, `torch.utils.checkpoint` and autocast inside", "works"
)
def test_compiles_around_other_features(backend, reset_after):
    ours, _ = pair(backend, reset_after)

    def run(x, hx):
        with torch.autocast("cpu", torch.bfloat16):
            return torch.utils.checkpoint.checkpoint(ours, x, hx, use_reentrant=False)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    compiled.parameters = run.parameters = ours.parameters
    x = torch.randn(T, B, IN)
    assert_close(results(compiled, x), results(run, x), dtype=torch.bfloat16)


@pytest.mark.compat(
    "graphs",
    "torch.compile, torch.export with layer_norm, zoneout, recurrent_dropout",
    "differs",
    "works, with one graph for each number of steps; a dynamic number is an error of torch",
)
def test_what_enters_a_step_is_traced_step_by_step():
    layer, x = GRU(IN, 7, layer_norm=True), torch.randn(T, B, IN)
    compiled = torch.compile(layer, fullgraph=True, dynamic=False, backend="eager")
    assert_close(compiled(x), layer(x))
    with pytest.raises(torch._dynamo.exc.UserError, match="Constraints violated"):
        torch.export.export(layer, (x,), dynamic_shapes=({0: Dim.DYNAMIC},))
