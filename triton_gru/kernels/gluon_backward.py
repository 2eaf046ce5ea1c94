"""The reverse recurrence of a group in Gluon. The parts of a step are in `gluon_tile.py`.

`backward.py` exchanges the gradients of all gates, 3H per row. Here dh is exchanged, H per row;
each program multiplies it by the factors of `factors.py` itself, in the registers that are the
operand. So what lies between the arrival of a vector and the next is the product and a sum.

dh of time t is in slot t + 1 of its buffer; the gradient by h0 is in the slot beyond, as h0 is in
the forward. dh is rounded in the exchange, and once more times a factor; a program's own dh and z
stay in float32: with 16 bits a z of .998 would be 1, or .996 (bfloat16), at every step.

reset_after=True   one barrier a step: two steps are unrolled, as in `gluon_forward.py`.
reset_after=False  two exchanges, dh and du, and two barriers a step.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from triton_gru.kernels import launch
from triton_gru.kernels.factors import factors, gates_gradients
from triton_gru.kernels.gates import sigmoid
from triton_gru.kernels.gluon_constants import launches
from triton_gru.kernels.gluon_tile import (
    allocate_sums,
    as_floats,
    load_weights,
    product,
    publish,
    receive,
    report,
    start_waiting,
    total,
    vector_tile,
    vectors,
)
from triton_gru.plan.plan import Plan


@gluon.jit
def load_factors(at, tail, zeros, C: gl.constexpr):
    """The three planes' chunks, a tuple; operands as of `gluon_tile.vectors`."""
    pointers = vectors(at, tail, zeros, C)
    found = gl.inline_asm_elementwise(
        C.FACTORS, C.FACTORS_CONSTRAINTS, pointers, dtype=C.FACTOR_TYPES, is_pure=False, pack=C.PACK
    )
    chunks: "tuple[gl.tensor, ...]" = ()  # noqa: UP037 - Triton evaluates annotations
    for i in gl.static_range(gl.constexpr(3 * C.CHUNKS)):
        chunks += (as_floats(found[i], C),)
    return chunks


@gluon.jit
def times(vector, by, C: gl.constexpr):
    """A vector times one plane of factors, both tuples of chunks."""
    found: "tuple[gl.tensor, ...]" = ()  # noqa: UP037 - Triton evaluates annotations
    for i in gl.static_range(gl.constexpr(C.CHUNKS)):
        if C.DEPTH == 32:
            pair = [vector[i], by[i]]
            found += (
                gl.inline_asm_elementwise(
                    C.TIMES, C.TIMES_CONSTRAINTS, pair, dtype=C.DTYPE, is_pure=True, pack=C.PACK
                ),
            )
        else:
            found += (vector[i] * by[i],)
    return found


@gluon.jit
def load_sigmoid(gates_x, gates_h, at, mask):
    """A gate of the elements that this program owns."""
    x = gl.load(gates_x + at, mask=mask, other=0.0).to(gl.float32)
    return sigmoid(x + gl.load(gates_h + at, mask=mask, other=0.0).to(gl.float32))


# Not specialised for the reasons of forward.scan_forward_kernel.
@gluon.jit(do_not_specialize=["steps", "batch", "polls", "first_group"])
def scan_backward_gluon_kernel(
    dy,  # [T, B, D, H]
    gates_x,  # [T, B, D, 3H]
    gates_h,  # [T, B, D, 3H]
    by_gates,  # [T, B, D, 3, HP], the factors
    weight,  # [D, 3, HP, HP], zero beyond H; by the state's column, then the gate's unit
    dh,  # [T + D, B, D, HP], result and exchange
    du,  # [T, B, D, HP], result and exchange; used if not RESET_AFTER
    dh0,  # [D, B, H] float32, result
    lengths,  # [B] int32; read if HAS_LENGTHS
    resets,  # [T, B, D] int32; read if HAS_RESETS
    zeros,  # as many as the chunks of the three planes have elements
    error,  # int32[2]
    steps,  # T
    batch,  # B
    hidden,  # H
    padded,  # HP
    polls,  # looks after the first after which a wait is given up
    first_group,  # number of the launch's first group
    C: gl.constexpr,
):
    """Fills `dh` but the first slot of a direction, `du`, and `dh0`. Grid: as in the forward."""
    program = gl.program_id(0)
    group = program // C.GROUP + first_group
    tiles = (batch + C.ROWS - 1) // C.ROWS
    direction = group // tiles
    row0 = (group % tiles) * C.ROWS
    col0 = (program % C.GROUP) * C.COLUMNS

    w_r, w_z, w_n = load_weights(weight, direction, col0, padded, zeros, C)
    tile_row, k = vector_tile(row0, batch, direction, C)
    tile = tile_row * padded + k
    tile_by_gates = tile_row * 3 * padded + k
    tail = k + (C.CHUNKS - 1) * C.CHUNK < padded
    waiting = start_waiting(polls, C)

    # Elements this program owns, [column, row], and their offsets within one slot or one step.
    col = col0 + gl.arange(0, C.COLUMNS, layout=gl.SliceLayout(1, C.OWN))[:, None]
    row = row0 + gl.arange(0, C.ROWS, layout=gl.SliceLayout(0, C.OWN))[None, :]
    real = (row < batch) & (col < hidden)
    stored = (row < batch) & (col < padded)
    own_row = row * C.DIRECTIONS + direction
    own = own_row * padded + col
    own_dy = own_row * hidden + col
    own_gates = own_row * 3 * hidden + col
    slot = (batch * C.DIRECTIONS * padded).to(gl.int64)
    dy_step = (batch * C.DIRECTIONS * hidden).to(gl.int64)
    reset_step = (batch * C.DIRECTIONS).to(gl.int64)

    forwards = 1 - 2 * direction
    time = (1 - direction) * (steps - 1)
    carry = gl.load(dy + time * dy_step + own_dy, mask=real, other=0.0).to(gl.float32)
    if C.HAS_LENGTHS:
        length = gl.load(lengths + row, mask=row < batch, other=0)

    parts = allocate_sums(2, C)
    for first in range(0, steps, gl.constexpr(C.UNROLLED)):
        for half in gl.static_range(gl.constexpr(C.UNROLLED)):
            step = first + half
            some = step < steps  # false in the one step too many
            here = gl.where(some, time, 0)  # which reads what is there

            # Loads what no other program makes during the exchange.
            by = load_factors(by_gates + here * 3 * slot + tile_by_gates, tail, zeros, C)
            dy_next = gl.load(
                dy + (time - forwards) * dy_step + own_dy,
                mask=real & (step + 1 < steps),
                other=0.0,
            )
            at = here * 3 * dy_step + own_gates
            z = load_sigmoid(gates_x, gates_h, at + hidden, real)
            if not C.RESET_AFTER:
                r = load_sigmoid(gates_x, gates_h, at, real)
            if C.HAS_RESETS:
                at = resets + here * reset_step + own_row
                reset = gl.load(at, mask=row < batch, other=0) != 0

            vector, waiting = receive(dh + (time + 1) * slot + tile, tail, zeros, waiting, step, C)
            by_z = times(vector, by[C.CHUNKS : 2 * C.CHUNKS], C)
            by_n = times(vector, by[2 * C.CHUNKS :], C)
            if C.RESET_AFTER:
                by_r = times(vector, by[: C.CHUNKS], C)
                acc = product(w_r, by_r, C) + product(w_z, by_z, C) + product(w_n, by_n, C)
                parts[half].store(acc)
                new = carry * z + total(parts[half], C)
            else:
                parts[0].store(product(w_n, by_n, C))
                by_u = gl.where(real, total(parts[0], C), 0.0)
                here_u = du + time * slot
                publish(here_u + own, by_u, stored, C)
                acc = product(w_z, by_z, C)
                vector, waiting = receive(here_u + tile, tail, zeros, waiting, step, C)
                acc += product(w_r, times(vector, by[: C.CHUNKS], C), C)
                parts[1].store(acc)
                new = carry * z + by_u * r + total(parts[1], C)
            # Columns beyond H stay 0: infinity times their weights is NaN (backward.py).
            new = gl.where(real, new, 0.0)
            if C.HAS_LENGTHS:
                active = time < length
                new = gl.where(active, new, carry)  # past its end a row's state is a copy
            if C.HAS_RESETS:
                if C.HAS_LENGTHS:
                    reset = reset & active
                new = gl.where(reset, 0.0, new)
            carry = gl.where(some, dy_next.to(gl.float32) + new, carry)
            publish(dh + (time + 1 - forwards) * slot + own, carry, stored & some, C)
            time -= forwards

    gl.store(dh0 + (direction * batch + row) * hidden + col, carry, mask=real)
    report(waiting, error, tile, program, C)


def gradients(
    dy: Tensor,
    gates_x: Tensor,
    gates_h: Tensor,
    before: list[Tensor],
    transposed: Tensor,
    *,
    reset_after: bool,
    lengths: Tensor | None,
    resets: Tensor | None,
    plan: Plan,
    polls: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Factors, scan and the gates' gradients.

    Args:
        dy: [T, B, D, H], contiguous, of float32 or of the dtype of gates_x.
        gates_x: As in `factors.factors`, likewise the following up to before.
        gates_h: As there.
        before: As there.
        transposed: [D, 3, HP, HP], as the kernel reads it.
        reset_after: The variant.
        lengths: [B] or None.
        resets: [T, B, D] or None.
        plan: Of this kernel.
        polls: Looks after which a wait is given up.

    Returns:
        The derivatives by gates_x [T, B, D, 3, H], by the hidden part of n [T, B, D, H] and by h0.
    """
    T, B, D, H = dy.shape
    HP, dtype = transposed.shape[-1], gates_x.dtype
    dh = launch.exchange_buffer((T + D, B, D, HP), gates_x, True)
    for d, slot in enumerate((T, 1)[:D]):
        last = dy[slot - 1, :, d].to(dtype)
        dh[slot, :, d, :H] = launch.never_the_sentinel(last)
        dh[slot, :, d, H:] = 0
    du = gates_x
    if not reset_after:
        du = launch.exchange_buffer((T, B, D, HP), gates_x, True)
    dh0 = torch.empty((D, B, H), dtype=torch.float32, device=dy.device)
    options = {
        "DIRECTIONS": D,
        "RESET_AFTER": reset_after,
        "HAS_LENGTHS": lengths is not None,
        "HAS_RESETS": resets is not None,
    }
    with launch.launching(plan, dy.device):
        by_gates = factors(gates_x, gates_h, before, HP, reset_after)
        arguments = {
            "dy": dy,
            "gates_x": gates_x,
            "gates_h": gates_h,
            "by_gates": by_gates,
            "weight": launch.aligned(transposed),
            "dh": dh,
            "du": du,
            "dh0": dh0,
            "lengths": launch.lengths_argument(lengths, gates_x),
            "resets": launch.resets_argument(resets, gates_x),
            "steps": T,
            "batch": B,
            "hidden": H,
            "padded": HP,
        }
        for grid, settings in launches(plan, gates_x, polls, options):
            scan_backward_gluon_kernel[grid](**arguments, **settings)
        del arguments, by_gates
        by_time = dh[1 : T + 1]
        d_gates, d_c = gates_gradients(gates_x, gates_h, before, by_time, du, lengths, reset_after)
    return d_gates, d_c, dh0
