"""One layer on the CPU engine as one autograd node, over packed or whole rows."""

from collections.abc import Sequence

import torch
from torch import Tensor

from triton_gru.engines import varlen
from triton_gru.engines.autograd import Recurrence, last_states
from triton_gru.engines.cpu import engine
from triton_gru.engines.varlen import PackedRows
from triton_gru.equations import ScanOptions, stack
from triton_gru.torch_modes import records


def layer(
    x: Tensor,
    h0: Tensor,
    params: Sequence[Tensor],
    *,
    rows: PackedRows | None,
    resets: Tensor | None,
    rows_first: bool = False,
    reset_after: bool,
) -> tuple[Tensor, Tensor]:
    """States y and the last ones [D, B, H] of a layer, all directions; see `engine.forward`."""
    layout = (rows, resets, rows_first, reset_after)
    if records(x, h0, *params):
        return _Layer.apply(x, h0, layout, *params)
    x, h0, *params = _contiguous(x, h0, *params)
    y, last, _ = _forward(x, h0, params, layout, save_gates=False)
    return y, last


def _forward(x, h0, params, layout, *, save_gates):
    rows, resets, rows_first, reset_after = layout
    return engine.forward(
        *(x, h0, params, rows, resets),
        rows_first=rows_first,
        reset_after=reset_after,
        save_gates=save_gates,
    )


class _Layer(torch.autograd.Function):
    """Saves x, y and the gates (four times y), as torch's own GRU does on a CPU."""

    @staticmethod
    def forward(ctx, x, h0, layout, *params):
        tensors = _contiguous(x, h0, *params)
        y, last, gates = _forward(*tensors[:2], tensors[2:], layout, save_gates=True)
        ctx.save_for_backward(y, gates, x, h0, *params)
        ctx.layout = layout
        ctx.set_materialize_grads(False)
        return y, last

    @staticmethod
    def backward(ctx, dy, dlast):
        y, gates, *inputs = ctx.saved_tensors
        if dy is None and dlast is None:
            return None, None, None, *[None] * (len(inputs) - 2)
        # create_graph=True, or the further dimension of is_grads_batched, which C does not support:
        # plain torch does both.
        given = dlast if dy is None else dy
        if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(given):
            dx, dh0, *dparams = _in_plain_torch(dy, dlast, inputs, ctx.layout)
            return dx, dh0, None, *dparams
        rows, resets, rows_first, reset_after = ctx.layout
        x, h0, *params = _contiguous(*inputs)
        dx, dh0, dparams = engine.backward(
            *(
                None if dy is None else dy.contiguous(),
                dlast,
                y,
                gates,
                x,
                h0,
                params,
                rows,
                resets,
            ),
            rows_first=rows_first,
            reset_after=reset_after,
            input_needed=ctx.needs_input_grad[0],
            params_needed=any(ctx.needs_input_grad[3:]),
        )
        return dx, dh0, None, *dparams


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    return [t if t.is_contiguous() else t.contiguous() for t in tensors]


def _in_plain_torch(dy, dlast, inputs, layout):
    """The derivatives of `layer` by the equations over padded rows, which can be differentiated."""
    x, h0, *params = inputs
    rows, resets, rows_first, reset_after = layout
    kinds = len(params) // len(h0)
    indices = None if rows is None else rows.indices()

    def to_padded(t):
        if rows is None:
            return t.transpose(0, 1) if rows_first else t
        return varlen.pad(t, indices, len(rows.offsets) - 1, rows.batch_size)

    def from_padded(t):
        if rows is None:
            return t.transpose(0, 1) if rows_first else t
        return varlen.pack(t, indices)

    with torch.enable_grad():
        weights = [*(stack(params[kind::kinds]) for kind in range(kinds)), *[None] * (4 - kinds)]
        options = ScanOptions(
            reset_after,
            None if rows is None else rows.lengths,
            None if resets is None else to_padded(resets),
        )
        y, _ = Recurrence.apply(to_padded(x), h0, *weights, *options, "reference", False)
        last = last_states(y, h0)
        given = [pair for pair in ((from_padded(y), dy), (last, dlast)) if pair[1] is not None]
        needed = [t for t in inputs if t.requires_grad]
        outputs, cotangents = zip(*given, strict=True)
        found = iter(torch.autograd.grad(outputs, needed, cotangents, create_graph=True))
    return [next(found) if t.requires_grad else None for t in inputs]
