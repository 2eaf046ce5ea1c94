"""What the Gluon kernels share: a program's weights, its vector and their product.

K is divided among the warps, in chunks of 64 bytes a warp: 32 columns, in float32 16. A warp polls
its part of the vector straight into the operand of its matrix instructions: vector^T is their right
operand (8 batch rows a tile), the weights are the left one. K is permuted for that, in the vector
and in the weights likewise: the 16 bytes that a lane multiplies lie together. So nothing is staged
in shared memory, and no warp waits for another one before its product.

The weights stay in registers, but the chunks that do not fit, which are in shared memory. Each
warp's partial sums go to shared memory, one barrier, and a thread sums what it owns.

A wait that is given up leaves the sentinel, which is a NaN, among the operands: what depends on it
becomes NaN by itself. The error words are written after the loop.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2


@gluon.jit
def lane_of(k, C: gl.constexpr):
    """Which of the 4 lanes of a row multiplies the k-th of the operands of a matrix instruction.

    Lane l has 2 l + {0, 1, 8, 9, 16, 17, 24, 25} of 32, of 32 bits l + {0, 4, 8, 12} of 16.
    """
    if C.DEPTH == 32:
        return (k >> 1) & 3
    else:
        return k & 3


@gluon.jit
def first_of_vector(k, C: gl.constexpr):
    """Where the 16 bytes begin that its lane reads."""
    return lane_of(k, C) * (C.DEPTH // 4)


@gluon.jit
def as_floats(loaded, C: gl.constexpr):
    """What an assembly loaded; elements of 32 bits leave it as integers."""
    if C.DEPTH == 32:
        return loaded
    else:
        return loaded.to(C.DTYPE, bitcast=True)


@gluon.jit
def load_weights(weight, direction, col0, padded, zeros, C: gl.constexpr):
    """The weights of this program's columns, [warp, column, k of 32] a chunk, of the three gates.

    Args:
        weight: pointer to [D, 3, HP, HP].
        direction: of the layer.
        col0: this program's first column.
        padded: HP.
        zeros: see `vectors`.
        C: `gluon_constants.Constants`, as in every function here.
    """
    warp = gl.arange(0, C.WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, C.LEFT)))[:, None, None]
    col = gl.arange(0, C.COLUMNS, layout=gl.SliceLayout(0, gl.SliceLayout(2, C.LEFT)))
    col = col0 + col[None, :, None]
    k = gl.arange(0, C.DEPTH, layout=gl.SliceLayout(0, gl.SliceLayout(1, C.LEFT)))[None, None, :]
    k = warp * C.DEPTH + first_of_vector(k, C)
    offset = col * padded + k
    block = padded * padded
    own_weight = weight + direction * 3 * block
    w_r = _load_weight(own_weight, offset, k, col, padded, zeros, C)
    w_z = _load_weight(own_weight + block, offset, k, col, padded, zeros, C)
    w_n = _load_weight(own_weight + 2 * block, offset, k, col, padded, zeros, C)
    return w_r, w_z, w_n


@gluon.jit
def _load_weight(matrix, offset, k, col, padded, zeros, C: gl.constexpr):
    """A gate's weights: the last IN_REGISTERS chunks in registers, the others in shared memory."""
    chunks: "tuple[gl.tensor, ...]" = ()  # noqa: UP037 - Triton evaluates annotations
    for i in gl.static_range(gl.constexpr(C.CHUNKS)):
        at = matrix + offset + i * C.CHUNK
        if C.TAIL or C.EDGE:
            at = gl.where((k + i * C.CHUNK < padded) & (col < padded), at, zeros)
        chunk = gl.inline_asm_elementwise(
            C.WEIGHTS, C.WEIGHTS_CONSTRAINTS, [at], dtype=C.LOADED, is_pure=True, pack=C.FRAGMENT
        )
        chunk = as_floats(chunk, C)
        if i < C.CHUNKS - C.IN_REGISTERS:
            chunks += (gl.allocate_shared_memory(C.DTYPE, C.TILE, C.SHARED_WEIGHTS, chunk),)
        else:
            chunks += (chunk,)
    return chunks


@gluon.jit
def vector_tile(row0, batch, direction, C: gl.constexpr):
    """Of the vector as this program reads it, [warp, k of 32, row]: the row, the first of k.

    Rows of both directions of a layer lie alternately. Rows beyond the batch read the tile's first
    row once more.
    """
    warp = gl.arange(0, C.WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, C.RIGHT)))
    k = gl.arange(0, C.DEPTH, layout=gl.SliceLayout(0, gl.SliceLayout(2, C.RIGHT)))[None, :, None]
    k = warp[:, None, None] * C.DEPTH + first_of_vector(k, C)
    row = gl.arange(0, C.ROWS, layout=gl.SliceLayout(0, gl.SliceLayout(1, C.RIGHT)))
    row = row0 + row[None, None, :]
    row = gl.where(row < batch, row, row0)
    return row * C.DIRECTIONS + direction, k


@gluon.jit
def vectors(at, tail, zeros, C: gl.constexpr):
    """The pointers that the assembly reads all chunks by.

    Args:
        at: pointers to the first chunk.
        tail: whether the last chunk's elements are within the row; read if C.TAIL.
        zeros: pointer to as many zeros as the chunks span, of the factors three times as many.
        C: as above.
    """
    pointers: "tuple[gl.tensor, ...]" = ()  # noqa: UP037 - Triton evaluates annotations
    if C.CHUNKS > 1 or not C.TAIL:
        pointers += (at,)
    if C.TAIL:
        pointers += (gl.where(tail, at, zeros),)
    return pointers


@gluon.jit
def start_waiting(polls, C: gl.constexpr):
    """The state of the wait before the first, see `gluon_assembly.poll`."""
    return gl.full([C.WARPS, C.DEPTH, C.ROWS], 0, gl.int32, layout=C.RIGHT) + polls


@gluon.jit
def receive(at, tail, zeros, waiting, step, C: gl.constexpr):
    """Waits for the vector that is exchanged in a slot.

    Args:
        at: pointers to it, in the buffer's slot of this step.
        tail: see `vectors`.
        zeros: see `vectors`.
        waiting: state of the wait, see `gluon_assembly.poll`.
        step: of the time loop.
        C: as above.

    Returns:
        The chunks, a tuple, and the new state of the wait.
    """
    operands = vectors(at, tail, zeros, C) + (waiting, step)  # noqa: RUF005 - not in Triton
    found = gl.inline_asm_elementwise(
        C.POLL, C.POLL_CONSTRAINTS, operands, dtype=C.POLL_TYPES, is_pure=False, pack=C.PACK
    )
    chunks: "tuple[gl.tensor, ...]" = ()  # noqa: UP037 - Triton evaluates annotations
    for i in gl.static_range(gl.constexpr(C.CHUNKS)):
        chunks += (as_floats(found[i], C),)
    return chunks, found[C.CHUNKS]


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
def allocate_sums(COUNT: gl.constexpr, C: gl.constexpr):
    """Shared memory for so many products."""
    parts: "tuple[gl.tensor, ...]" = ()  # noqa: UP037 - Triton evaluates annotations
    for _ in gl.static_range(gl.constexpr(COUNT)):
        parts += (gl.allocate_shared_memory(gl.float32, C.SUM, C.SHARED_SUMS),)
    return parts


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
    bits = value.to(C.BITS, bitcast=True).to(gl.int32)
    operands = [pointers, bits, mask.to(gl.int32)]
    gl.inline_asm_elementwise(
        C.PUBLISH, C.PUBLISH_CONSTRAINTS, operands, dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def report(waiting, error, tile, program, C: gl.constexpr):
    """Writes the error words if a wait was given up; `tile` has the vector's shape."""
    # The first element of each pack: that of the first batch rows and of each lane's first k.
    k = gl.arange(0, C.DEPTH, layout=gl.SliceLayout(0, gl.SliceLayout(2, C.RIGHT)))[None, :, None]
    row = gl.arange(0, C.ROWS, layout=gl.SliceLayout(0, gl.SliceLayout(1, C.RIGHT)))
    late = (waiting < 0) & (k & C.LATER_K == 0) & (row[None, None, :] < 8)
    at = error + tile * 0
    gl.store(at + 1, ~waiting, mask=late)
    gl.store(at, program + 1, mask=late)
