"""The operators under torch.compile and torch.library's own checks, and what `explain` says."""

import importlib
import warnings

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

import triton_gru
from tests.interpreter import harness
from tests.tolerances import assert_close
from triton_gru import kernel_errors
from triton_gru.engines import operators
from triton_gru.kernel_errors import LaunchRefused


def layer(hidden=20, **options):
    torch.manual_seed(0)
    return triton_gru.GRU(5, hidden, backend="triton", **options)


def gradients(module, x):
    leaf = x.clone().requires_grad_()
    y, h = module(leaf)
    (y.square().sum() + h.sum()).backward()
    found = [y.detach(), h.detach(), leaf.grad, *(p.grad.clone() for p in module.parameters())]
    module.zero_grad()
    return found


@pytest.mark.parametrize(("reset_after", "bidirectional"), [(True, False), (False, True)])
def test_compiles_whole_with_gradients_and_changing_sizes(reset_after, bidirectional):
    module = layer(reset_after=reset_after, bidirectional=bidirectional, num_layers=2)
    compiles = []

    def count(graph, example):
        calls = [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
        compiles.append([call for call in calls if call.startswith("triton_gru")])
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    compiled = torch.compile(
        module, fullgraph=True, dynamic=True, backend=aot_autograd(fw_compiler=count)
    )
    for T, B in ((3, 2), (5, 6)):
        x = torch.randn(T, B, 5)
        for mine, eager in zip(gradients(compiled, x), gradients(module, x), strict=True):
            torch.testing.assert_close(mine, eager)
    # one graph forward and one backward for all sizes, with one operator a layer in each
    assert compiles == [
        ["triton_gru.scan_forward.default"] * 2,
        ["triton_gru.scan_backward.default"] * 2,
    ]


@pytest.mark.parametrize("lengths", [None, torch.tensor([3, 1])])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("hidden", [16, 20])
def test_fake_results_are_laid_out_as_the_real_ones(hidden, bias, lengths):
    T, B, D = 3, 2, 2
    resets = None if lengths is None else torch.rand(T, B, D) < 0.5
    gates_x = torch.randn(T, B, D, 3 * hidden)
    h0, weight = torch.randn(D, B, hidden), torch.randn(D, 3 * hidden, hidden)
    b = torch.randn(D, 3 * hidden) if bias else None
    scan = (gates_x, h0, weight, b, True, lengths, resets, "triton")

    def check(operator, *arguments):
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(operator, arguments, test_utils=checks)
        return operator(*arguments)

    check(operators.scan_forward, *scan, False)
    y, gates_h = check(operators.scan_forward, *scan, True)
    for saved in (None, gates_h):
        check(operators.scan_backward, torch.randn_like(y), y, *scan, saved)
    check(operators.step, gates_x[0, :, 0], h0[0], weight[0], None if b is None else b[0], True)


def test_explain_names_the_plan():
    text = layer().explain(torch.zeros(4, 3, 5))
    assert "Backend 'triton' will run: it was asked for by name." in text
    assert "Forward: 1 independent programs, each with all of W_hh for 16 rows" in text
    text = layer(hidden=300, bidirectional=True).explain(torch.zeros(4, 40, 5))
    assert "programs, each with" in text
    assert "exchanging the state by" in text


def test_group_kernels_compile_too():
    module = layer(hidden=140)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 2, 5)
    with harness.interleaving(1):
        mine = gradients(compiled, x)
    with harness.interleaving(2):
        eager = gradients(module, x)
    for a, b in zip(mine, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_refused_launch_is_an_error_by_name_and_with_auto_the_equations(
    where, compiled, monkeypatch
):
    """A device that other programs share may refuse a grid which it held before."""

    def refuse(*arguments, **options):
        raise LaunchRefused("cpu refused a cooperative launch")

    monkeypatch.setattr(kernel_errors, "_refused", {})
    monkeypatch.setattr(
        importlib.import_module(f"triton_gru.kernels.{where}"), f"scan_{where}", refuse
    )
    x = torch.randn(4, 2, 5)
    with pytest.raises(LaunchRefused):
        gradients(layer(bidirectional=True), x)
    module = layer(bidirectional=True)
    module.backend = "auto"
    assert "Backend 'triton' will run" in module.explain(x)
    torch._dynamo.reset()
    called = torch.compile(module, backend="aot_eager") if compiled else module
    with pytest.warns(RuntimeWarning, match="no Triton kernel from here on: cpu refused a coop"):
        found = gradients(called, x)
    exact = gradients(triton_gru.GRU.from_torch(module, backend="reference"), x)
    for mine, true in zip(found, exact, strict=True):
        assert_close(mine, true)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for mine, true in zip(gradients(called, x), exact, strict=True):
            assert_close(mine, true)
    text = module.explain(x)
    assert "Backend 'torch' will run" in text and "refused a cooperative launch" in text
