"""The reverse recurrence over all time steps, W_hh resident on chip: kernel and host launcher.

As in `forward.py` a program owns the same columns of the state at every step, here of dh. It
computes the gradients of its gates alone, but dh of the step before is the product of the gradients
of all gates, 3H per row, with its columns of W_hh. So those are exchanged, in the buffers that hold
them as results: `d_gates` (by gates_x) and, with `reset_after`, where the hidden part of n has its
own gradient, `d_c`. What does not depend on the step before is computed by torch, in products over
all steps: the gates before the kernel, the weights' gradients after it.

reset_after=True   one exchange per step: da_r, da_z, dc.
reset_after=False  two: da_n (and da_z), from which du = da_n W_hn; then da_r = du h r (1 - r).
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from triton_gru.kernel_errors import check_errors
from triton_gru.kernels import launch
from triton_gru.kernels.exchange import announce, publish, receive, report
from triton_gru.kernels.gates import candidate, reset_gradient, sigmoid, update_gradients
from triton_gru.kernels.tile import (
    chunk_rows,
    load_flags,
    load_weight,
    owned,
    product,
    product_own,
    total,
    zero_sum,
)
from triton_gru.plan.plan import GLUON, POLLS, SENTINEL, Plan, padded_size
from triton_gru.plan.selection import matrix_precision, plan_scan


@triton.jit
def load_step(
    dy,
    y,
    h0,
    gates_x,
    gates_h,
    time,
    forwards,
    step,
    slot,
    y_slot,
    own,
    own_y,
    own_h0,
    own_gates,
    hidden,
    mask,
):
    """What a step needs from memory and no other program makes: dy, the state before, a's parts."""
    mask = mask & (step >= 0)
    at = time * slot
    dy_t = tl.load(dy + at + own, mask=mask, other=0.0)
    later = tl.load(y + (time - forwards) * y_slot + own_y, mask=mask & (step > 0), other=0.0)
    first = tl.load(h0 + own_h0, mask=mask & (step == 0), other=0.0)
    h = tl.where(step > 0, later, first)
    x = gates_x + 3 * at + own_gates
    g = gates_h + 3 * at + own_gates
    x_r = tl.load(x, mask=mask, other=0.0)
    x_z = tl.load(x + hidden, mask=mask, other=0.0)
    x_n = tl.load(x + 2 * hidden, mask=mask, other=0.0)
    g_r = tl.load(g, mask=mask, other=0.0)
    g_z = tl.load(g + hidden, mask=mask, other=0.0)
    g_n = tl.load(g + 2 * hidden, mask=mask, other=0.0)
    return dy_t, h, x_r, x_z, x_n, g_r, g_z, g_n


# Not specialised: Triton turns an argument that equals 1 into a constant, which has no `.to`, and
# recompiles for 1 and for multiples of 16; batches and steps come in all sizes.
@triton.jit(do_not_specialize=["steps", "batch", "first_group"])
def scan_backward_kernel(
    dy,  # [T, B, D, H]
    y,  # [T, B, D, y_row]
    h0,  # [D, B, H]
    gates_x,  # [T, B, D, 3H]
    gates_h,  # [T, B, D, 3H], hidden part of the pre-activations, biases included
    weight,  # [D, 3, HP, HP], zero beyond H; by the state's column, then the gate's unit
    d_gates,  # [T, B, D, 3, HP], result and exchange
    d_c,  # [T, B, D, HP], result and exchange; used if RESET_AFTER
    dh0,  # [D, B, H] float32, result
    lengths,  # [B] int32; read if HAS_LENGTHS
    resets,  # [T, B, D] int32; read if HAS_RESETS
    counters,  # int32, 32 apart, one per group; used under COUNTER
    error,  # int32[2]
    steps,  # T
    batch,  # B
    hidden,  # H
    padded,  # HP
    y_row,  # elements from one row of y to the next
    polls,  # polls after which a wait times out
    first_group,  # number of the launch's first group
    DIRECTIONS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    K_BLOCKS: tl.constexpr,
    TAIL: tl.constexpr,
    SPLIT_K: tl.constexpr,
    REGISTERS: tl.constexpr,
    GROUP: tl.constexpr,
    STAGE_ALL: tl.constexpr,
    BY_BLOCK: tl.constexpr,
    RESET_AFTER: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_RESETS: tl.constexpr,
    PROTOCOL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Fills `d_gates`, `d_c` and `dh0`. Grid: groups * GROUP programs."""
    DTYPE: tl.constexpr = d_gates.dtype.element_ty
    WORD: tl.constexpr = 32 // DTYPE.primitive_bitwidth
    program = tl.program_id(0)
    member = program % GROUP
    group = program // GROUP + first_group
    tiles = tl.cdiv(batch, BLOCK_M)
    direction = group // tiles
    row0 = (group % tiles) * BLOCK_M
    col0 = member * BLOCK_N
    counter = counters + group * 32

    # Weights: K is the gate's unit, contiguous as the blocks come transposed; the column is the
    # state's.
    square = padded * padded
    own_weight = weight + direction * 3 * square
    # fmt: off
    w_r = load_weight(own_weight, col0, padded,
                      BLOCK_N, BLOCK_K, K_BLOCKS, TAIL, SPLIT_K, REGISTERS)
    w_z = load_weight(own_weight + square, col0, padded,
                      BLOCK_N, BLOCK_K, K_BLOCKS, TAIL, SPLIT_K, REGISTERS)
    w_n = load_weight(own_weight + 2 * square, col0, padded,
                      BLOCK_N, BLOCK_K, K_BLOCKS, TAIL, SPLIT_K, REGISTERS)
    # fmt: on

    row, col = owned(row0, col0, BLOCK_M, BLOCK_N, SPLIT_K)
    real = (row < batch) & (col < hidden)
    stored = (row < batch) & (col < padded)
    lane = row * DIRECTIONS + direction
    own = lane * hidden + col
    own_y = lane * y_row + col
    own_h0 = (direction * batch + row) * hidden + col
    own_gates = lane * 3 * hidden + col
    own_out = lane * 3 * padded + col
    own_c = lane * padded + col
    slot = (batch * DIRECTIONS * hidden).to(tl.int64)
    reset_step = (batch * DIRECTIONS).to(tl.int64)
    y_slot = (batch * DIRECTIONS * y_row).to(tl.int64)
    out_slot = (batch * DIRECTIONS * padded).to(tl.int64)

    tile_row = chunk_rows(row0, BLOCK_M)
    words = padded // WORD  # the tile is addressed in words (exchange.py)
    tile_lane = tile_row * DIRECTIONS + direction
    tile = tile_lane * 3 * words
    tile_c = tile_lane * words
    wanted = tile_row < batch

    forwards = 1 - 2 * direction
    time = (1 - direction) * (steps - 1)
    step = steps - 1
    carry = tl.zeros_like(row.to(tl.float32))
    if HAS_LENGTHS:
        length = tl.load(lengths + row, mask=row < batch, other=0)
        tile_length = tl.load(lengths + tile_row, mask=wanted, other=0)
    # fmt: off
    dy_t, h_t, x_r, x_z, x_n, g_r, g_z, g_n = load_step(
        dy, y, h0, gates_x, gates_h, time, forwards, step, slot, y_slot,
        own, own_y, own_h0, own_gates, hidden, real,
    )
    # fmt: on
    failed = 0

    for done in range(steps):
        dh = dy_t.to(tl.float32) + carry
        h = h_t.to(tl.float32)
        if HAS_RESETS:
            at = resets + time * reset_step + row * DIRECTIONS + direction
            reset = load_flags(at, row < batch)
            if HAS_LENGTHS:
                reset = reset & (time < length)
            h = tl.where(reset, 0.0, h)
        c = g_n.to(tl.float32)
        r = sigmoid(x_r.to(tl.float32) + g_r.to(tl.float32))
        z = sigmoid(x_z.to(tl.float32) + g_z.to(tl.float32))
        n = candidate(x_n.to(tl.float32), r, c, RESET_AFTER)
        da_n, da_z = update_gradients(dh, z, n, h)
        if RESET_AFTER:
            d_hidden_n = da_n * r
            da_r = reset_gradient(da_n * c, r)
        here = wanted
        if HAS_LENGTHS:
            active = time < length
            here = here & (time < tile_length)
            da_n = tl.where(active, da_n, 0.0)
            da_z = tl.where(active, da_z, 0.0)
        if GROUP > 1:
            da_n = tl.where(failed != 0, float("nan"), da_n)

        # Stores for the group, which are also this program's results.
        out = d_gates + 3 * time * out_slot
        out_c = d_c + time * out_slot
        publish(out + own_out + padded, da_z, stored, PROTOCOL)
        publish(out + own_out + 2 * padded, da_n, stored, PROTOCOL)
        if RESET_AFTER:
            if HAS_LENGTHS:
                da_r = tl.where(active, da_r, 0.0)
                d_hidden_n = tl.where(active, d_hidden_n, 0.0)
            publish(out + own_out, da_r, stored, PROTOCOL)
            publish(out_c + own_c, d_hidden_n, stored, PROTOCOL)
            before = dh * z
        zero = zero_sum(BLOCK_M, BLOCK_N, SPLIT_K)
        if not RESET_AFTER:
            if GROUP > 1:
                announce(counter, PROTOCOL)
                base = out + 2 * padded
                # fmt: off
                vector, late = receive(
                    base, tile, 0, base, tile, here, words,
                    counter, GROUP * (2 * done + 1), tl.where(failed != 0, 0, polls),
                    1, 0, BLOCK_K // WORD, K_BLOCKS, TAIL // WORD, WORD, PROTOCOL,
                )
                # fmt: on
                report(error, late, program, step)
                failed = failed | late
                acc = product(zero, vector, w_n, 0, K_BLOCKS, DTYPE, PRECISION, STAGE_ALL)
            else:
                acc = product_own(zero, da_n, w_n, DTYPE, PRECISION)
            du = tl.where(real, total(acc, BLOCK_M, BLOCK_N, SPLIT_K, PRECISION), 0.0)
            da_r = reset_gradient(du * h, r)
            if HAS_LENGTHS:
                da_r = tl.where(active, da_r, 0.0)
            if GROUP > 1:
                da_r = tl.where(failed != 0, float("nan"), da_r)
            publish(out + own_out, da_r, stored, PROTOCOL)
            before = dh * z + du * r
            target = GROUP * (2 * done + 2)
        else:
            target = GROUP * (done + 1)
        if GROUP > 1:
            announce(counter, PROTOCOL)
            spent = tl.where(failed != 0, 0, polls)
            # fmt: off
            if BY_BLOCK:
                # One gate after the other: a third of the registers, two more L2 round trips.
                part, late = receive(
                    out, tile, 0, out, tile, here, words, counter, target, spent,
                    1, 0, BLOCK_K // WORD, K_BLOCKS, TAIL // WORD, WORD, PROTOCOL,
                )
                acc = product(zero, part, w_r, 0, K_BLOCKS, DTYPE, PRECISION, STAGE_ALL)
                base = out + padded
                part, later = receive(
                    base, tile, 0, base, tile, here, words, counter, target, spent,
                    1, 0, BLOCK_K // WORD, K_BLOCKS, TAIL // WORD, WORD, PROTOCOL,
                )
                acc = product(acc, part, w_z, 0, K_BLOCKS, DTYPE, PRECISION, STAGE_ALL)
                late = late | later
                if RESET_AFTER:
                    part, later = receive(
                        out_c, tile_c, 0, out_c, tile_c, here, words, counter, target, spent,
                        1, 0, BLOCK_K // WORD, K_BLOCKS, TAIL // WORD, WORD, PROTOCOL,
                    )
                    acc = product(acc, part, w_n, 0, K_BLOCKS, DTYPE, PRECISION, STAGE_ALL)
                    late = late | later
            else:
                vector, late = receive(
                    out, tile, words, out_c, tile_c, here, words, counter, target, spent,
                    2, 1 if RESET_AFTER else 0,
                    BLOCK_K // WORD, K_BLOCKS, TAIL // WORD, WORD, PROTOCOL,
                )
                acc = product(zero, vector, w_r, 0, K_BLOCKS, DTYPE, PRECISION, STAGE_ALL)
                acc = product(acc, vector, w_z, K_BLOCKS, K_BLOCKS, DTYPE, PRECISION, STAGE_ALL)
                if RESET_AFTER:
                    acc = product(
                        acc, vector, w_n, 2 * K_BLOCKS, K_BLOCKS, DTYPE, PRECISION, STAGE_ALL
                    )
            # fmt: on
            report(error, late, program, step)
            failed = failed | late
        else:
            acc = product_own(zero, da_r, w_r, DTYPE, PRECISION)
            acc = product_own(acc, da_z, w_z, DTYPE, PRECISION)
            if RESET_AFTER:
                acc = product_own(acc, d_hidden_n, w_n, DTYPE, PRECISION)
        # Columns beyond H stay 0, as in the forward: infinity times their weights is NaN.
        new = tl.where(real, before + total(acc, BLOCK_M, BLOCK_N, SPLIT_K, PRECISION), 0.0)
        if GROUP > 1:
            new = tl.where(failed != 0, float("nan"), new)
        if HAS_LENGTHS:
            new = tl.where(active, new, dh)  # past its end a row's state is a copy
        if HAS_RESETS:
            new = tl.where(reset, 0.0, new)
        carry = new

        time -= forwards
        step -= 1
        # fmt: off
        dy_t, h_t, x_r, x_z, x_n, g_r, g_z, g_n = load_step(
            dy, y, h0, gates_x, gates_h, time, forwards, step, slot, y_slot,
            own, own_y, own_h0, own_gates, hidden, real,
        )
        # fmt: on

    tl.store(dh0 + own_h0, carry, mask=real)


# The backward takes time in pieces of so many steps, from the end: what it holds of a piece (gates,
# their gradients as exchanged, the states before) is 8 times y of these steps, not of all. Each
# piece costs a launch and one read of the weights, the time of a few steps.
PIECE_STEPS = 256
# Blocks of time over which a float32 gradient of the weights is summed.
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
    gates_h: Tensor | None = None,
    plan: Plan | None = None,
    polls: int = POLLS,
) -> tuple[Tensor | None, ...]:
    """The derivative of `scan_forward`.

    Args:
        dy: The gradient of the loss with respect to y, [T, B, D, H].
        y: The result of `scan_forward`.
        gates_x: As given to `scan_forward`, likewise the following up to resets.
        h0: [D, B, H].
        weight_hh: [D, 3H, H].
        bias_hh: [D, 3H] or None.
        reset_after: The variant.
        lengths: [B] or None.
        resets: [T, B, D] or None.
        gates_h: The result of `scan_forward` with save_gates; None: recomputed by one product.
        plan: How to launch; chosen by `plan_scan` if None.
        polls: Polls after which a wait times out.

    Returns:
        The derivatives by gates_x, h0, weight_hh and bias_hh (None without a bias), each of its
        argument's shape.
    """
    check_errors(gates_x.device)
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
    weight, h0_cast = weight_hh.to(dtype), h0.to(dtype).contiguous()
    bias = None if bias_hh is None else bias_hh.to(dtype)
    transposed = weight.unflatten(1, (3, H)).mT.flatten(1, 2)
    transposed = launch.padded_weight(transposed, padded_size(H), dtype)

    pieces = _pieces(T, D)
    if len(pieces) > 1:
        d_gates_x = torch.empty_like(gates_x, memory_format=torch.contiguous_format)
    later: list[Tensor] = []  # results of the piece after this one in time, and the sums so far
    for piece in pieces:
        begin, dy_piece = piece.start, dy[piece]
        if len(pieces) > 1:
            dy_piece = dy_piece.to(torch.float32, copy=True)  # dh between pieces is float32
            if later:
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
            gates_h=None if gates_h is None else gates_h[piece],
            plan=plan,
            polls=polls,
        )
        if len(pieces) == 1:
            d_gates_x = by_gates
        else:
            d_gates_x[piece] = by_gates
        if later:  # sums in float32; dh0 is that of the first piece
            found[1:] = [sums.float() + new for sums, new in zip(later[1:], found[1:], strict=True)]
        later = found
    dh0, dweight, dbias = later
    return (
        d_gates_x,
        dh0.to(h0.dtype),
        dweight.to(weight_hh.dtype),
        None if bias_hh is None else dbias.to(bias_hh.dtype),
    )


def _pieces(T: int, D: int) -> list[slice]:
    """The pieces of time that the backward takes one by one, the last first.

    The two directions of a layer run through time in opposite directions, so they are one piece.
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
    gates_h: Tensor | None,
    plan: Plan,
    polls: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`scan_backward` of some consecutive steps; h0 is the state before them, all in one dtype.

    Returns:
        The derivatives by gates_x, h0 (float32), the weight and the bias (also without a bias).
    """
    D, H = gates_x.shape[2], h0.shape[-1]
    before = _states_before(y, h0, resets)
    if gates_h is None:
        gates_h = _hidden_gates(before, gates_x, weight, bias, reset_after)
    dy = (dy if dy.dtype == torch.float32 else dy.to(gates_x.dtype)).contiguous()
    gates_x, gates_h = gates_x.contiguous(), gates_h.contiguous()
    options: dict[str, Any] = {
        "reset_after": reset_after,
        "lengths": lengths,
        "resets": resets,
        "plan": plan,
        "polls": polls,
    }
    if plan.kernel == GLUON:
        from triton_gru.kernels import gluon_backward  # not every Triton has this Gluon

        d_gates, d_c, dh0 = gluon_backward.gradients(
            dy, gates_x, gates_h, before, transposed, **options
        )
    else:
        d_gates, d_c, dh0 = _gradients(dy, y, h0, gates_x, gates_h, transposed, **options)
    del dy  # frees a copy before the products below

    d_gates_x = d_gates.flatten(3)  # a view where H is a multiple of 16, else a copy
    dweight = weight.new_empty(D, 3 * H, H)
    for d in range(D):
        of_n = before[d]
        if not reset_after:
            r = torch.sigmoid(gates_x[:, :, d, :H] + gates_h[:, :, d, :H])
            of_n = r * before[d]
        _over_time(dweight[d, : 2 * H], d_gates_x[:, :, d, : 2 * H], before[d])
        _over_time(dweight[d, 2 * H :], d_c[:, :, d], of_n)
    dbias = torch.cat([d_gates_x[..., : 2 * H].sum((0, 1)), d_c.sum((0, 1))], -1)
    return d_gates_x, dh0, dweight, dbias


def _gradients(
    dy: Tensor,
    y: Tensor,
    h0: Tensor,
    gates_x: Tensor,
    gates_h: Tensor,
    transposed: Tensor,
    *,
    reset_after: bool,
    lengths: Tensor | None,
    resets: Tensor | None,
    plan: Plan,
    polls: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs this module's kernel.

    Returns:
        The derivatives by gates_x [T, B, D, 3, H], by the hidden part of n [T, B, D, H] and by h0.
    """
    T, B, D, H = dy.shape
    HP = transposed.shape[-1]
    fill = plan.group > 1 and plan.protocol == SENTINEL
    y_rows = y if _rows_are_regular(y) else y.contiguous()
    d_gates = launch.exchange_buffer((T, B, D, 3, HP), gates_x, fill)
    d_c = launch.exchange_buffer((T, B, D, HP), gates_x, fill) if reset_after else d_gates
    dh0 = torch.empty_like(h0, dtype=torch.float32)
    arguments = {
        "dy": dy,
        "y": y_rows,
        "h0": h0,
        "gates_x": gates_x,
        "gates_h": gates_h,
        "weight": transposed,
        "d_gates": d_gates,
        "d_c": d_c,
        "dh0": dh0,
        "lengths": launch.lengths_argument(lengths, gates_x),
        "resets": launch.resets_argument(resets, gates_x),
        "steps": T,
        "batch": B,
        "hidden": H,
        "padded": HP,
        "y_row": y_rows.stride(2),
        "BY_BLOCK": plan.by_block,
        "DIRECTIONS": D,
        "RESET_AFTER": reset_after,
        "HAS_LENGTHS": lengths is not None,
        "HAS_RESETS": resets is not None,
        "PRECISION": matrix_precision(gates_x.dtype),
    }
    with launch.launching(plan, gates_x.device):
        for grid, planned in launch.launches(plan, gates_x.device, polls):
            scan_backward_kernel[grid](**arguments, **planned)
    d_gates = d_gates[..., :H]
    return d_gates, d_c[..., :H] if reset_after else d_gates[:, :, :, 2], dh0


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


def _states_before(y: Tensor, h0: Tensor, resets: Tensor | None) -> list[Tensor]:
    """For each direction the state that each step started from, [T, B, H]."""
    states = []
    for d in range(h0.shape[0]):
        first = h0[d : d + 1]
        before = torch.cat([y[1:, :, d], first] if d else [first, y[:-1, :, d]])
        if resets is not None:
            before = before.masked_fill(resets[..., d, None].bool(), 0)
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
