"""The reverse recurrence over all time steps, W_hh resident on chip.

As in `scan_forward.py` a program owns the same columns of the state at every step: here of dh. It
turns them into the gradients of its gates on its own, but dh of the step before needs the
gradients of all gates, 3H a row, against its columns of W_hh. So those are what is exchanged, and
the buffers that carry them are results: `d_gates` (by gates_x) and, with `reset_after`, where the
hidden part of n has a gradient of its own, `d_c`.

reset_after=True   one exchange a step: da_r, da_z, dc.
reset_after=False  two: da_n (and da_z), from which du = da_n W_hn; then da_r = du h r (1 - r).
"""

import triton
import triton.language as tl

from triton_gru.kernels.cell import candidate, reset_gradient, sigmoid, update_gradients
from triton_gru.kernels.exchange import announce, publish, receive, report
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
    """What a step needs and no other program makes: dy, the state before, both parts of a."""
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
# compiles anew for 1 and for multiples of 16; batches and steps come in all sizes.
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
    d_reset_rows,  # [D, B, H] float32, result if RESET_TO_ROW
    lengths,  # [B] int32; read if HAS_LENGTHS
    resets,  # [T, B, D] int32; read if HAS_RESETS
    reset_rows,  # [D, B, H]; read if RESET_TO_ROW
    counters,  # int32, 32 apart, one a group; used under COUNTER
    error,  # int32[2]
    steps,  # T
    batch,  # B
    hidden,  # H
    padded,  # HP
    y_row,  # elements from one row of y to the next
    polls,  # how many repeated looks a wait may cost
    first_group,  # number of the launch's first group
    DIRECTIONS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    TAIL: tl.constexpr,
    SPLIT: tl.constexpr,
    REGISTERS: tl.constexpr,
    GROUP: tl.constexpr,
    STAGE_ALL: tl.constexpr,
    BY_BLOCK: tl.constexpr,
    RESET_AFTER: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_RESETS: tl.constexpr,
    RESET_TO_ROW: tl.constexpr,
    PROTOCOL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Fills `d_gates`, `d_c`, `dh0` and `d_reset_rows`. Grid: groups * GROUP programs."""
    DTYPE: tl.constexpr = d_gates.dtype.element_ty
    WORD: tl.constexpr = 32 // DTYPE.primitive_bitwidth
    program = tl.program_id(0)
    member = program % GROUP
    group = program // GROUP + first_group
    tiles = tl.cdiv(batch, ROWS)
    direction = group // tiles
    row0 = (group % tiles) * ROWS
    col0 = member * COLS
    counter = counters + group * 32

    # Weights: K is the gate's unit, contiguous as the blocks come transposed; the column is the
    # state's.
    square = padded * padded
    own_weight = weight + direction * 3 * square
    # fmt: off
    w_r = load_weight(own_weight, col0, padded,
                      COLS, CHUNK, CHUNKS, TAIL, SPLIT, REGISTERS)
    w_z = load_weight(own_weight + square, col0, padded,
                      COLS, CHUNK, CHUNKS, TAIL, SPLIT, REGISTERS)
    w_n = load_weight(own_weight + 2 * square, col0, padded,
                      COLS, CHUNK, CHUNKS, TAIL, SPLIT, REGISTERS)
    # fmt: on

    row, col = owned(row0, col0, ROWS, COLS, SPLIT)
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
    y_slot = (batch * DIRECTIONS * y_row).to(tl.int64)
    out_slot = (batch * DIRECTIONS * padded).to(tl.int64)

    tile_row = chunk_rows(row0, ROWS, SPLIT)
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
    if HAS_RESETS:
        anew = tl.zeros_like(carry)
        d_anew = tl.zeros_like(carry)
        if RESET_TO_ROW:
            anew = tl.load(reset_rows + own_h0, mask=real, other=0.0).to(tl.float32)
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
            at = resets + (time * batch + row) * DIRECTIONS + direction
            reset = load_flags(at, row < batch)
            if HAS_LENGTHS:
                reset = reset & (time < length)
            h = tl.where(reset, anew, h)
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

        # What the group needs, and this program's result in the same stores.
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
        zero = zero_sum(ROWS, COLS, SPLIT)
        if not RESET_AFTER:
            if GROUP > 1:
                announce(counter, PROTOCOL)
                base = out + 2 * padded
                # fmt: off
                vector, late = receive(
                    base, tile, 0, base, tile, here, words,
                    counter, GROUP * (2 * done + 1), tl.where(failed != 0, 0, polls),
                    1, 0, CHUNK // WORD, CHUNKS, TAIL // WORD, SPLIT, WORD, PROTOCOL,
                )
                # fmt: on
                report(error, late, program, step)
                failed = failed | late
                acc = product(zero, vector, w_n, 0, CHUNKS, DTYPE, PRECISION, STAGE_ALL)
            else:
                acc = product_own(zero, da_n, w_n, DTYPE, PRECISION)
            du = tl.where(real, total(acc, ROWS, COLS, SPLIT), 0.0)
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
                # One gate after the other: a third of the registers, two more trips to L2.
                part, late = receive(
                    out, tile, 0, out, tile, here, words, counter, target, spent,
                    1, 0, CHUNK // WORD, CHUNKS, TAIL // WORD, SPLIT, WORD, PROTOCOL,
                )
                acc = product(zero, part, w_r, 0, CHUNKS, DTYPE, PRECISION, STAGE_ALL)
                base = out + padded
                part, later = receive(
                    base, tile, 0, base, tile, here, words, counter, target, spent,
                    1, 0, CHUNK // WORD, CHUNKS, TAIL // WORD, SPLIT, WORD, PROTOCOL,
                )
                acc = product(acc, part, w_z, 0, CHUNKS, DTYPE, PRECISION, STAGE_ALL)
                late = late | later
                if RESET_AFTER:
                    part, later = receive(
                        out_c, tile_c, 0, out_c, tile_c, here, words, counter, target, spent,
                        1, 0, CHUNK // WORD, CHUNKS, TAIL // WORD, SPLIT, WORD, PROTOCOL,
                    )
                    acc = product(acc, part, w_n, 0, CHUNKS, DTYPE, PRECISION, STAGE_ALL)
                    late = late | later
            else:
                vector, late = receive(
                    out, tile, words, out_c, tile_c, here, words, counter, target, spent,
                    2, 1 if RESET_AFTER else 0,
                    CHUNK // WORD, CHUNKS, TAIL // WORD, SPLIT, WORD, PROTOCOL,
                )
                acc = product(zero, vector, w_r, 0, CHUNKS, DTYPE, PRECISION, STAGE_ALL)
                acc = product(acc, vector, w_z, CHUNKS, CHUNKS, DTYPE, PRECISION, STAGE_ALL)
                if RESET_AFTER:
                    acc = product(acc, vector, w_n, 2 * CHUNKS, CHUNKS, DTYPE, PRECISION, STAGE_ALL)
            # fmt: on
            report(error, late, program, step)
            failed = failed | late
        else:
            acc = product_own(zero, da_r, w_r, DTYPE, PRECISION)
            acc = product_own(acc, da_z, w_z, DTYPE, PRECISION)
            if RESET_AFTER:
                acc = product_own(acc, d_hidden_n, w_n, DTYPE, PRECISION)
        # Columns beyond H stay 0, as in the forward: infinity times their weights is NaN.
        new = tl.where(real, before + total(acc, ROWS, COLS, SPLIT), 0.0)
        if GROUP > 1:
            new = tl.where(failed != 0, float("nan"), new)
        if HAS_LENGTHS:
            new = tl.where(active, new, dh)  # past its end a row's state is a copy
        if HAS_RESETS:
            d_anew += tl.where(reset, new, 0.0)
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
    if HAS_RESETS and RESET_TO_ROW:
        tl.store(d_reset_rows + own_h0, d_anew, mask=real)
