"""The Triton scans as torch operators: opaque to Dynamo and export, one node each in their graphs.

`scan_forward` and `scan_backward` here have the signature that `triton_gru.equations` states, and
so make this module the engine of backend "triton". The operators, `torch.ops.triton_gru.*`, are
registered without triton: what launches kernels is imported when one runs. They record nothing for
autograd; `recurrence` calls them from its autograd.Function.
"""

import torch
from torch import Tensor

from triton_gru.plan import padded_size


def scan_forward(
    gates_x: Tensor,
    h0: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    *,
    reset_after: bool,
    lengths: Tensor | None = None,
) -> Tensor:
    """As `equations.scan_forward`."""
    return _scan_forward(gates_x, h0, weight_hh, bias_hh, lengths, reset_after)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As `equations.scan_backward`."""
    arguments = (dy, y, gates_x, h0, weight_hh, bias_hh, lengths, reset_after)
    *results, dbias_hh = _scan_backward(*arguments)
    return (*results, None if bias_hh is None else dbias_hh)


@torch.library.custom_op("triton_gru::scan_forward", mutates_args=())
def _scan_forward(
    gates_x: Tensor,
    h0: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    lengths: Tensor | None,
    reset_after: bool,
) -> Tensor:
    from triton_gru.kernels import engine

    return engine.scan_forward(
        gates_x, h0, weight_hh, bias_hh, reset_after=reset_after, lengths=lengths
    )


@_scan_forward.register_fake
def _(gates_x, h0, weight_hh, bias_hh, lengths, reset_after):
    T, B, D, _ = gates_x.shape
    H = h0.shape[-1]
    # y is a view of the exchange buffer: padded rows, a slot before and one after (scan_forward).
    return gates_x.new_empty(T + 2, B, D, padded_size(H))[1 : T + 1, ..., :H]


# An operator's results are all tensors: without a bias the last one is empty.
@torch.library.custom_op("triton_gru::scan_backward", mutates_args=())
def _scan_backward(
    dy: Tensor,
    y: Tensor,
    gates_x: Tensor,
    h0: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    lengths: Tensor | None,
    reset_after: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from triton_gru.kernels import engine

    d_gates_x, dh0, dweight_hh, dbias_hh = engine.scan_backward(
        dy, y, gates_x, h0, weight_hh, bias_hh, reset_after=reset_after, lengths=lengths
    )
    if dbias_hh is None:
        dbias_hh = gates_x.new_empty(0)
    return d_gates_x.contiguous(), dh0, dweight_hh, dbias_hh


@_scan_backward.register_fake
def _(dy, y, gates_x, h0, weight_hh, bias_hh, lengths, reset_after):
    def whole(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)

    dbias_hh = gates_x.new_empty(0) if bias_hh is None else whole(bias_hh)
    return whole(gates_x), whole(h0), whole(weight_hh), dbias_hh
