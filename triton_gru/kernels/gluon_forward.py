"""The forward recurrence of a group in Gluon. The parts of a step are in `gluon_tile.py`.

The exchange, the buffers and the results are those of `forward.py`; what differs is the way of the
state into the product, and the sums over the warps.

reset_after=True   one barrier a step: two steps are unrolled, each with sums of its own. An odd
                   number of steps ends with one that stores nothing, but waits for the last state.
reset_after=False  two exchanges and two barriers a step.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from triton_gru.kernels.gates import blend, candidate, sigmoid
from triton_gru.kernels.gluon_tile import (
    allocate_sums,
    load_weights,
    product,
    publish,
    receive,
    report,
    start_waiting,
    total,
    vector_tile,
)


@gluon.jit
def load_gates(gates_x, own_gates, hidden, mask):
    """The gates' input part of one step."""
    at = gates_x + own_gates
    x_r = gl.load(at, mask=mask, other=0.0)
    x_z = gl.load(at + hidden, mask=mask, other=0.0)
    x_n = gl.load(at + 2 * hidden, mask=mask, other=0.0)
    return x_r, x_z, x_n


# The arguments up to first_group are those of forward.scan_forward_kernel; not specialised for the
# same reasons. `zeros` holds as many zeros as a row has columns, rounded up to chunks.
@gluon.jit(do_not_specialize=["steps", "batch", "polls", "first_group"])
def scan_forward_gluon_kernel(
    gates_x,
    weight,
    bias,
    states,
    gated,
    gates_h,
    lengths,
    resets,
    zeros,
    error,
    steps,
    batch,
    hidden,
    padded,
    polls,
    first_group,
    C: gl.constexpr,
):
    """Fills slots 1 .. T of `states`, `gates_h` if SAVE_GATES. Grid: groups * GROUP programs."""
    program = gl.program_id(0)
    group = program // C.GROUP + first_group
    tiles = (batch + C.ROWS - 1) // C.ROWS
    direction = group // tiles
    row0 = (group % tiles) * C.ROWS
    col0 = (program % C.GROUP) * C.COLUMNS

    w_r, w_z, w_n = load_weights(weight, direction, col0, padded, zeros, C)
    tile_row, k = vector_tile(row0, batch, direction, C)
    tile = tile_row * padded + k
    tail = k + (C.CHUNKS - 1) * C.CHUNK < padded
    waiting = start_waiting(polls, C)

    # Elements this program owns, [column, row], and their offsets within one slot or one step.
    col = col0 + gl.arange(0, C.COLUMNS, layout=gl.SliceLayout(1, C.OWN))[:, None]
    row = row0 + gl.arange(0, C.ROWS, layout=gl.SliceLayout(0, C.OWN))[None, :]
    real = (row < batch) & (col < hidden)
    stored = (row < batch) & (col < padded)
    own_row = row * C.DIRECTIONS + direction
    own = own_row * padded + col
    own_gates = own_row * 3 * hidden + col
    slot = (batch * C.DIRECTIONS * padded).to(gl.int64)
    gate_step = (batch * C.DIRECTIONS * 3 * hidden).to(gl.int64)
    reset_step = (batch * C.DIRECTIONS).to(gl.int64)

    time = direction * (steps - 1)
    forwards = 1 - 2 * direction
    h = gl.load(states + direction * (steps + 1) * slot + own, mask=stored, other=0.0)
    h = h.to(gl.float32)
    if C.HAS_LENGTHS:
        length = gl.load(lengths + row, mask=row < batch, other=0)
    b_r = 0.0
    b_z = 0.0
    b_n = 0.0
    if C.HAS_BIAS:
        at = bias + direction * 3 * hidden + col
        b_r = gl.load(at, mask=col < hidden, other=0.0).to(gl.float32)
        b_z = gl.load(at + hidden, mask=col < hidden, other=0.0).to(gl.float32)
        b_n = gl.load(at + 2 * hidden, mask=col < hidden, other=0.0).to(gl.float32)
    x_r, x_z, x_n = load_gates(gates_x + time * gate_step, own_gates, hidden, real)
    if C.HAS_RESETS:
        at = resets + time * reset_step
        from_rows = gl.load(at + tile_row) == 0
        reset = gl.load(at + own_row, mask=row < batch, other=0) != 0

    parts = allocate_sums(3 * C.UNROLLED, C)
    for first in range(0, steps, gl.constexpr(C.UNROLLED)):
        for half in gl.static_range(gl.constexpr(C.UNROLLED)):
            step = first + half
            some = step < steps  # false in the one step too many
            if C.HAS_RESETS:
                zeroed = reset
                if C.HAS_LENGTHS:
                    zeroed = zeroed & (time < length)
                h = gl.where(zeroed, 0.0, h)
            before = time + 2 * direction  # the slot before, in this direction's order
            source = states + before * slot + tile
            if C.HAS_RESETS:
                source = gl.where(from_rows, source, zeros)
            vector, waiting = receive(source, tail, zeros, waiting, step, C)
            parts[3 * half].store(product(w_r, vector, C))
            parts[3 * half + 1].store(product(w_z, vector, C))
            if C.RESET_AFTER:
                parts[3 * half + 2].store(product(w_n, vector, C))
            h_r = total(parts[3 * half], C) + b_r
            h_z = total(parts[3 * half + 1], C) + b_z
            r = sigmoid(x_r.to(gl.float32) + h_r)
            z = sigmoid(x_z.to(gl.float32) + h_z)
            if not C.RESET_AFTER:
                u = gl.where(real, r * h, 0.0)
                here = gated + time * slot
                publish(here + own, u, stored, C)
                vector, waiting = receive(here + tile, tail, zeros, waiting, step, C)
                parts[2].store(product(w_n, vector, C))
            h_n = total(parts[3 * half + 2], C) + b_n
            n = candidate(x_n.to(gl.float32), r, h_n, C.RESET_AFTER)
            # Columns beyond H stay 0: an infinite h makes them NaN (forward.py).
            new = gl.where(real, blend(z, n, h), 0.0)
            if C.HAS_LENGTHS:
                new = gl.where(time < length, new, h)
            h = new
            publish(states + (time + 1) * slot + own, h, stored & some, C)
            if C.SAVE_GATES:
                at = gates_h + time * gate_step + own_gates
                gl.store(at, h_r.to(C.DTYPE), mask=real & some)
                gl.store(at + hidden, h_z.to(C.DTYPE), mask=real & some)
                gl.store(at + 2 * hidden, h_n.to(C.DTYPE), mask=real & some)

            # Loads what the next step needs during the exchange.
            time += forwards
            ahead = step + 1 < steps
            x_r, x_z, x_n = load_gates(gates_x + time * gate_step, own_gates, hidden, real & ahead)
            if C.HAS_RESETS:
                at = resets + time * reset_step
                from_rows = gl.load(at + tile_row, mask=ahead, other=0) == 0
                reset = gl.load(at + own_row, mask=(row < batch) & ahead, other=0) != 0

    report(waiting, error, tile, program, C)
