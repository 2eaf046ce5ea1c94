"""Forward, as backend "triton" computes it: `scan_forward` all steps of a layer, `step` one.

They take and return what `triton_gru.equations` states, with resets besides, and record nothing for
autograd.
"""

import torch
from torch import Tensor

from triton_gru.kernels import launches
from triton_gru.kernels import step as step_kernels
from triton_gru.kernels.scan_forward import scan_forward_kernel
from triton_gru.kernels.support import DTYPES, matrix_precision, plan_scan
from triton_gru.plan import POLLS, SENTINEL, Plan, padded_size, step_tiles


def scan_forward(
    gates_x: Tensor,
    h0: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    *,
    reset_after: bool,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reset_state: Tensor | None = None,
    save_gates: bool = False,
    plan: Plan | None = None,
    polls: int = POLLS,
) -> Tensor | tuple[Tensor, Tensor]:
    """All states of a layer.

    Args:
        gates_x: W_ih x + b_ih, [T, B, D, 3H]; its dtype is the one computed in.
        h0: [D, B, H].
        weight_hh: [D, 3H, H].
        bias_hh: [D, 3H] or None.
        reset_after: The variant.
        lengths: [B], integer, or None. Past its end a row's state stays as it is.
        resets: [T, B, D], bool, or None. Where true, the state starts anew before that step, in
            the order in which the direction takes its steps.
        reset_state: What it starts from, [D, B, H], or None for zero.
        save_gates: Whether to return the gates' hidden part too, for `scan_backward` to use.
        plan: How to launch; chosen by `plan_scan` if None.
        polls: Looks after which a wait gives up.

    Returns:
        y, [T, B, D, H]; with save_gates (y, gates_h) with gates_h [T, B, D, 3H].

    Raises:
        DoesNotFit: No kernel takes this shape.
        KernelTimeout: An earlier launch on this device gave up waiting.
    """
    launches.check_errors(gates_x.device)
    T, B, D, _ = gates_x.shape
    H, HP = h0.shape[-1], padded_size(h0.shape[-1])
    dtype, precision = gates_x.dtype, matrix_precision(gates_x.dtype)
    if plan is None:
        plan = plan_scan(
            gates_x, h0, reset_after=reset_after, direction="forward", precision=precision
        )
    exchanges = plan.group > 1
    fill = exchanges and plan.protocol == SENTINEL

    to_row = resets is not None and reset_state is not None
    states = launches.exchange_buffer((T + D + to_row, B, D, HP), gates_x, fill)
    for slot, state in [(0, h0), (T + 1, h0)][:D] + [(T + D, reset_state)] * to_row:
        states[slot, ..., :H] = launches.never_the_sentinel(state.transpose(0, 1).to(dtype))
        states[slot, ..., H:] = 0
    gated = gates_x
    if exchanges and not reset_after:
        gated = launches.exchange_buffer((T, B, D, HP), gates_x, fill)
    gates_h = gates_x
    if save_gates:
        gates_h = torch.empty_like(gates_x, memory_format=torch.contiguous_format)

    with launches.current(gates_x.device):
        launches.launch(
            scan_forward_kernel,
            plan,
            gates_x.device,
            polls,
            gates_x=gates_x.contiguous(),
            weight=launches.padded_weight(weight_hh, HP, dtype),
            bias=gates_x if bias_hh is None else bias_hh.to(dtype).contiguous(),
            states=states,
            gated=gated,
            gates_h=gates_h,
            lengths=launches.lengths_argument(lengths, gates_x),
            resets=launches.resets_argument(resets, gates_x),
            steps=T,
            batch=B,
            hidden=H,
            padded=HP,
            DIRECTIONS=D,
            MERGE=plan.merge,
            RESET_AFTER=reset_after,
            HAS_BIAS=bias_hh is not None,
            HAS_LENGTHS=lengths is not None,
            HAS_RESETS=resets is not None,
            RESET_TO_ROW=to_row,
            SAVE_GATES=save_gates,
            PRECISION=precision,
        )
    y = states[1 : T + 1, ..., :H]
    return (y, gates_h) if save_gates else y


def step(
    gates_x: Tensor,
    h: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    *,
    reset_after: bool,
) -> Tensor:
    """The state after one step.

    Args:
        gates_x: W_ih x + b_ih, [B, 3H]; its dtype is the one computed in.
        h: The state before, [B, H].
        weight_hh: [3H, H].
        bias_hh: [3H] or None.
        reset_after: The variant.

    Returns:
        [B, H].
    """
    B, H = h.shape
    dtype = gates_x.dtype
    if dtype not in DTYPES:
        raise TypeError(f"the kernels compute {', '.join(map(str, DTYPES))}, got: {dtype}")
    gates_x, h = gates_x.contiguous(), h.to(dtype).contiguous()
    out = torch.empty_like(h)
    gated = h if reset_after else torch.empty_like(h)
    update = h if reset_after else torch.empty_like(h, dtype=torch.float32)
    tiles = step_tiles(DTYPES[dtype])
    grid = (-(-H // tiles.columns), -(-B // tiles.rows))
    phases = (0,) if reset_after else (1, 2)
    with launches.current(gates_x.device):
        for phase in phases:
            step_kernels.step_kernel[grid](
                gates_x=gates_x,
                weight=weight_hh.to(dtype).contiguous(),
                bias=gates_x if bias_hh is None else bias_hh.to(dtype).contiguous(),
                h=h,
                gated=gated,
                update=update,
                out=out,
                batch=B,
                hidden=H,
                ROWS=tiles.rows,
                COLS=tiles.columns,
                CHUNK=tiles.chunk,
                SPLIT=tiles.warps,
                PHASE=phase,
                HAS_BIAS=bias_hh is not None,
                PRECISION=matrix_precision(dtype),
                num_warps=tiles.warps,
                num_stages=tiles.stages,
            )
    return out
