"""The scans of a layer as torch operators: opaque to Dynamo and export, one node in their graphs.

`torch.ops.triton_gru.scan_forward` and `scan_backward` take the name of the engine that computes
them: "triton" launches the kernels, "reference" runs `triton_gru.equations`, which documents shapes
and results; "auto" launches the kernels, and runs the equations if the device refuses a launch. As
an operator the equations are one node for every number of steps; traced directly they are unrolled,
and a graph holds as many steps as the example has. `step` is one step of the kernels.

The operators are registered without triton: the modules that launch kernels are imported at a run.
"""

from typing import Any

import torch
from torch import Tensor

from triton_gru import equations
from triton_gru.kernel_errors import LaunchRefused, give_up, launch_refusal
from triton_gru.plan.plan import padded_size

# An operator's results are tensors, none of them an argument or another result. A result that does
# not exist (saved gates, the derivative of a bias) is an empty tensor.


@torch.library.custom_op("triton_gru::scan_forward", mutates_args=())
def scan_forward(
    gates_x: Tensor,
    h0: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    reset_after: bool,
    lengths: Tensor | None,
    resets: Tensor | None,
    engine: str,
    save_gates: bool,
) -> tuple[Tensor, Tensor]:
    """All states [T, B, D, H], and with save_gates the hidden part of the gates [T, B, D, 3H]."""
    scan = (gates_x, h0, weight_hh, bias_hh)
    options: dict[str, Any] = {"reset_after": reset_after, "lengths": lengths, "resets": resets}
    if engine == "reference":
        return equations.scan_forward(*scan, **options).contiguous(), gates_x.new_empty(0)
    if gates_x.shape[1] == 0:  # a launch without programs is an error
        return _empty_results(gates_x, h0, engine, save_gates)
    from triton_gru.kernels import forward

    try:
        found: Any = forward.scan_forward(*scan, **options, save_gates=save_gates)
    except LaunchRefused as error:
        if engine != "auto":
            raise
        give_up(gates_x.device, error)
        y, gates_h = _empty_results(gates_x, h0, engine, save_gates)
        # The gates are not read: from here on the backward takes the equations too.
        return y.copy_(equations.scan_forward(*scan, **options)).data, gates_h.zero_()
    y, gates_h = found if save_gates else (found, gates_x.new_empty(0))
    # Autograd sees a tensor, not a view, at its place within the exchange buffer: it forbids an
    # in-place change of a view that a Function returns.
    return y.data, gates_h


@scan_forward.register_fake
def _(gates_x, h0, weight_hh, bias_hh, reset_after, lengths, resets, engine, save_gates):
    return _empty_results(gates_x, h0, engine, save_gates)


def _empty_results(
    gates_x: Tensor, h0: Tensor, engine: str, save_gates: bool
) -> tuple[Tensor, Tensor]:
    T, B, D, _ = gates_x.shape
    H = h0.shape[-1]
    if engine == "reference":
        return gates_x.new_empty(T, B, D, H), gates_x.new_empty(0)
    # y is a view of the exchange buffer: padded rows, one more slot per direction (forward.py).
    y = gates_x.new_empty(T + D, B, D, padded_size(H))[1 : T + 1, ..., :H]
    return y, _whole(gates_x) if save_gates else gates_x.new_empty(0)


@torch.library.custom_op("triton_gru::scan_backward", mutates_args=())
def scan_backward(
    dy: Tensor,
    y: Tensor,
    gates_x: Tensor,
    h0: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    reset_after: bool,
    lengths: Tensor | None,
    resets: Tensor | None,
    engine: str,
    gates_h: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The derivatives by gates_x, h0, weight_hh and bias_hh; gates_h is saved by the forward."""
    scan = (dy, y, gates_x, h0, weight_hh, bias_hh)
    options: dict[str, Any] = {"reset_after": reset_after, "lengths": lengths, "resets": resets}
    results: Any = None
    gave_up = engine == "auto" and launch_refusal(gates_x.device) is not None
    if engine != "reference" and gates_x.shape[1] > 0 and not gave_up:
        from triton_gru.kernels import backward

        try:
            results = backward.scan_backward(*scan, **options, gates_h=gates_h)
        except LaunchRefused as error:
            if engine != "auto":
                raise
            give_up(gates_x.device, error)
    if results is None:
        results = equations.scan_backward(*scan, **options)
    dgates_x, dh0, dweight_hh, dbias_hh = (
        gates_x.new_empty(0) if result is None else result.contiguous() for result in results
    )
    return dgates_x, dh0, dweight_hh, dbias_hh


@scan_backward.register_fake
def _(dy, y, gates_x, h0, weight_hh, bias_hh, reset_after, lengths, resets, engine, gates_h):
    dbias_hh = gates_x.new_empty(0) if bias_hh is None else _whole(bias_hh)
    return _whole(gates_x), _whole(h0), _whole(weight_hh), dbias_hh


def _whole(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


# For torch.jit.trace, whose graph holds no autograd.Function.
def _save(ctx, inputs, output):
    *scan, ctx.reset_after, lengths, resets, ctx.engine, save_gates = inputs
    y, gates_h = output
    ctx.mark_non_differentiable(gates_h)
    ctx.save_for_backward(*scan, lengths, resets, y, gates_h if save_gates else None)


def _derive(ctx, dy, _):
    *scan, lengths, resets, y, gates_h = ctx.saved_tensors
    options = (ctx.reset_after, lengths, resets)
    *grads, dbias_hh = scan_backward(dy, y, *scan, *options, ctx.engine, gates_h)
    return *grads, None if scan[3] is None else dbias_hh, *[None] * 5


scan_forward.register_autograd(_derive, setup_context=_save)


@torch.library.custom_op("triton_gru::step", mutates_args=())
def step(
    gates_x: Tensor, h: Tensor, weight_hh: Tensor, bias_hh: Tensor | None, reset_after: bool
) -> Tensor:
    """The state [B, H] after one step, from gates_x [B, 3H], h [B, H], weight_hh [3H, H]."""
    if h.shape[0] == 0:
        return torch.empty_like(h)
    from triton_gru.kernels import step as kernel

    return kernel.step(gates_x, h, weight_hh, bias_hh, reset_after=reset_after)


@step.register_fake
def _(gates_x, h, weight_hh, bias_hh, reset_after):
    return gates_x.new_empty(h.shape)
