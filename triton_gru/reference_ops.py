"""The equations as torch operators, for torch.compile, torch.export and torch.jit.trace.

Traced as they stand, the equations are unrolled: a graph holds as many steps as the example has and
is made anew for another T. As an operator a scan is one node for every T. The operators,
`torch.ops.triton_gru.reference_scan_*`, are opaque; eager code calls `equations` itself. The
forward one has a derivative of its own for torch.jit.trace, whose graph holds no autograd.Function.
"""

import torch
from torch import Tensor

from triton_gru import equations


def scan_forward(
    gates_x: Tensor,
    h0: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    *,
    reset_after: bool,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
) -> Tensor:
    """As `equations.scan_forward`."""
    return _scan_forward(gates_x, h0, weight_hh, bias_hh, lengths, resets, reset_after)


def scan_backward(
    dy: Tensor,
    y: Tensor,
    gates_x: Tensor,
    h0: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    *,
    reset_after: bool,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As `equations.scan_backward`."""
    tensors = (dy, y, gates_x, h0, weight_hh, bias_hh, lengths, resets)
    *results, dbias_hh = _scan_backward(*tensors, reset_after)
    return (*results, None if bias_hh is None else dbias_hh)


@torch.library.custom_op("triton_gru::reference_scan_forward", mutates_args=())
def _scan_forward(
    gates_x: Tensor,
    h0: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    reset_after: bool,
) -> Tensor:
    options = {"reset_after": reset_after, "lengths": lengths, "resets": resets}
    return equations.scan_forward(gates_x, h0, weight_hh, bias_hh, **options).contiguous()


@_scan_forward.register_fake
def _(gates_x, h0, weight_hh, bias_hh, lengths, resets, reset_after):
    T, B, D, _ = gates_x.shape
    return gates_x.new_empty(T, B, D, h0.shape[-1])


# An operator's results are all tensors, and none is another: without a bias the last one is empty.
@torch.library.custom_op("triton_gru::reference_scan_backward", mutates_args=())
def _scan_backward(
    dy: Tensor,
    y: Tensor,
    gates_x: Tensor,
    h0: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    reset_after: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = {"reset_after": reset_after, "lengths": lengths, "resets": resets}
    *results, dbias_hh = equations.scan_backward(dy, y, gates_x, h0, weight_hh, bias_hh, **options)
    if dbias_hh is None:
        dbias_hh = gates_x.new_empty(0)
    return *(result.contiguous() for result in results), dbias_hh.contiguous()


@_scan_backward.register_fake
def _(dy, y, gates_x, h0, weight_hh, bias_hh, lengths, resets, reset_after):
    def whole(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)

    dbias_hh = gates_x.new_empty(0) if bias_hh is None else whole(bias_hh)
    return whole(gates_x), whole(h0), whole(weight_hh), dbias_hh


def _save(ctx, inputs, output):
    *tensors, ctx.reset_after = inputs
    ctx.save_for_backward(*tensors, output)


def _derive(ctx, dy):
    *scan, lengths, resets, y = ctx.saved_tensors
    options = {"reset_after": ctx.reset_after, "lengths": lengths, "resets": resets}
    return *scan_backward(dy, y, *scan, **options), None, None, None


_scan_forward.register_autograd(_derive, setup_context=_save)
