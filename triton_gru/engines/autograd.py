"""One layer of the recurrence as one autograd node: the engines "triton" and "reference".

An engine of a layer is a function of x [T, B, I], h0 [D, B, H], its `LayerWeights` and its
`ScanOptions`. It returns every state [T, B, D * H], where a row past its end keeps its state, and
the last state of each direction [D, B, H]. Most calls use `Recurrence`, with `last_states` of its
result; `functional.gru` decides when to use `in_plain_torch` or `step` instead.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_gru import equations
from triton_gru.engines import operators
from triton_gru.equations import LayerWeights, ScanOptions
from triton_gru.torch_modes import for_any_steps, transformed, without_autocast


class Recurrence(torch.autograd.Function):
    """Projection and scan of a layer; saves x and y, and the gates if requested.

    The projection is inside so that gates_x, three times as large as y, need not be saved: the
    backward recomputes it. On two CPU cores at T64 B32 I256 H256 this adds 10 % to forward and
    backward together.

    `Recurrence.apply(x, h0, *weights, *options, engine, save_gates)` returns y [T, B, D * H] and,
    for the backward alone, the gates that were saved.
    """

    @staticmethod
    def forward(  # noqa: D102
        x,
        h0,
        weight_ih,
        weight_hh,
        bias_ih,
        bias_hh,
        reset_after,
        lengths,
        resets,
        engine,
        save_gates,
    ):
        options = ScanOptions(reset_after, lengths, resets)
        with without_autocast(x.device):
            scan = (project(x, weight_ih, bias_ih), h0, weight_hh, bias_hh)
            if engine == "reference" and not for_any_steps(x.shape[0]):
                y, gates_h = equations.scan_forward(*scan, **options._asdict()), None
            else:
                y, gates_h = operators.scan_forward(*scan, *options, engine, save_gates)
        # As the layer returns it: users detach and change it in place. Autograd forbids that for a
        # view, and detects a change of a saved tensor only if it is this very tensor.
        return y.flatten(2).detach(), gates_h if save_gates and engine != "reference" else None

    @staticmethod
    def setup_context(ctx, inputs, output):  # noqa: D102
        *tensors, ctx.reset_after, lengths, resets, ctx.engine, _ = inputs
        y, gates_h = output
        if gates_h is not None:
            ctx.mark_non_differentiable(gates_h)
        ctx.save_for_backward(*tensors, lengths, resets, y, gates_h)

    @staticmethod
    def backward(ctx, dy, _):  # noqa: D102
        *inputs, lengths, resets, y, gates_h = ctx.saved_tensors
        x, h0, weight_ih, weight_hh, bias_ih, bias_hh = inputs
        options = ScanOptions(ctx.reset_after, lengths, resets)
        # create_graph=True, or the batch dimension of vmap or is_grads_batched: only plain torch
        # supports a second derivative and that dimension.
        plain = torch.is_grad_enabled() or transformed(dy)
        # reshape, here and in `equations`, because is_grads_batched does not support flatten.
        by_direction = (*x.shape[:2], *weight_hh.shape[::2])
        states = (dy.reshape(by_direction), y.reshape(by_direction))
        with without_autocast(x.device):
            scan = (*states, project(x, weight_ih, bias_ih), h0, weight_hh, bias_hh)
            if plain or (ctx.engine == "reference" and not for_any_steps(x.shape[0])):
                d_gates_x, dh0, dweight_hh, dbias_hh = equations.scan_backward(
                    *scan, **options._asdict()
                )
            else:
                d_gates_x, dh0, dweight_hh, dbias_hh = operators.scan_backward(
                    *scan, *options, ctx.engine, gates_h
                )
            dx = dweight_ih = dbias_ih = None
            T, B, D, G = d_gates_x.shape
            d_gates = d_gates_x.reshape(T, B, D * G)
            if ctx.needs_input_grad[0]:
                dx = d_gates @ weight_ih.flatten(0, 1)
            if ctx.needs_input_grad[2]:
                d_rows = d_gates.reshape(T * B, D * G)
                dweight_ih = (d_rows.t() @ x.flatten(0, 1)).reshape(weight_ih.shape)
            if bias_ih is None:
                dbias_hh = None
            else:
                dbias_ih = d_gates_x.sum((0, 1))
        return dx, dh0, dweight_ih, dweight_hh, dbias_ih, dbias_hh, *[None] * 5


def last_states(y: Tensor, h0: Tensor) -> Tensor:
    """The last state of each direction [D, B, H], of y [T, B, D * H].

    A row past its end keeps its state, so the last state is at the same step in every row.
    """
    D, _, H = h0.shape
    return torch.stack([y[0 if d else -1, :, d * H : (d + 1) * H] for d in range(D)])


def in_plain_torch(
    x: Tensor, h0: Tensor, weights: LayerWeights, options: ScanOptions
) -> tuple[Tensor, Tensor]:
    """A layer without `Recurrence`, for the transforms of torch.func and for torch.jit.trace.

    Its graph holds the scan as one operator; a Function would be a call of Python, which cannot be
    saved.
    """
    with without_autocast(x.device):
        gates_x = project(x, weights.weight_ih, weights.bias_ih)
        scan = (gates_x, h0, weights.weight_hh, weights.bias_hh)
        if transformed():
            y = equations.scan_forward(*scan, **options._asdict())
        else:
            y, _ = operators.scan_forward(*scan, *options, "reference", False)
    y = y.flatten(2)
    return y, last_states(y, h0)


def step(
    x: Tensor, h0: Tensor, weights: LayerWeights, options: ScanOptions
) -> tuple[Tensor, Tensor]:
    """A single step by the kernels, without gradients, for decoding: x [1, B, I]."""
    with without_autocast(x.device):
        gates_x = project(x, weights.weight_ih, weights.bias_ih)[0]
        bias_hh = [None] * len(h0) if weights.bias_hh is None else weights.bias_hh
        h = equations.stack(
            [
                operators.step(gates_x[:, d], h0[d], weight, bias, options.reset_after)
                for d, (weight, bias) in enumerate(zip(weights.weight_hh, bias_hh, strict=True))
            ]
        )
    return h.transpose(0, 1).flatten(1).unsqueeze(0).detach(), h


def project(x: Tensor, weight_ih: Tensor, bias_ih: Tensor | None) -> Tensor:
    """gates_x [T, B, D, 3H], both directions in one product."""
    bias = None if bias_ih is None else bias_ih.flatten()
    return F.linear(x, weight_ih.flatten(0, 1), bias).unflatten(-1, weight_ih.shape[:2])
