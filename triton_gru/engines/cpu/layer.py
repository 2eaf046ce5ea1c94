"""One layer on the CPU engine as one autograd node, over padded rows or a PackedSequence's."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor

from triton_gru import equations
from triton_gru.engines import varlen
from triton_gru.engines.autograd import Recurrence, in_plain_torch, last_states
from triton_gru.engines.cpu import engine
from triton_gru.engines.cpu.engine import Layout
from triton_gru.equations import LayerWeights, ScanOptions, stack
from triton_gru.torch_modes import records


def layer(x: Tensor, h0: Tensor, params: Sequence[Tensor], layout: Layout) -> tuple[Tensor, Tensor]:
    """States y and the last ones [D, B, H] of a layer, all directions; see `engine.forward`."""
    if records(x, h0, *params):
        return _Layer.apply(x, h0, *layout, *params)
    x, h0, *params = _contiguous(x, h0, *params)
    y, last, _ = engine.forward(x, h0, params, layout, save_gates=False)
    return y, last


_FIELDS = len(Layout._fields)


class _Layer(torch.autograd.Function):
    """Saves x, y and the gates (four times y), as torch's own GRU does on a CPU."""

    @staticmethod
    def forward(ctx, x, h0, *rest):
        layout, given = Layout(*rest[:_FIELDS]), rest[_FIELDS:]
        whole, first, *params = _contiguous(x, h0, *given)
        y, last, gates = engine.forward(whole, first, params, layout, save_gates=True)
        # Saved by autograd, which finds a change in place.
        rows = (layout.batch_sizes, layout.lengths, layout.resets)
        ctx.save_for_backward(y, gates, *rows, x, h0, *given)
        ctx.layout = layout._replace(batch_sizes=None, lengths=None, resets=None)
        ctx.set_materialize_grads(False)
        return y, last

    @staticmethod
    def backward(ctx, dy, dlast):
        y, gates, batch_sizes, lengths, resets, *inputs = ctx.saved_tensors
        none = [None] * _FIELDS
        if dy is None and dlast is None:
            return None, None, *none, *[None] * (len(inputs) - 2)
        layout = ctx.layout._replace(batch_sizes=batch_sizes, lengths=lengths, resets=resets)
        # create_graph=True, or the further dimension of is_grads_batched or vmap, which C does not
        # support: plain torch does both.
        if torch.is_grad_enabled() or any(map(_batched, (dy, dlast))):
            dx, dh0, *dparams = _in_plain_torch(dy, dlast, inputs, layout)
            return dx, dh0, *none, *dparams
        x, h0, *params = _contiguous(*inputs)
        dx, dh0, dparams = engine.backward(
            *(None if dy is None else _contiguous(dy)[0], dlast, y, gates, x, h0, params, layout),
            input_needed=ctx.needs_input_grad[0],
            params_needed=any(ctx.needs_input_grad[2 + _FIELDS :]),
        )
        return dx, dh0, *none, *dparams


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    """As C reads them; the negative of a tensor may be its memory with a mark."""
    return [
        t if t.is_contiguous() and not t.is_neg() else t.resolve_neg().contiguous() for t in tensors
    ]


def _batched(t: Tensor | None) -> bool:
    return t is not None and (is_legacy_batchedtensor(t) or is_functorch_wrapped_tensor(t))


def _in_plain_torch(dy, dlast, inputs, layout):
    """The derivatives of `layer` by the equations over padded rows, which can be differentiated."""
    x, h0, *params = inputs
    kinds = len(params) // len(h0)
    reset_after, batch_sizes, lengths, resets, rows_first = layout
    if batch_sizes is not None:
        lengths, indices = varlen.indices(batch_sizes, h0.shape[1], len(x), x.device)

    def to_padded(t):
        if batch_sizes is not None:
            return varlen.pad(t, indices, len(batch_sizes), h0.shape[1])
        return t.transpose(0, 1) if rows_first else t

    def from_padded(t):
        if batch_sizes is not None:
            return varlen.pack(t, indices)
        return t.transpose(0, 1) if rows_first else t

    with torch.enable_grad():
        weights = [*(stack(params[kind::kinds]) for kind in range(kinds)), *[None] * (4 - kinds)]
        resets = None if resets is None else to_padded(resets)
        options = ScanOptions(reset_after, lengths, resets)
        rows, past_end, first = to_padded(x), None, h0
        if lengths is not None:
            past_end = equations.past_end(lengths, len(rows)).unsqueeze(-1)
            # Otherwise the weights' gradients would contain 0 * inf = NaN.
            empty = (lengths == 0).unsqueeze(-1)
            rows, first = rows.masked_fill(past_end, 0), h0.masked_fill(empty, 0)
        if any(t is not None and is_functorch_wrapped_tensor(t) for t in (dy, dlast)):
            y, last = in_plain_torch(rows, first, LayerWeights(*weights), options)
        else:  # which vmap cannot take
            y, _ = Recurrence.apply(rows, first, *weights, *options, "reference", False)
            last = last_states(y, first)
        last = last if past_end is None else torch.where(empty, h0, last)
        y = y if past_end is None else y.masked_fill(past_end, 0)
        given = [pair for pair in ((from_padded(y), dy), (last, dlast)) if pair[1] is not None]
        needed = [t for t in inputs if t.requires_grad]
        outputs, cotangents = zip(*given, strict=True)
        found = iter(torch.autograd.grad(outputs, needed, cotangents, create_graph=True))
    return [next(found) if t.requires_grad else None for t in inputs]
