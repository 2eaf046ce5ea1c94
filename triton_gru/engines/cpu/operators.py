"""A layer on the CPU engine as torch operators: one node in the graphs of compile, export, trace.

Eager calls do not go through them, as the dispatch of an operator takes longer than a short layer;
they take `layer.py`. A graph may be saved and run on a machine that cannot build the engine: there,
and on other devices, the operators compute the equations in plain torch.
"""

import torch
from torch import Tensor

from triton_gru import equations
from triton_gru.engines.autograd import in_plain_torch, project
from triton_gru.engines.cpu import engine, library
from triton_gru.equations import LayerWeights, ScanOptions
from triton_gru.torch_modes import records


def layer(
    x: Tensor, h0: Tensor, weights: LayerWeights, options: ScanOptions
) -> tuple[Tensor, Tensor]:
    """A layer in a graph; its arguments and results are those of `engines.autograd`."""
    # A trace is made once, for calls with and without gradients.
    save_gates = torch.jit.is_tracing() or records(x, h0, *weights)
    dtype = x.dtype
    if dtype == torch.bfloat16:  # computed in float32, as in eager calls
        x, h0 = x.float(), h0.float()
        weights = LayerWeights(*(None if t is None else t.float() for t in weights))  # type: ignore
    y, last, _ = layer_forward(x, h0, *weights, *options, save_gates)
    return y.to(dtype), last.to(dtype)


_Grads = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


# An operator's results are tensors: what does not exist is empty.
@torch.library.custom_op("triton_gru::cpu_layer_forward", mutates_args=())
def layer_forward(
    x: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    reset_after: bool,
    lengths: Tensor | None,
    resets: Tensor | None,
    save_gates: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """All states [T, B, D * H], zero past the ends of rows; the last ones [D, B, H]; the gates."""
    weights = LayerWeights(weight_ih, weight_hh, bias_ih, bias_hh)
    if not _runs_on(x):
        y, last = in_plain_torch(x, h0, weights, ScanOptions(reset_after, lengths, resets))
        # Of the gates' shape, as in the graph; memory that is not written to is not taken.
        return y.clone(), last.clone(), _gates(x, h0, reset_after, save_gates)
    y, last, gates = engine.forward(
        x.contiguous(),
        h0.contiguous(),
        _by_direction(weights),
        _layout(reset_after, lengths, resets),
        save_gates=save_gates,
    )
    if gates is None:
        gates = _gates(x, h0, reset_after, False)
    elif lengths is not None:  # an operator's results are defined in all elements
        past_end = equations.past_end(lengths, x.shape[0]).flatten()
        gates.masked_fill_(past_end.view(1, -1, 1, 1), 0)
    return y, last, gates


@layer_forward.register_fake
def _(x, h0, weight_ih, weight_hh, bias_ih, bias_hh, reset_after, lengths, resets, save_gates):
    y = x.new_empty(*x.shape[:2], h0.shape[0] * h0.shape[2])
    return y, h0.new_empty(h0.shape), _gates(x, h0, reset_after, save_gates)


@torch.library.custom_op("triton_gru::cpu_layer_backward", mutates_args=())
def layer_backward(
    dy: Tensor,
    dlast: Tensor,
    y: Tensor,
    gates: Tensor,
    x: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    reset_after: bool,
    lengths: Tensor | None,
    resets: Tensor | None,
) -> _Grads:
    """The derivatives by x, h0 and the weights."""
    weights = LayerWeights(weight_ih, weight_hh, bias_ih, bias_hh)
    if not _runs_on(x):
        return _backward_of_equations(
            dy, dlast, x, h0, weights, ScanOptions(reset_after, lengths, resets)
        )
    params = _by_direction(weights)
    dx, dh0, dparams = engine.backward(
        dy.contiguous(),
        dlast,
        y.contiguous(),
        gates.contiguous(),
        x.contiguous(),
        h0.contiguous(),
        params,
        _layout(reset_after, lengths, resets),
    )
    assert dx is not None
    kinds = len(params) // len(h0)
    grads = [torch.stack(dparams[kind::kinds]) for kind in range(kinds)]  # type: ignore[arg-type]
    grads += [x.new_empty(0) for _ in range(4 - kinds)]
    return dx, dh0, *grads  # type: ignore[return-value]


@layer_backward.register_fake
def _(dy, dlast, y, gates, x, h0, weight_ih, weight_hh, bias_ih, bias_hh, *_):
    inputs = (x, h0, weight_ih, weight_hh, bias_ih, bias_hh)
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs)


def _save(ctx, inputs, output):
    *tensors, ctx.reset_after, lengths, resets, _ = inputs
    y, _, gates = output
    ctx.mark_non_differentiable(gates)
    ctx.save_for_backward(*tensors, lengths, resets, y, gates)


def _derive(ctx, dy, dlast, _):
    *inputs, lengths, resets, y, gates = ctx.saved_tensors
    grads = layer_backward(dy, dlast, y, gates, *inputs, ctx.reset_after, lengths, resets)
    found = [None if t is None else grad for t, grad in zip(inputs, grads, strict=True)]
    return *found, None, None, None, None


layer_forward.register_autograd(_derive, setup_context=_save)


def _layout(reset_after: bool, lengths: Tensor | None, resets: Tensor | None) -> engine.Layout:
    lengths = None if lengths is None else lengths.contiguous()
    resets = None if resets is None else resets.contiguous()
    return engine.Layout(reset_after, None, lengths, resets)


def _runs_on(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and library.obstacle() is None


def _gates(x: Tensor, h0: Tensor, reset_after: bool, save: bool) -> Tensor:
    D, B, H = h0.shape
    return x.new_empty(D, x.shape[0] * B if save else 0, 4 if reset_after else 3, H)


def _by_direction(weights: LayerWeights) -> list[Tensor]:
    directions = range(len(weights.weight_hh))
    return [t[d].contiguous() for d in directions for t in weights if t is not None]


def _backward_of_equations(
    dy: Tensor, dlast: Tensor, x: Tensor, h0: Tensor, weights: LayerWeights, options: ScanOptions
) -> _Grads:
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    scan = (project(x, weight_ih, bias_ih), h0, weight_hh, bias_hh)
    y = equations.scan_forward(*scan, **options._asdict())
    dy = dy.reshape(y.shape).clone()
    for d, step in enumerate((-1, 0)[: len(h0)]):  # see `last_states`
        dy[step, :, d] += dlast[d]
    d_gates, dh0, dweight_hh, dbias_hh = equations.scan_backward(dy, y, *scan, **options._asdict())
    rows = d_gates.flatten(0, 1)  # [T * B, D, 3H]
    dx = (rows.flatten(1) @ weight_ih.flatten(0, 1)).view_as(x)
    dweight_ih = torch.einsum("ndg,ni->dgi", rows, x.flatten(0, 1))
    grads = (dx, dh0, dweight_ih, dweight_hh, None if bias_ih is None else rows.sum(0), dbias_hh)
    return tuple(x.new_empty(0) if g is None else g.contiguous() for g in grads)  # type: ignore[return-value]
