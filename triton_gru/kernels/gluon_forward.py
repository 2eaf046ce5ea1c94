"""The forward recurrence of a group in Gluon, 16-bit: kernel, and what a launch passes to it.

The exchange, the buffers and the results are those of `forward.py`; what differs is the way of the
state into the product, and the sums over the warps:

* K is divided among the warps, in chunks of 32 columns a warp. A warp polls its part of the state
  straight into the operand of its matrix instructions (state^T is their right operand: 8 batch
  rows a tile; the weights are the left one). K is permuted for that, the weights likewise: the 8
  elements of 32 that a lane multiplies are 16 bytes that lie together. So nothing is staged in
  shared memory, and no warp waits for another one before its product.
* The weights stay in registers, but the chunks that do not fit, which are in shared memory.
* Each warp's partial sums go to shared memory, one barrier, and a thread sums what it owns.

reset_after=True   one barrier a step: two steps are unrolled, each with sums of its own. An odd
                   number of steps ends with one that stores nothing, but waits for the last state.
reset_after=False  two exchanges and two barriers a step.

A wait that is given up leaves the sentinel, which is a NaN, among the operands: what depends on it
becomes NaN by itself. The error words are written after the loop.
"""

from collections.abc import Iterator
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from triton_gru.kernel_errors import error_words
from triton_gru.kernels import launch
from triton_gru.kernels.gates import blend, candidate, sigmoid
from triton_gru.kernels.gluon_constants import constants
from triton_gru.plan.plan import Plan


@gluon.jit
def first_of_vector(k):
    """Where the 16 bytes begin of which the k-th of 32 operands of a matrix instruction is one.

    Lane l multiplies the operands k of 2 (l % 4) + {0, 1, 8, 9, 16, 17, 24, 25}.
    """
    return 8 * ((k >> 1) & 3)


@gluon.jit
def receive(slot, offset, tail, zeros, from_rows, waiting, step, C: gl.constexpr):
    """Waits for the vector that is exchanged in a slot.

    Args:
        slot: pointer to the buffer's slot of this step.
        offset: of the first chunk's vectors.
        tail: whether the last chunk's elements are within the row; read if C.TAIL.
        zeros: pointer to as many zeros as a row has.
        from_rows: whether to read the row and not zeros; read if C.HAS_RESETS.
        waiting: state of the wait, see `gluon_assembly.poll`.
        step: of the time loop.
        C: `gluon_constants.Constants`, as in every function here.

    Returns:
        The chunks, a tuple, and the new state of the wait.
    """
    at = slot + offset
    if C.HAS_RESETS:
        at = gl.where(from_rows, at, zeros)
    pointers: "tuple[gl.tensor, ...]" = ()  # noqa: UP037 - Triton evaluates annotations
    if C.CHUNKS > 1 or not C.TAIL:
        pointers += (at,)
    if C.TAIL:
        pointers += (gl.where(tail, at, zeros),)
    pointers += (waiting, step)
    found = gl.inline_asm_elementwise(
        C.POLL, C.POLL_CONSTRAINTS, pointers, dtype=C.POLL_TYPES, is_pure=False, pack=C.ROWS
    )
    return found[: C.CHUNKS], found[C.CHUNKS]


@gluon.jit
def load_weight(matrix, offset, k, col, padded, zeros, C: gl.constexpr):
    """A gate's weights: the last IN_REGISTERS chunks in registers, the others in shared memory."""
    chunks: "tuple[gl.tensor, ...]" = ()  # noqa: UP037 - Triton evaluates annotations
    for i in gl.static_range(gl.constexpr(C.CHUNKS)):
        at = matrix + offset + i * C.CHUNK
        if C.TAIL or C.EDGE:
            at = gl.where((k + i * C.CHUNK < padded) & (col < padded), at, zeros)
        chunk = gl.inline_asm_elementwise(
            C.WEIGHTS, C.WEIGHTS_CONSTRAINTS, [at], dtype=C.DTYPE, is_pure=True, pack=16
        )
        if i < C.CHUNKS - C.IN_REGISTERS:
            chunks += (gl.allocate_shared_memory(C.DTYPE, C.TILE, C.SHARED_WEIGHTS, chunk),)
        else:
            chunks += (chunk,)
    return chunks


@gluon.jit
def product(weight, vector, C: gl.constexpr):
    """Each warp's part of weight @ vector^T."""
    acc = gl.full(C.SUM, 0.0, gl.float32, layout=C.SUMS)
    for i in gl.static_range(gl.constexpr(C.CHUNKS)):
        if i < C.CHUNKS - C.IN_REGISTERS:
            acc = mma_v2(weight[i].load(C.LEFT), vector[i], acc)
        else:
            acc = mma_v2(weight[i], vector[i], acc)
    return acc


@gluon.jit
def total(parts, C: gl.constexpr):
    """The sum over the warps of what `product` put into shared memory."""
    return gl.sum(parts.load(C.PARTS), 0)


@gluon.jit
def publish(pointers, value, mask, C: gl.constexpr):
    """Stores this program's part of a vector; NaN as the positive one, never as the sentinel."""
    value = value.to(C.DTYPE)
    nan = gl.full(value.shape, float("nan"), C.DTYPE, layout=value.type.layout)
    value = gl.where(value == value, value, nan)
    bits = value.to(gl.int16, bitcast=True).to(gl.int32)
    operands = [pointers, bits, mask.to(gl.int32)]
    gl.inline_asm_elementwise(
        C.PUBLISH, C.PUBLISH_CONSTRAINTS, operands, dtype=gl.int32, is_pure=False, pack=1
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

    # Weights, [warp, column, k of 32].
    warp = gl.arange(0, C.WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, C.LEFT)))[:, None, None]
    col = gl.arange(0, C.COLUMNS, layout=gl.SliceLayout(0, gl.SliceLayout(2, C.LEFT)))
    col = col0 + col[None, :, None]
    k = gl.arange(0, C.DEPTH, layout=gl.SliceLayout(0, gl.SliceLayout(1, C.LEFT)))[None, None, :]
    k = warp * C.DEPTH + first_of_vector(k)
    offset = col * padded + k
    block = padded * padded
    own_weight = weight + direction * 3 * block
    w_r = load_weight(own_weight, offset, k, col, padded, zeros, C)
    w_z = load_weight(own_weight + block, offset, k, col, padded, zeros, C)
    w_n = load_weight(own_weight + 2 * block, offset, k, col, padded, zeros, C)

    # The vector, [warp, k of 32, row]. Rows beyond the batch read the tile's first row once more.
    warp = gl.arange(0, C.WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, C.RIGHT)))
    k = gl.arange(0, C.DEPTH, layout=gl.SliceLayout(0, gl.SliceLayout(2, C.RIGHT)))[None, :, None]
    k = warp[:, None, None] * C.DEPTH + first_of_vector(k)
    tile_row = gl.arange(0, C.ROWS, layout=gl.SliceLayout(0, gl.SliceLayout(1, C.RIGHT)))
    tile_row = row0 + tile_row[None, None, :]
    tile_row = gl.where(tile_row < batch, tile_row, row0)
    tile_row = tile_row * C.DIRECTIONS + direction
    tile = tile_row * padded + k
    tail = k + (C.CHUNKS - 1) * C.CHUNK < padded
    waiting = gl.full([C.WARPS, C.DEPTH, C.ROWS], 0, gl.int32, layout=C.RIGHT) + polls

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
    from_rows = True
    if C.HAS_RESETS:
        at = resets + time * reset_step
        from_rows = gl.load(at + tile_row) == 0
        reset = gl.load(at + own_row, mask=row < batch, other=0) != 0

    parts: "tuple[gl.tensor, ...]" = ()  # noqa: UP037 - Triton evaluates annotations
    for _ in gl.static_range(gl.constexpr(3 * C.UNROLLED)):
        parts += (gl.allocate_shared_memory(gl.float32, C.SUM, C.SHARED_SUMS),)

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
            vector, waiting = receive(
                states + before * slot, tile, tail, zeros, from_rows, waiting, step, C
            )
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
                vector, waiting = receive(here, tile, tail, zeros, True, waiting, step, C)
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

    # The first element of each pack: that of the first batch rows and of both halves' first k.
    k = gl.arange(0, C.DEPTH, layout=gl.SliceLayout(0, gl.SliceLayout(2, C.RIGHT)))[None, :, None]
    tile_row = gl.arange(0, C.ROWS, layout=gl.SliceLayout(0, gl.SliceLayout(1, C.RIGHT)))
    late = (waiting < 0) & (k & 25 == 0) & (tile_row[None, None, :] < 8)
    at = error + tile * 0
    gl.store(at + 1, ~waiting, mask=late)
    gl.store(at, program + 1, mask=late)


def launches(
    plan: Plan, like: torch.Tensor, polls: int, options: dict[str, Any]
) -> Iterator[tuple[tuple[int], dict[str, object]]]:
    """As `launch.launches`, for this kernel; `like` has the dtype and the device."""
    arguments = {
        "zeros": like.new_zeros(plan.block_k * plan.k_blocks),
        "error": error_words(like.device),
        "polls": polls,
        "C": constants(plan, like.dtype, **options),
    }
    for grid, settings in launch.grids(plan):
        yield grid, {**arguments, **settings}
