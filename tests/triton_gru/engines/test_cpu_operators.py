"""The CPU engine in graphs: torch.compile, torch.export, torch.jit.trace."""

import io
from functools import partial

import pytest
import torch

import triton_gru
from tests.tolerances import assert_close
from triton_gru.engines.cpu import library, operators

pytestmark = pytest.mark.skipif(
    library.obstacle() is not None, reason=f"no CPU engine here: {library.obstacle()}"
)


def gradients(module, x, **rows):
    leaf = x.clone().requires_grad_()
    y, h = module(leaf, **rows)
    loss = y.square().sum() + (h * torch.arange(h.numel()).view_as(h)).sum()
    return [y, h, *torch.autograd.grad(loss, [leaf, *module.parameters()])]


def nodes(graph) -> list[str]:
    return [str(n.target) for n in graph.nodes if str(n.target).startswith("triton_gru")]


@pytest.mark.parametrize("backend", ["auto", "cpu"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    ("reset_after", "bidirectional", "bias"), [(True, False, True), (False, True, False)]
)
def test_a_compiled_layer_is_the_eager_one(backend, batch_first, reset_after, bidirectional, bias):
    torch.manual_seed(0)
    module = triton_gru.GRU(
        5, 7, 2, bias=bias, batch_first=batch_first, bidirectional=bidirectional,
        reset_after=reset_after, backend=backend,
    )  # fmt: skip
    exact = triton_gru.GRU.from_torch(module, backend="reference").double()
    graphs = []

    def backend_of_graphs(graph, _):
        graphs.append(nodes(graph.graph))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend_of_graphs)
    for T, B in ((6, 3), (9, 4)):
        x = torch.randn((B, T, 5) if batch_first else (T, B, 5))
        lengths = torch.randint(0, T + 1, (B,))
        resets = torch.rand(x.shape[:2]) < 0.3
        for rows in ({}, {"lengths": lengths}, {"lengths": lengths, "resets": resets}):
            graphs.clear()
            found = gradients(compiled, x, **rows)
            assert all(g == ["triton_gru.cpu_layer_forward.default"] * 2 for g in graphs)
            for mine, true in zip(found, gradients(exact, x.double(), **rows), strict=True):
                assert_close(mine, true.float())


@pytest.mark.parametrize("lengths", [None, [0, 0]], ids=["no rows", "rows without steps"])
def test_a_batch_without_a_step_has_gradients(lengths):
    rows = {} if lengths is None else {"lengths": torch.tensor(lengths)}
    x = torch.randn(5, len(lengths or []), 4)
    module = triton_gru.GRU(4, 6, bidirectional=True)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for mine, eager in zip(
        gradients(compiled, x, **rows), gradients(module, x, **rows), strict=True
    ):
        assert_close(mine, eager)


@pytest.mark.parametrize("backend", ["auto", "cpu"])
@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_a_transform_can_be_compiled(backend, transform):
    module = triton_gru.GRU(4, 6, reset_after=False, backend=backend)

    def derivative(x):
        return torch.func.grad(lambda x: module(x)[0].square().sum())(x)

    function = derivative if transform == "grad" else torch.vmap(lambda x: module(x)[0])
    x = torch.randn(5, 3, 4) if transform == "grad" else torch.randn(2, 5, 3, 4)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), function(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("reset_after", [True, False])
@pytest.mark.parametrize("uneven", [True, False])
def test_torch_checks_the_operators(bias, reset_after, uneven):
    T, B, D, H = 5, 3, 2, 6
    shapes = [(T, B, 4), (D, B, H), (D, 3 * H, 4), (D, 3 * H, H)] + 2 * bias * [(D, 3 * H)]
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    rows = (torch.tensor([5, 2, 0]), torch.rand(T, B, D) < 0.2) if uneven else (None, None)
    arguments = (*tensors, *[None] * (6 - len(tensors)), reset_after, *rows, True)
    torch.library.opcheck(operators.layer_forward, arguments)


def test_an_exported_program_has_one_operator_for_any_steps():
    module = triton_gru.GRU(4, 6, reset_after=False)
    steps = torch.export.Dim("steps", min=2)
    program = torch.export.export(module, (torch.randn(5, 3, 4),), dynamic_shapes=({0: steps},))
    assert nodes(program.graph) == ["triton_gru.cpu_layer_forward.default"]
    x = torch.randn(11, 3, 4)
    assert_close(program.module()(x)[0], module.double()(x.double())[0].float())


def test_a_program_for_one_number_of_steps_has_operators_of_torch_alone():
    """It can be loaded without this package."""
    program = torch.export.export(triton_gru.GRU(4, 6, reset_after=False), (torch.randn(5, 3, 4),))
    assert nodes(program.graph) == []


def test_a_trace_is_saved_and_has_gradients():
    module = triton_gru.GRU(4, 6, reset_after=False)
    traced = torch.jit.trace(module, (torch.randn(5, 3, 4),))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    assert "triton_gru::cpu_layer_forward" in str(loaded.inlined_graph)
    x = torch.randn(9, 2, 4)
    for mine, true in zip(
        gradients(loaded, x), gradients(module.double(), x.double()), strict=True
    ):
        assert_close(mine, true.float())


def test_a_graph_runs_where_there_is_no_engine(monkeypatch):
    module = triton_gru.GRU(4, 6, bidirectional=True)
    traced = torch.jit.trace(
        triton_gru.GRU(4, 6, bidirectional=True, reset_after=False), (torch.randn(5, 3, 4),)
    )
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager")
    x, lengths = torch.randn(7, 3, 4), torch.tensor([7, 0, 4])
    with_engine = gradients(compiled, x, lengths=lengths), gradients(traced, x)
    monkeypatch.setattr(operators.library, "obstacle", lambda: "no compiler")
    called = []

    def counted(function, *arguments):
        called.append(function)
        return function(*arguments)

    for name in ("in_plain_torch", "_backward_of_equations"):
        monkeypatch.setattr(operators, name, partial(counted, getattr(operators, name)))
    without = gradients(compiled, x, lengths=lengths), gradients(traced, x)
    assert len(called) == 4  # forward and backward of both
    for a, b in zip(with_engine, without, strict=True):
        for mine, other in zip(a, b, strict=True):
            assert_close(mine, other)
