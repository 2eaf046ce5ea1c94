"""One layer on the CPU engine as one autograd node, over packed rows."""

import torch
from torch import Tensor

from triton_gru import sequences
from triton_gru.cpu import engine
from triton_gru.recurrence import records, recurrence
from triton_gru.sequences import PackedRows


def layer(
    x: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    *,
    rows: PackedRows,
    resets: Tensor | None,
    reset_after: bool,
) -> tuple[Tensor, Tensor]:
    """`recurrence` over packed rows: x [N, I] and resets [N, D] give y [N, D * H] and [D, B, H].

    Rows that all have T steps may come as [T, B, I], which gives y [T, B, D * H].
    """
    tensors = (x, h0, weight_ih, weight_hh, bias_ih, bias_hh)
    if records(*tensors):
        return _Layer.apply(*tensors, rows, resets, reset_after)
    y, _ = engine.forward(*tensors, rows, resets, reset_after=reset_after, save_gates=False)
    return y, _last(y, h0, rows)


class _Layer(torch.autograd.Function):
    """Keeps x, y and the gates, four times y, as torch's own GRU does on a CPU."""

    @staticmethod
    def forward(ctx, x, h0, weight_ih, weight_hh, bias_ih, bias_hh, rows, resets, reset_after):
        tensors = (x, h0, weight_ih, weight_hh, bias_ih, bias_hh)
        y, gates = engine.forward(*tensors, rows, resets, reset_after=reset_after, save_gates=True)
        ctx.save_for_backward(*tensors, resets, y, gates)
        ctx.rows, ctx.reset_after = rows, reset_after
        return y, _last(y, h0, rows)

    @staticmethod
    def backward(ctx, dy, dlast):
        *tensors, resets, y, gates = ctx.saved_tensors
        # With grad mode on, this derivative is to be differentiated; nor does C know the further
        # dimension of is_grads_batched. Plain torch does both.
        if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(dy):
            needed = [t for t in tensors if t is not None and t.requires_grad]
            with torch.enable_grad():
                outputs = _in_plain_torch(*tensors, ctx.rows, resets, ctx.reset_after)
                found = iter(torch.autograd.grad(outputs, needed, (dy, dlast), create_graph=True))
            grads = [next(found) if t is not None and t.requires_grad else None for t in tensors]
            return *grads, None, None, None
        *grads, dbias_ih, dbias_hh = engine.backward(
            *(dy, dlast, y, gates, *tensors[:4], ctx.rows, resets),
            reset_after=ctx.reset_after,
            input_needed=ctx.needs_input_grad[0],
        )
        biases = (None, None) if tensors[4] is None else (dbias_ih, dbias_hh)
        return *grads, *biases, None, None, None


def _last(y: Tensor, h0: Tensor, rows: PackedRows) -> Tensor:
    """The state of each row after its last step, and of the second direction after its first."""
    B, (D, _, H) = rows.batch_size, h0.shape
    y = y.flatten(0, -2).unflatten(-1, (D, H))
    if rows.lengths is None:
        return torch.stack([y[-B:, 0], y[:B, -1]][:D])
    # Of a row without steps the place is wrong, and not looked at.
    row = torch.arange(B)
    end = rows.offsets.index_select(0, (rows.lengths - 1).clamp(min=0)) + row
    places = [place.clamp(max=len(y) - 1) for place in (end, row)[:D]]
    last = torch.stack([y[:, d].index_select(0, place) for d, place in enumerate(places)])
    return torch.where((rows.lengths > 0).unsqueeze(-1), last, h0)


def _in_plain_torch(x, h0, weight_ih, weight_hh, bias_ih, bias_hh, rows, resets, reset_after):
    """What `layer` computes, by the equations over padded rows."""
    B, T, places = rows.batch_size, len(rows.offsets) - 1, rows.places()
    y, last = recurrence(
        sequences.pad(x.flatten(0, -2), places, T, B),
        *(h0, weight_ih, weight_hh, bias_ih, bias_hh),
        reset_after=reset_after,
        backend="reference",
        lengths=rows.lengths,
        resets=None if resets is None else sequences.pad(resets, places, T, B),
    )
    return sequences.pack(y.flatten(2), places).reshape(*x.shape[:-1], -1), last
