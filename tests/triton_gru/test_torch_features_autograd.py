"""Derivatives of every kind: higher ones, torch.func's, forward mode, checkpointing, hooks."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

from tests.tolerances import assert_close
from tests.triton_gru.counterparts import IN, B, H, T, pair, results
from triton_gru import GRU

pytestmark = pytest.mark.parametrize("reset_after", [True, False])


@pytest.fixture
def x():
    return torch.randn(T, B, IN)


def penalised(module, x):
    """The gradients of a loss that holds the square of a gradient, as a gradient penalty does."""
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(module(x)[0].sin().sum(), x, create_graph=True)
    leaves = [x, *module.parameters()]
    return [first, *torch.autograd.grad(first.square().sum(), leaves, materialize_grads=True)]


@pytest.mark.compat(
    "derivatives",
    "double backward (`create_graph=True`)",
    "works better",
    "with `triton` and `reference` on every device; cuDNN's GRU has none",
)
def test_double_backward(backend, reset_after, x):
    ours, theirs = pair(backend, reset_after)
    assert_close(penalised(ours, x), penalised(theirs, x))


@pytest.mark.compat(
    "derivatives",
    "backward in eval mode",
    "works better",
    "with `triton` and `reference`; cuDNN refuses",
)
def test_backward_in_eval_mode(backend, reset_after, x):
    ours, theirs = pair(backend, reset_after)
    assert_close(results(ours.eval(), x), results(theirs.eval(), x))


@pytest.mark.compat("derivatives", "torch.func.functional_call, grad", "works")
def test_functional_call_and_grad(backend, reset_after, x):
    ours, theirs = pair(backend, reset_after)
    parameters = {name: p.detach() + 0.1 for name, p in ours.named_parameters()}

    def loss(module, parameters):
        return functional_call(module, parameters, (x,))[0].sin().sum()

    assert_close(loss(ours, parameters), loss(theirs, parameters))
    actual = grad(lambda p: loss(ours, p))(parameters)
    assert_close([*actual.values()], [*grad(lambda p: loss(theirs, p))(parameters).values()])


@pytest.mark.compat(
    "derivatives", "torch.func.vmap over the batch", "works better", "nn.GRU has no batching rule"
)
def test_vmap_over_the_batch(backend, reset_after, x):
    ours, theirs = pair(backend, reset_after)
    y, h_n = vmap(lambda row: ours(row), in_dims=1, out_dims=1)(x)
    assert_close((y, h_n), theirs(x))


@pytest.mark.compat("derivatives", "per-sample gradients", "works better", "nn.GRU's are an error")
def test_per_sample_gradients(backend, reset_after, x):
    ours, theirs = pair(backend, reset_after)
    parameters = {name: p.detach() for name, p in ours.named_parameters()}

    def loss(module, parameters, row):
        return functional_call(module, parameters, (row,))[0].sin().sum()

    per_sample = vmap(grad(lambda p, row: loss(ours, p, row)), in_dims=(None, 1))(parameters, x)
    for b in range(B):
        expected = grad(lambda p: loss(theirs, p, x[:, b : b + 1]))(parameters)  # noqa: B023
        assert_close([g[b] for g in per_sample.values()], [*expected.values()])


@pytest.mark.compat("derivatives", "an ensemble under vmap", "works better", "nn.GRU's is an error")
def test_an_ensemble_under_vmap(backend, reset_after, x):
    models = [pair(backend, reset_after) for _ in range(3)]
    parameters, buffers = stack_module_state([ours for ours, _ in models])
    base = copy.deepcopy(models[0][0]).to("meta")
    y, _ = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(parameters, buffers)
    assert_close(y, torch.stack([theirs(x)[0] for _, theirs in models]))


@pytest.mark.compat("derivatives", "vmap with lengths", "works better", "nn.GRU has no lengths")
def test_vmap_with_lengths(backend, reset_after, x):
    ours, _ = pair(backend, reset_after)
    lengths = torch.tensor([4, 1, 3])
    run = vmap(lambda row, n: ours(row, lengths=n), in_dims=(1, 0), out_dims=1)
    assert_close(run(x, lengths), ours(x, lengths=lengths))


@pytest.mark.compat("derivatives", "forward mode (jvp, dual numbers)", "works")
def test_forward_mode(backend, reset_after, x):
    ours, theirs = pair(backend, reset_after)
    tangent = torch.randn_like(x)
    outcomes = [jvp(lambda x, m=m: m(x)[0], (x,), (tangent,)) for m in (ours, theirs)]
    assert_close(outcomes[0], outcomes[1])
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        got = forward_ad.unpack_dual(ours(dual)[0])
    assert_close((got.primal, got.tangent), outcomes[1])


@pytest.mark.compat("derivatives", "torch.func.jacrev, hessian", "works")
def test_jacobians_and_hessians(backend, reset_after):
    ours, theirs = pair(backend, reset_after)
    x = torch.randn(2, 1, IN)
    for transform in (jacrev, hessian):
        actual, expected = (
            transform(lambda x, m=m: m(x)[0].sin().sum((0, 1)))(x) for m in (ours, theirs)
        )
        assert_close(actual, expected)


@pytest.mark.compat("derivatives", "`is_grads_batched=True`", "works")
def test_batched_cotangents(backend, reset_after, x):
    outcomes = []
    for module in pair(backend, reset_after):
        leaf = x.clone().requires_grad_()
        y = module(leaf)[0][-1, 0]
        leaves = [leaf, *module.parameters()]
        outcomes.append(torch.autograd.grad(y, leaves, torch.eye(H), is_grads_batched=True))
    assert_close(outcomes[0], outcomes[1])


@pytest.mark.compat("derivatives", "torch.autograd.gradcheck, gradgradcheck", "works")
def test_gradcheck(backend, reset_after):
    if backend == "triton":
        pytest.skip("the kernels have no float64")
    ours, _ = pair(backend, reset_after)
    ours = ours.double()
    x = torch.randn(2, 2, IN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ours(x)[0], x)
    assert torch.autograd.gradgradcheck(lambda x: ours(x)[0], x)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.compat("derivatives", "activation checkpointing", "works", "either `use_reentrant`")
def test_activation_checkpointing(backend, reset_after, x, use_reentrant):
    class Recomputed(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, x, hx):
            def run(x):
                self.calls += 1
                return self.module(x, hx)

            return checkpoint(run, x, use_reentrant=use_reentrant)

    ours, theirs = pair(backend, reset_after)
    wrapped = Recomputed(ours)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    outcomes = []
    # Both backpropagate through .backward(), which use_reentrant asks for.
    for module, leaf in zip((wrapped, theirs), leaves, strict=True):
        y, h_n = module(leaf, None)
        (y.sin().sum() + h_n.cos().sum()).backward()
        outcomes.append([y, h_n, leaf.grad, *(p.grad for p in module.parameters())])
    assert wrapped.calls == 2
    assert_close(outcomes[0], outcomes[1])


@pytest.mark.compat("derivatives", "gradients accumulate, frozen parameters", "works")
def test_accumulated_gradients_and_frozen_parameters(backend, reset_after, x):
    ours, theirs = pair(backend, reset_after)
    for module in (ours, theirs):
        module.weight_hh_l0.requires_grad_(False)
        for half in x.split(2):
            module(half)[0].sin().sum().backward()
    assert ours.weight_hh_l0.grad is None
    names = ("weight_ih_l0", "bias_ih_l0", "bias_hh_l0")
    assert_close(*([getattr(m, name).grad for name in names] for m in (ours, theirs)))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.compat(
    "derivatives",
    "a change of the output in place",
    "differs",
    "as nn.GRU on a CPU with `torch` and `reference`; `triton` keeps its output, as cuDNN does: "
    "without gradients it is free, else an error at backward()",
)
def test_output_changed_in_place(backend, reset_after, x, bidirectional):
    ours = GRU(IN, H, backend=backend, reset_after=reset_after, bidirectional=bidirectional)
    expected = ours(x)[0].relu()
    with torch.no_grad():
        assert_close(ours(x)[0].relu_(), expected)
    y, h_n = ours(x)
    h_n.mul_(2)
    y.relu_()
    assert_close(y, expected)
    if not ours.explain(x).startswith("Backend 'triton'"):
        parameters = [*ours.parameters()]
        grads = torch.autograd.grad(y.sum(), parameters)
        assert_close(grads, torch.autograd.grad(ours(x)[0].relu().sum(), parameters))
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.compat("derivatives", "anomaly detection, inference mode, no_grad", "works")
def test_grad_modes(backend, reset_after, x):
    ours, theirs = pair(backend, reset_after)
    expected = theirs(x)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            actual = ours(x)
        assert_close(actual, expected)
        assert not actual[0].requires_grad
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly():
        assert_close(results(ours, x), results(theirs, x))


@pytest.mark.compat("derivatives", "torch.func.vmap over the batch", "works better")
@pytest.mark.compat("derivatives", "per-sample gradients", "works better")
@pytest.mark.compat("derivatives", "an ensemble under vmap", "works better")
def test_what_nn_gru_refuses_under_vmap(reset_after, x):
    """When this fails, torch has caught up and the rows should say so."""
    theirs = nn.GRU(IN, H)
    parameters = {name: p.detach() for name, p in theirs.named_parameters()}
    many = {name: torch.stack([p, p]) for name, p in parameters.items()}

    def loss(parameters, row):
        return functional_call(theirs, parameters, (row,))[0].sum()

    with pytest.raises(RuntimeError, match="Batching rule not implemented for aten::gru"):
        vmap(lambda row: theirs(row)[0], in_dims=1)(x)
    with pytest.raises(RuntimeError, match="Batching rule not implemented for aten::gru"):
        vmap(lambda p: functional_call(theirs, p, (x,))[0])(many)
    with pytest.raises(RuntimeError):
        vmap(grad(loss), in_dims=(None, 1))(parameters, x)
