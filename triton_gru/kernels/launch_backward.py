"""Backward, as backend "triton" computes it: the derivative of `launch_forward.scan_forward`.

The kernel finds the gradients of all gates step by step. What does not depend on the step before
is left to torch, in products over all steps: the gates before it, the weights' gradients after it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_gru.kernels import launches
from triton_gru.kernels.scan_backward import scan_backward_kernel
from triton_gru.kernels.support import matrix_precision, plan_scan
from triton_gru.plan import POLLS, SENTINEL, Plan, padded_size

# The backward takes time in pieces of so many steps, from the end: what it holds of a piece (gates,
# their gradients as exchanged, the states before) is 8 times y of these steps, not of all. A piece
# costs a launch and the reading of the weights, a few steps' worth.
PIECE_STEPS = 256
# Blocks of time that a float32 gradient of the weights is summed in.
FLOAT32_SUMS = 16


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
    reset_state: Tensor | None = None,
    gates_h: Tensor | None = None,
    plan: Plan | None = None,
    polls: int = POLLS,
) -> tuple[Tensor | None, ...]:
    """The derivative of `scan_forward`.

    Args:
        dy: What the loss passes to y, [T, B, D, H].
        y: What `scan_forward` returned.
        gates_x: This and the following up to reset_state: what `scan_forward` was given.
        h0: As gates_x.
        weight_hh: As gates_x.
        bias_hh: As gates_x.
        reset_after: As gates_x.
        lengths: As gates_x.
        resets: As gates_x.
        reset_state: As gates_x.
        gates_h: What it returned with save_gates; computed anew, with one product, if None.
        plan: How to launch; chosen by `plan_scan` if None.
        polls: Looks after which a wait gives up.

    Returns:
        The derivatives by gates_x, h0, weight_hh and bias_hh (None without a bias), each of its
        argument's shape; with a reset_state a fifth, by it.
    """
    launches.check_errors(gates_x.device)
    T, _, D, _ = gates_x.shape
    H, dtype = h0.shape[-1], gates_x.dtype
    if plan is None:
        plan = plan_scan(
            gates_x,
            h0,
            reset_after=reset_after,
            direction="backward",
            precision=matrix_precision(dtype),
        )
    if resets is None:
        reset_state = None
    weight, h0_cast = weight_hh.to(dtype), h0.to(dtype).contiguous()
    bias = None if bias_hh is None else bias_hh.to(dtype)
    transposed = weight.unflatten(1, (3, H)).mT.flatten(1, 2)
    transposed = launches.padded_weight(transposed, padded_size(H), dtype)

    pieces = _pieces(T, D)
    if len(pieces) > 1:
        d_gates_x = torch.empty_like(gates_x, memory_format=torch.contiguous_format)
    later = None  # what the piece after this one in time passes back, and the sums so far
    for piece in pieces:
        begin, dy_piece = piece.start, dy[piece]
        if len(pieces) > 1:
            dy_piece = dy_piece.to(torch.float32, copy=True)  # dh of a piece arrives in float32
            if later is not None:
                dy_piece[-1] += later[0].transpose(0, 1)
        first = y[begin - 1].transpose(0, 1).contiguous() if begin else h0_cast
        by_gates, *found = _backward_piece(
            dy_piece,
            y[piece],
            gates_x[piece],
            first,
            weight,
            transposed,
            bias,
            reset_after=reset_after,
            lengths=lengths if lengths is None or not begin else lengths - begin,
            resets=None if resets is None else resets[piece],
            reset_state=reset_state,
            gates_h=None if gates_h is None else gates_h[piece],
            plan=plan,
            polls=polls,
        )
        if len(pieces) == 1:
            d_gates_x = by_gates
        else:
            d_gates_x[piece] = by_gates
        if later is not None:  # sums in float32; dh0 alone is of the first piece
            sums = [None if value is None else value.float() for value in later[1:]]
            for value, new in zip(sums, found[1:], strict=True):
                if value is not None:
                    value += new
            found[1:] = sums
        later = found
    dh0, dweight, dbias, d_reset_state = later
    results = (
        d_gates_x,
        dh0.to(h0.dtype),
        dweight.to(weight_hh.dtype),
        None if bias_hh is None else dbias.to(bias_hh.dtype),
    )
    return results if reset_state is None else (*results, d_reset_state.to(reset_state.dtype))


def _pieces(T: int, D: int) -> list[slice]:
    """The pieces of time that the backward takes one by one, the last first.

    The two directions of a layer run through time in opposite senses, and so in one piece.
    """
    if D > 1 or T <= PIECE_STEPS:
        return [slice(0, T)]
    return [slice(max(0, end - PIECE_STEPS), end) for end in range(T, 0, -PIECE_STEPS)]


def _backward_piece(
    dy: Tensor,
    y: Tensor,
    gates_x: Tensor,
    h0: Tensor,
    weight: Tensor,
    transposed: Tensor,
    bias: Tensor | None,
    *,
    reset_after: bool,
    lengths: Tensor | None,
    resets: Tensor | None,
    reset_state: Tensor | None,
    gates_h: Tensor | None,
    plan: Plan,
    polls: int,
) -> tuple[Tensor | None, ...]:
    """`scan_backward` of some consecutive steps; h0 is the state before them, all in one dtype.

    Returns:
        The derivatives by gates_x, h0 (float32), the weight, the bias (also where there is none)
        and reset_state (float32).
    """
    T, B, D, _ = gates_x.shape
    H, HP = h0.shape[-1], transposed.shape[-1]
    dtype = gates_x.dtype
    fill = plan.group > 1 and plan.protocol == SENTINEL
    to_row = reset_state is not None
    before = _states_before(y, h0, resets, reset_state)
    if gates_h is None:
        gates_h = _hidden_gates(before, gates_x, weight, bias, reset_after)
    y_rows = y if _rows_are_regular(y) else y.contiguous()
    d_gates = launches.exchange_buffer((T, B, D, 3, HP), gates_x, fill)
    d_c = launches.exchange_buffer((T, B, D, HP), gates_x, fill) if reset_after else d_gates
    dh0 = torch.empty_like(h0, dtype=torch.float32)
    d_reset_state = torch.empty_like(dh0) if to_row else dh0

    with launches.current(gates_x.device):
        launches.launch(
            scan_backward_kernel,
            plan,
            gates_x.device,
            polls,
            dy=(dy if dy.dtype == torch.float32 else dy.to(dtype)).contiguous(),
            y=y_rows,
            h0=h0,
            gates_x=gates_x.contiguous(),
            gates_h=gates_h.contiguous(),
            weight=transposed,
            d_gates=d_gates,
            d_c=d_c,
            dh0=dh0,
            d_reset_rows=d_reset_state,
            lengths=launches.lengths_argument(lengths, gates_x),
            resets=launches.resets_argument(resets, gates_x),
            reset_rows=reset_state.to(dtype).contiguous() if to_row else h0,
            steps=T,
            batch=B,
            hidden=H,
            padded=HP,
            y_row=y_rows.stride(2),
            BY_BLOCK=plan.by_block,
            DIRECTIONS=D,
            RESET_AFTER=reset_after,
            HAS_LENGTHS=lengths is not None,
            HAS_RESETS=resets is not None,
            RESET_TO_ROW=to_row,
            PRECISION=matrix_precision(dtype),
        )

    d_gates = d_gates[..., :H]
    d_gates_x = d_gates.flatten(3)  # a view where H is a multiple of 16, else a copy
    by_n = d_c[..., :H] if reset_after else d_gates[:, :, :, 2]
    dweight = weight.new_empty(D, 3 * H, H)
    for d in range(D):
        of_n = before[d]
        if not reset_after:
            r = torch.sigmoid(gates_x[:, :, d, :H] + gates_h[:, :, d, :H])
            of_n = r * before[d]
        _over_time(dweight[d, : 2 * H], d_gates_x[:, :, d, : 2 * H], before[d])
        _over_time(dweight[d, 2 * H :], by_n[:, :, d], of_n)
    dbias = torch.cat([d_gates_x[..., : 2 * H].sum((0, 1)), by_n.sum((0, 1))], -1)
    return d_gates_x, dh0, dweight, dbias, d_reset_state if to_row else None


def _over_time(out: Tensor, d_gates: Tensor, states: Tensor) -> None:
    """The sum over steps and rows of d_gates states^T, [n, H], from [T, B, n] and [T, B, H].

    16-bit products are summed in float32 and rounded once. A float32 sum loses as it grows long,
    so it is made of blocks of time: against steps summed one by one, as nn.GRU on a CPU does, the
    error was 0.9 to 2.1 times as large in one product and 0.5 to 1.4 times in 16 blocks.
    """
    T = max(1, len(states))
    block = -(-T // FLOAT32_SUMS) if out.dtype == torch.float32 else T
    for i, begin in enumerate(range(0, T, block)):
        part = slice(begin, begin + block)
        by, of = d_gates[part].flatten(0, 1).t(), states[part].flatten(0, 1)
        out.addmm_(by, of, beta=0 if i == 0 else 1)


def _rows_are_regular(y: Tensor) -> bool:
    """Whether y is [T, B, D, H] with rows at one distance, as `scan_forward` returns it."""
    _, B, D, H = y.shape
    row = y.stride(2)
    regular = (B * D * row, D * row, row, 1)
    return row >= H and all(map(int.__eq__, y.stride(), regular))


def _states_before(
    y: Tensor, h0: Tensor, resets: Tensor | None, reset_state: Tensor | None
) -> list[Tensor]:
    """For each direction the state that each step started from, [T, B, H]."""
    states = []
    for d in range(h0.shape[0]):
        first = h0[d : d + 1]
        before = torch.cat([y[1:, :, d], first] if d else [first, y[:-1, :, d]])
        if resets is not None:
            row = 0.0 if reset_state is None else reset_state[d].to(y.dtype)
            before = torch.where(resets[..., d, None].bool(), row, before)
        states.append(before)
    return states


def _hidden_gates(
    before: list[Tensor],
    gates_x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reset_after: bool,
) -> Tensor:
    """The hidden part of every step's gates, [T, B, D, 3H]: one product over all steps."""
    H = weight.shape[-1]
    directions = []
    for d, h in enumerate(before):
        b = None if bias is None else bias[d]
        if reset_after:
            directions.append(F.linear(h, weight[d], b))
            continue
        b_rz, b_n = (None, None) if b is None else (b[: 2 * H], b[2 * H :])
        rz = F.linear(h, weight[d, : 2 * H], b_rz)
        u = torch.sigmoid(gates_x[:, :, d, :H] + rz[..., :H]) * h
        directions.append(torch.cat([rz, F.linear(u, weight[d, 2 * H :], b_n)], -1))
    return torch.stack(directions, 2)
