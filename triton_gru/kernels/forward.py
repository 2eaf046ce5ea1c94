"""The forward recurrence over all time steps, W_hh resident on chip: kernel and host launcher.

One kernel, two kinds of launch (docs/kernels.md has the picture):

GROUP == 1  "single": a program owns every column, the state never leaves its registers.
GROUP  > 1  "group": GROUP programs share the columns of one batch tile; each step they exchange
            h, and with `reset_after=False` also u = r * h, by `exchange.py`.

The output is also the exchange buffer: `states` holds h0 in slot 0 (forward direction) and in
slot T + 1 (reverse direction), and y of time t in slot t + 1. "The state before step t" is
therefore always one slot of one buffer.

The product reads the state rounded to the dtype of `states`, as the other programs do; the blend
z * h reads the float32 state that its owner keeps in registers.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_gru.kernel_errors import check_errors
from triton_gru.kernels import launch
from triton_gru.kernels.exchange import announce, publish, receive, report
from triton_gru.kernels.gates import blend, candidate, sigmoid
from triton_gru.kernels.tile import (
    chunk_rows,
    load_flags,
    load_weight,
    owned,
    product,
    product_own,
    product_three,
    product_two,
    total,
    zero_sum,
)
from triton_gru.plan.plan import GLUON, POLLS, SENTINEL, Plan, padded_size
from triton_gru.plan.selection import matrix_precision, plan_scan


# Not specialised: Triton turns an argument that equals 1 into a constant, which has no `.to`, and
# recompiles for 1 and for multiples of 16; batches and steps come in all sizes.
@triton.jit(do_not_specialize=["steps", "batch", "first_group"])
def scan_forward_kernel(
    gates_x,  # [T, B, D, 3H]
    weight,  # [D, 3, HP, HP], zero beyond H
    bias,  # [D, 3H]; read if HAS_BIAS
    states,  # [T + D, B, D, HP], see above
    gated,  # [T, B, D, HP], exchange of r * h; used if not RESET_AFTER and GROUP > 1
    gates_h,  # [T, B, D, 3H], hidden part of the pre-activations; written if SAVE_GATES
    lengths,  # [B] int32; read if HAS_LENGTHS
    resets,  # [T, B, D] int32; read if HAS_RESETS
    counters,  # int32, 32 apart, one per group; used under COUNTER
    error,  # int32[2]
    steps,  # T
    batch,  # B
    hidden,  # H
    padded,  # HP: H rounded up to a multiple of 16, so that rows of `states` stay aligned
    polls,  # polls after which a wait times out
    first_group,  # number of the launch's first group; further groups follow in later launches
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
    RESET_AFTER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_RESETS: tl.constexpr,
    SAVE_GATES: tl.constexpr,
    PROTOCOL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Fills slots 1 .. T of `states`, `gates_h` if SAVE_GATES. Grid: groups * GROUP programs."""
    DTYPE: tl.constexpr = states.dtype.element_ty
    WORD: tl.constexpr = 32 // DTYPE.primitive_bitwidth
    program = tl.program_id(0)
    member = program % GROUP
    group = program // GROUP + first_group
    tiles = tl.cdiv(batch, BLOCK_M)
    direction = group // tiles
    row0 = (group % tiles) * BLOCK_M
    col0 = member * BLOCK_N
    counter = counters + group * 32

    # Weights: K is the contiguous axis of a row of weight_hh, the column is the gate's unit.
    block = padded * padded
    own_weight = weight + direction * 3 * block
    # fmt: off
    w_r = load_weight(own_weight, col0, padded,
                      BLOCK_N, BLOCK_K, K_BLOCKS, TAIL, SPLIT_K, REGISTERS)
    w_z = load_weight(own_weight + block, col0, padded,
                      BLOCK_N, BLOCK_K, K_BLOCKS, TAIL, SPLIT_K, REGISTERS)
    w_n = load_weight(own_weight + 2 * block, col0, padded,
                      BLOCK_N, BLOCK_K, K_BLOCKS, TAIL, SPLIT_K, REGISTERS)
    # fmt: on

    # Elements this program owns, and their offsets within one slot or one step.
    row, col = owned(row0, col0, BLOCK_M, BLOCK_N, SPLIT_K)
    real = (row < batch) & (col < hidden)
    stored = (row < batch) & (col < padded)
    own = (row * DIRECTIONS + direction) * padded + col
    own_gates = (row * DIRECTIONS + direction) * 3 * hidden + col
    slot = (batch * DIRECTIONS * padded).to(tl.int64)
    gate_step = (batch * DIRECTIONS * 3 * hidden).to(tl.int64)
    reset_step = (batch * DIRECTIONS).to(tl.int64)

    # The tile of the whole vector that the product reads, in words (exchange.py).
    tile_row = chunk_rows(row0, BLOCK_M)
    words = padded // WORD
    tile = (tile_row * DIRECTIONS + direction) * words
    wanted = tile_row < batch

    time = direction * (steps - 1)
    forwards = 1 - 2 * direction
    h0_slot = (direction * (steps + 1)).to(tl.int64)
    h = tl.load(states + h0_slot * slot + own, mask=stored, other=0.0).to(tl.float32)
    if HAS_LENGTHS:
        length = tl.load(lengths + row, mask=row < batch, other=0)
        tile_length = tl.load(lengths + tile_row, mask=wanted, other=0)
    if HAS_BIAS:
        own_bias = bias + direction * 3 * hidden + col
        b_r = tl.load(own_bias, mask=col < hidden, other=0.0).to(tl.float32)
        b_z = tl.load(own_bias + hidden, mask=col < hidden, other=0.0).to(tl.float32)
        b_n = tl.load(own_bias + 2 * hidden, mask=col < hidden, other=0.0).to(tl.float32)

    at = gates_x + time * gate_step + own_gates
    x_r = tl.load(at, mask=real, other=0.0)
    x_z = tl.load(at + hidden, mask=real, other=0.0)
    x_n = tl.load(at + 2 * hidden, mask=real, other=0.0)
    failed = 0

    for step in range(steps):
        # The state before this step.
        if HAS_RESETS:
            at = resets + time * reset_step + direction
            reset = load_flags(at + row * DIRECTIONS, row < batch)
            if HAS_LENGTHS:
                reset = reset & (time < length)
            h = tl.where(reset, 0.0, h)
        if GROUP > 1:
            before = time + 2 * direction  # the slot before, in this direction's order
            from_rows = wanted
            if HAS_LENGTHS:
                from_rows = from_rows & (time < tile_length)
            if HAS_RESETS:
                tile_reset = load_flags(at + tile_row * DIRECTIONS, wanted)
                from_rows = from_rows & (tile_reset == 0)
            base = states + before * slot
            target = GROUP * step * (1 if RESET_AFTER else 2)
            # fmt: off
            vector, late = receive(
                base, tile, 0, base, tile, from_rows, words,
                counter, target, tl.where(failed != 0, 0, polls),
                1, 0, BLOCK_K // WORD, K_BLOCKS, TAIL // WORD, WORD, PROTOCOL,
            )
            # fmt: on
            report(error, late, program, step)
            failed = failed | late

        # The hidden part of the gates.
        zero = zero_sum(BLOCK_M, BLOCK_N, SPLIT_K)
        if GROUP > 1:
            # fmt: off
            if RESET_AFTER:
                acc_r, acc_z, acc_n = product_three(
                    zero, vector, w_r, w_z, w_n, K_BLOCKS, DTYPE, PRECISION, STAGE_ALL
                )
            else:
                acc_r, acc_z = product_two(
                    zero, vector, w_r, w_z, K_BLOCKS, DTYPE, PRECISION, STAGE_ALL
                )
            # fmt: on
        else:
            acc_r = product_own(zero, h, w_r, DTYPE, PRECISION)
            if RESET_AFTER:
                acc_z = product_own(zero, h, w_z, DTYPE, PRECISION)
                acc_n = product_own(zero, h, w_n, DTYPE, PRECISION)
        h_r = total(acc_r, BLOCK_M, BLOCK_N, SPLIT_K, PRECISION)
        if GROUP > 1 or RESET_AFTER:
            h_z = total(acc_z, BLOCK_M, BLOCK_N, SPLIT_K, PRECISION)
        if RESET_AFTER:
            h_n = total(acc_n, BLOCK_M, BLOCK_N, SPLIT_K, PRECISION)
        if HAS_BIAS:
            h_r += b_r
        r = sigmoid(x_r.to(tl.float32) + h_r)
        if GROUP > 1 or RESET_AFTER:
            if HAS_BIAS:
                h_z += b_z
            z = sigmoid(x_z.to(tl.float32) + h_z)
        if not RESET_AFTER:
            u = tl.where(real, r * h, 0.0)
            if GROUP > 1:
                u = tl.where(failed != 0, float("nan"), u)
                publish(gated + time * slot + own, u, stored, PROTOCOL)
                announce(counter, PROTOCOL)
                here = wanted
                if HAS_LENGTHS:
                    here = here & (time < tile_length)
                base = gated + time * slot
                # fmt: off
                vector, late = receive(
                    base, tile, 0, base, tile, here, words,
                    counter, GROUP * (2 * step + 1), tl.where(failed != 0, 0, polls),
                    1, 0, BLOCK_K // WORD, K_BLOCKS, TAIL // WORD, WORD, PROTOCOL,
                )
                # fmt: on
                report(error, late, program, step)
                failed = failed | late
                acc_n = product(zero, vector, w_n, 0, K_BLOCKS, DTYPE, PRECISION, STAGE_ALL)
            else:
                acc_n = product_own(zero, u, w_n, DTYPE, PRECISION)
            h_n = total(acc_n, BLOCK_M, BLOCK_N, SPLIT_K, PRECISION)
        if HAS_BIAS:
            h_n += b_n
        if GROUP == 1 and not RESET_AFTER:
            # Last, or it takes registers while r is computed: 12 B spilled per step in float32 at
            # H = 128 on sm_100.
            h_z = product_own(zero, h, w_z, DTYPE, PRECISION)
            if HAS_BIAS:
                h_z += b_z
            z = sigmoid(x_z.to(tl.float32) + h_z)
        n = candidate(x_n.to(tl.float32), r, h_n, RESET_AFTER)
        # Columns beyond H stay 0: an infinite h makes them NaN, as it multiplies the zeros of their
        # weights, and in the next product they would make the whole row NaN.
        new = tl.where(real, blend(z, n, h), 0.0)
        if GROUP > 1:
            new = tl.where(failed != 0, float("nan"), new)

        # Past its end a row keeps its state: so the backward direction starts at its last element.
        h = tl.where(time < length, new, h) if HAS_LENGTHS else new
        publish(states + (time + 1) * slot + own, h, stored, PROTOCOL)
        if GROUP > 1:
            announce(counter, PROTOCOL)
        if SAVE_GATES:
            at = gates_h + time * gate_step + own_gates
            tl.store(at, h_r.to(gates_h.dtype.element_ty), mask=real)
            tl.store(at + hidden, h_z.to(gates_h.dtype.element_ty), mask=real)
            tl.store(at + 2 * hidden, h_n.to(gates_h.dtype.element_ty), mask=real)

        # Loads the gates of the next step during the exchange. (After the products, also because
        # the compiler lays out the arithmetic like the last load before it.)
        time += forwards
        ahead = real & (step + 1 < steps)
        at = gates_x + time * gate_step + own_gates
        x_r = tl.load(at, mask=ahead, other=0.0)
        x_z = tl.load(at + hidden, mask=ahead, other=0.0)
        x_n = tl.load(at + 2 * hidden, mask=ahead, other=0.0)


def scan_forward(
    gates_x: Tensor,
    h0: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    *,
    reset_after: bool,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
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
        lengths: [B], integer, or None. Past its end a row keeps its state.
        resets: [T, B, D], bool, or None. Where true, the state is zero before that step, in the
            order in which the direction takes its steps.
        save_gates: Whether to return the gates' hidden part too, for `scan_backward`.
        plan: How to launch; chosen by `plan_scan` if None.
        polls: Polls after which a wait times out.

    Returns:
        y, [T, B, D, H]; with save_gates (y, gates_h) with gates_h [T, B, D, 3H].

    Raises:
        DoesNotFit: No kernel takes this shape.
        KernelTimeout: An earlier launch on this device timed out.
        LaunchRefused: The device does not hold the programs of a group at once.
    """
    check_errors(gates_x.device)
    T, B, D, _ = gates_x.shape
    H, HP = h0.shape[-1], padded_size(h0.shape[-1])
    dtype, precision = gates_x.dtype, matrix_precision(gates_x.dtype)
    if plan is None:
        plan = plan_scan(
            gates_x, h0, reset_after=reset_after, direction="forward", precision=precision
        )
    exchanges = plan.group > 1
    fill = exchanges and plan.protocol == SENTINEL

    states = launch.exchange_buffer((T + D, B, D, HP), gates_x, fill)
    for slot in (0, T + 1)[:D]:
        states[slot, ..., :H] = launch.never_the_sentinel(h0.transpose(0, 1).to(dtype))
        states[slot, ..., H:] = 0
    gated = gates_x
    if exchanges and not reset_after:
        gated = launch.exchange_buffer((T, B, D, HP), gates_x, fill)
    gates_h = gates_x
    if save_gates:
        gates_h = torch.empty_like(gates_x, memory_format=torch.contiguous_format)

    arguments: dict[str, Any] = {
        "gates_x": gates_x.contiguous(),
        "weight": launch.padded_weight(weight_hh, HP, dtype),
        "bias": gates_x if bias_hh is None else bias_hh.to(dtype).contiguous(),
        "states": states,
        "gated": gated,
        "gates_h": gates_h,
        "lengths": launch.lengths_argument(lengths, gates_x),
        "resets": launch.resets_argument(resets, gates_x),
        "steps": T,
        "batch": B,
        "hidden": H,
        "padded": HP,
    }
    options = {
        "DIRECTIONS": D,
        "RESET_AFTER": reset_after,
        "HAS_BIAS": bias_hh is not None,
        "HAS_LENGTHS": lengths is not None,
        "HAS_RESETS": resets is not None,
        "SAVE_GATES": save_gates,
    }
    if plan.kernel == GLUON:
        # Not every Triton has this Gluon.
        from triton_gru.kernels import gluon_constants, gluon_forward

        kernel: Any = gluon_forward.scan_forward_gluon_kernel
        arguments["weight"] = launch.aligned(arguments["weight"])
        planned = gluon_constants.launches(plan, gates_x, polls, options)
    else:
        kernel = scan_forward_kernel
        arguments |= options | {"PRECISION": precision}
        planned = launch.launches(plan, gates_x.device, polls)
    with launch.launching(plan, gates_x.device):
        for grid, settings in planned:
            kernel[grid](**arguments, **settings)
    y = states[1 : T + 1, ..., :H]
    return (y, gates_h) if save_gates else y
