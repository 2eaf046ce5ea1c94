"""The Triton scans as torch operators: opaque to Dynamo and export, one node each in their graphs.

`scan_forward` and `scan_backward` here have the signature that `triton_gru.equations` states, with
the saving of gates besides, and so make this module the engine of backend "triton"; `step` is one
step of it. The operators, `torch.ops.triton_gru.*`, are
registered without triton: what launches kernels is imported when one runs. They record nothing for
autograd; `recurrence` calls them from its autograd.Function.
"""

import torch
from torch import Tensor

from triton_gru import equations
from triton_gru.plan import padded_size


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


def scan_forward_saving_gates(
    gates_x: Tensor,
    h0: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    *,
    reset_after: bool,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `scan_forward`, and the hidden part of the gates [T, B, D, 3H] for `scan_backward`."""
    return _scan_forward_saving_gates(gates_x, h0, weight_hh, bias_hh, lengths, resets, reset_after)


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
    gates_h: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As `equations.scan_backward`; takes the gates from gates_h if they were saved."""
    arguments = (dy, y, gates_x, h0, weight_hh, bias_hh, lengths, resets, gates_h, reset_after)
    *results, dbias_hh = _scan_backward(*arguments)
    return (*results, None if bias_hh is None else dbias_hh)


@torch.library.custom_op("triton_gru::scan_forward", mutates_args=())
def _scan_forward(
    gates_x: Tensor,
    h0: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    reset_after: bool,
) -> Tensor:
    if gates_x.shape[1] == 0:  # a launch without programs is an error
        return _empty_states(gates_x, h0)
    from triton_gru.kernels import launch_forward

    y = launch_forward.scan_forward(
        gates_x, h0, weight_hh, bias_hh, reset_after=reset_after, lengths=lengths, resets=resets
    )
    return _no_view(y)


@_scan_forward.register_fake
def _(gates_x, h0, weight_hh, bias_hh, lengths, resets, reset_after):
    return _empty_states(gates_x, h0)


def _empty_states(gates_x: Tensor, h0: Tensor) -> Tensor:
    T, B, D, _ = gates_x.shape
    H = h0.shape[-1]
    # y is a view of the exchange buffer: padded rows, a slot more a direction (scan_forward).
    return gates_x.new_empty(T + D, B, D, padded_size(H))[1 : T + 1, ..., :H]


def _no_view(y: Tensor) -> Tensor:
    """Y in its place within the exchange buffer, but to autograd a tensor of its own.

    Autograd refuses a change in place of a view that a Function returns.
    """
    return y.data


@torch.library.custom_op("triton_gru::scan_forward_saving_gates", mutates_args=())
def _scan_forward_saving_gates(
    gates_x: Tensor,
    h0: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    reset_after: bool,
) -> tuple[Tensor, Tensor]:
    if gates_x.shape[1] == 0:
        return _empty_states(gates_x, h0), torch.empty_like(gates_x)
    from triton_gru.kernels import launch_forward

    y, gates_h = launch_forward.scan_forward(
        *(gates_x, h0, weight_hh, bias_hh),
        reset_after=reset_after,
        lengths=lengths,
        resets=resets,
        save_gates=True,
    )
    return _no_view(y), gates_h


@_scan_forward_saving_gates.register_fake
def _(gates_x, h0, weight_hh, bias_hh, lengths, resets, reset_after):
    y = _empty_states(gates_x, h0)
    return y, torch.empty_like(gates_x, memory_format=torch.contiguous_format)


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
    resets: Tensor | None,
    gates_h: Tensor | None,
    reset_after: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scan = (dy, y, gates_x, h0, weight_hh, bias_hh)
    options = {"reset_after": reset_after, "lengths": lengths, "resets": resets}
    if gates_x.shape[1] == 0:
        results = equations.scan_backward(*scan, **options)
    else:
        from triton_gru.kernels import launch_backward

        results = launch_backward.scan_backward(*scan, **options, gates_h=gates_h)
    d_gates_x, dh0, dweight_hh, dbias_hh = results
    if dbias_hh is None:
        dbias_hh = gates_x.new_empty(0)
    return d_gates_x.contiguous(), dh0, dweight_hh, dbias_hh


@_scan_backward.register_fake
def _(dy, y, gates_x, h0, weight_hh, bias_hh, lengths, resets, gates_h, reset_after):
    def whole(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)

    dbias_hh = gates_x.new_empty(0) if bias_hh is None else whole(bias_hh)
    return whole(gates_x), whole(h0), whole(weight_hh), dbias_hh


@torch.library.custom_op("triton_gru::step", mutates_args=())
def step(
    gates_x: Tensor, h: Tensor, weight_hh: Tensor, bias_hh: Tensor | None, reset_after: bool
) -> Tensor:
    """The state [B, H] after one step, from gates_x [B, 3H], h [B, H], weight_hh [3H, H]."""
    if h.shape[0] == 0:
        return torch.empty_like(h)
    from triton_gru.kernels import launch_forward

    return launch_forward.step(gates_x, h, weight_hh, bias_hh, reset_after=reset_after)


@step.register_fake
def _(gates_x, h, weight_hh, bias_hh, reset_after):
    return gates_x.new_empty(h.shape)
