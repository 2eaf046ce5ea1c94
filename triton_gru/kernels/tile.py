"""Which elements a program owns, how it holds weights, and its matrix product. Shared by the scans.

A program owns BLOCK_M batch rows x BLOCK_N columns of the state. Its product sums over K columns,
in K_BLOCKS chunks of BLOCK_K. With SPLIT_K > 1 a chunk is held as [SPLIT_K, ., BLOCK_K / SPLIT_K]:
one slice of K for each warp. A tile of 16 rows and 16 or 32 columns is too small to divide among
4 or 8 warps (they would repeat each other's work and each read the whole vector from shared
memory: 288 against 36 matrix instructions per warp at H = 768, 16 columns), but K is long. One
reduction over the warps adds the partial sums.

No integer narrower than 32 bits may reach an operand of `tl.dot`, not even in a mask or a condition
of `tl.where`: `load_flags` below explains why, and reads masks from memory.
"""

import triton
import triton.language as tl

from triton_gru.kernels.exchange import unpack


@triton.jit
def owned(row0, col0, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_K: tl.constexpr):
    """Row and column of each element a program owns.

    One dimension when warps split K: the sum over warps is then laid out one element per thread
    instead of repeated in every warp, which avoids 7/8 of the exponentials.
    """
    if SPLIT_K > 1:
        e = tl.arange(0, BLOCK_M * BLOCK_N)
        row = row0 + e // BLOCK_N
        col = col0 + e % BLOCK_N
    else:
        row = row0 + tl.arange(0, BLOCK_M)[:, None] + tl.zeros([1, BLOCK_N], tl.int32)
        col = col0 + tl.arange(0, BLOCK_N)[None, :] + tl.zeros([BLOCK_M, 1], tl.int32)
    return row, col


@triton.jit
def chunk_rows(row0, BLOCK_M: tl.constexpr):
    """Batch rows along a chunk of the exchanged vector, [BLOCK_M, 1]."""
    return row0 + tl.arange(0, BLOCK_M)[:, None]


@triton.jit
def load_flags(pointers, mask):
    """Where an int32 in memory is not 0, as booleans for a mask or for `tl.where`.

    Triton takes the narrowest load among all that lead to an operand of `tl.dot`, masks and
    conditions included, as the width of the operand's elements. With int8 flags a 16-bit operand
    got kWidth 8, for which 16 columns of K per warp are too few: half of them reached no matrix
    instruction, and the result was silently off by 0.1 to 0.35 (Triton 3.7.1 on sm_80, 90 and
    100; triton#11691 bounds kWidth by K in later versions). The compiler does not follow loads past
    a loop that carries the operand, as a polling loop does; nothing else prevents the fault.
    `benchmarks/static.py` rejects a kernel with this fault.
    """
    tl.static_assert(
        pointers.dtype.scalar.element_ty.primitive_bitwidth >= 32,
        "flags narrower than 32 bits set the width of a matrix operand",
    )
    return tl.load(pointers, mask=mask, other=0) != 0


@triton.jit
def _load_chunk(
    matrix,
    k0,
    col0,
    size,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """A chunk of the weights, [SPLIT_K, WIDTH / SPLIT_K, BLOCK_N] or [WIDTH, BLOCK_N].

    Loaded in two dimensions, so that a thread's registers run over columns before they run over
    the slices of K: the compiler orders shared memory by them and swizzles the second.
    (Loaded in three, and summed by `tl.reduce`, a step at H = 768 took 5128 wavefronts of shared
    memory, where 1480 are possible. Now it takes 1168, the least. `python -m benchmarks.counts`)
    """
    k = k0 + tl.arange(0, WIDTH)[:, None]
    col = col0 + tl.arange(0, BLOCK_N)[None, :]
    tile = tl.load(matrix + col * size + k, mask=(k < size) & (col < size), other=0.0)
    if SPLIT_K > 1:
        tile = tl.reshape(tile, [SPLIT_K, WIDTH // SPLIT_K, BLOCK_N])
    return tile


@triton.jit
def _load_half_chunk(
    matrix,
    k0,
    col0,
    size,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    part: tl.constexpr = WIDTH // SPLIT_K
    k = k0 + tl.arange(0, SPLIT_K)[:, None, None] * part + tl.arange(0, part)[None, :, None]
    col = col0 + tl.arange(0, BLOCK_N)[None, None, :]
    return tl.load(matrix + col * size + k, mask=(k < size) & (col < size), other=0.0)


@triton.jit
def _load_chunk_to_registers(
    matrix,
    k0,
    col0,
    size,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """As `_load_chunk`, in two halves of the columns and three dimensions.

    A half is so small that the compiler lets each warp load its own slice of K. From there to the
    operand of the product no data crosses warps, so it needs no shared memory, and the operand
    stays in registers for all steps.
    """
    half: tl.constexpr = BLOCK_N // 2
    a = _load_half_chunk(matrix, k0, col0, size, half, WIDTH, SPLIT_K)
    b = _load_half_chunk(matrix, k0, col0 + half, size, half, WIDTH, SPLIT_K)
    both = tl.permute(tl.join(a, b), (0, 1, 3, 2))
    return tl.reshape(both, [SPLIT_K, WIDTH // SPLIT_K, BLOCK_N])


@triton.jit
def load_weight(
    matrix,
    col0,
    size,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    K_BLOCKS: tl.constexpr,
    TAIL: tl.constexpr,
    SPLIT_K: tl.constexpr,
    REGISTERS: tl.constexpr,
):
    """A [K, BLOCK_N] slice of one square block of the weights, [column, K], as a tuple of chunks.

    Called before the time loop: the compiler places the tiles in shared memory once, for all
    steps. Chunks, the last one of TAIL, avoid padding K to a power of two
    (768 = 3 x 256, 650 within 5 x 128 + 64). The last REGISTERS chunks stay in registers.
    """
    tiles: "tuple[tl.tensor, ...]" = ()  # noqa: UP037 - Triton evaluates annotations
    # fmt: off
    for i in tl.static_range(K_BLOCKS):
        if i < K_BLOCKS - REGISTERS:
            tiles += (_load_chunk(matrix, i * BLOCK_K, col0, size,
                                  BLOCK_N, TAIL if i == K_BLOCKS - 1 else BLOCK_K, SPLIT_K),)
        else:
            tiles += (_load_chunk_to_registers(
                matrix, i * BLOCK_K, col0, size,
                BLOCK_N, TAIL if i == K_BLOCKS - 1 else BLOCK_K, SPLIT_K),)
    # fmt: on
    return tiles


@triton.jit
def zero_sum(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_K: tl.constexpr):
    """The accumulator that `product` adds to."""
    if SPLIT_K > 1:
        return tl.zeros([SPLIT_K, BLOCK_M, BLOCK_N], tl.float32)
    else:
        return tl.zeros([BLOCK_M, BLOCK_N], tl.float32)


@triton.jit
def _by_slices(x, acc):
    """[BLOCK_M, K] -> [SPLIT_K, BLOCK_M, K / SPLIT_K] where `acc` has that form."""
    if len(acc.shape) == 3:
        split: tl.constexpr = acc.shape[0]
        return tl.permute(tl.reshape(x, [x.shape[0], split, x.shape[1] // split]), (1, 0, 2))
    else:
        return x


@triton.jit
def unpacked(
    acc,
    vector,
    FIRST: tl.constexpr,
    K_BLOCKS: tl.constexpr,
    DTYPE: tl.constexpr,
    STAGE_ALL: tl.constexpr,
):
    """The chunks of a received vector from FIRST on, as elements if STAGE_ALL, else as words.

    A chunk goes through shared memory into the matrix units as soon as it is unpacked. All at once
    needs fewer barriers; one by one, in the products below, less shared memory.
    """
    chunks: "tuple[tl.tensor, ...]" = ()  # noqa: UP037 - Triton evaluates annotations
    for i in tl.static_range(K_BLOCKS):
        if STAGE_ALL:
            chunks += (_by_slices(unpack(vector[FIRST + i], DTYPE), acc),)
        else:
            chunks += (vector[FIRST + i],)
    return chunks


@triton.jit
def product(
    acc,
    vector,
    weight,
    FIRST: tl.constexpr,
    K_BLOCKS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGE_ALL: tl.constexpr,
):
    """Returns acc + vector @ weight in float32, for the chunks of `vector` from FIRST on."""
    chunks = unpacked(acc, vector, FIRST, K_BLOCKS, DTYPE, STAGE_ALL)
    for i in tl.static_range(K_BLOCKS):
        x = chunks[i] if STAGE_ALL else _by_slices(unpack(chunks[i], DTYPE), acc)
        acc = tl.dot(x, weight[i], acc, input_precision=PRECISION)
    return acc


@triton.jit
def product_two(
    zero,
    vector,
    weight_a,
    weight_b,
    K_BLOCKS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGE_ALL: tl.constexpr,
):
    """The products of one vector with two weights."""
    chunks = unpacked(zero, vector, 0, K_BLOCKS, DTYPE, STAGE_ALL)
    a = zero
    b = zero
    for i in tl.static_range(K_BLOCKS):
        x = chunks[i] if STAGE_ALL else _by_slices(unpack(chunks[i], DTYPE), zero)
        a = tl.dot(x, weight_a[i], a, input_precision=PRECISION)
        b = tl.dot(x, weight_b[i], b, input_precision=PRECISION)
    return a, b


@triton.jit
def product_three(
    zero,
    vector,
    weight_a,
    weight_b,
    weight_c,
    K_BLOCKS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGE_ALL: tl.constexpr,
):
    """The products of one vector with three weights."""
    chunks = unpacked(zero, vector, 0, K_BLOCKS, DTYPE, STAGE_ALL)
    a = zero
    b = zero
    c = zero
    for i in tl.static_range(K_BLOCKS):
        x = chunks[i] if STAGE_ALL else _by_slices(unpack(chunks[i], DTYPE), zero)
        a = tl.dot(x, weight_a[i], a, input_precision=PRECISION)
        b = tl.dot(x, weight_b[i], b, input_precision=PRECISION)
        c = tl.dot(x, weight_c[i], c, input_precision=PRECISION)
    return a, b, c


@triton.jit
def product_own(acc, vector, weight, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """Returns acc + vector @ weight where the program holds all of the vector, as one chunk."""
    return tl.dot(vector.to(DTYPE), weight[0], acc, input_precision=PRECISION)


@triton.jit
def total(
    acc,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One accumulator summed over the warps, in the shape of `owned`.

    The first split moves the data, once, so that a thread has all slices of its elements: for a
    split the compiler finds a layout of shared memory without bank conflicts, for `tl.sum` it does
    not. (Products without matrix units leave accumulators in a layout for which the splits
    spill: 12 to 48 B per step at H = 256 to 768 on sm_90.)
    """
    if SPLIT_K > 1 and PRECISION == "ieee":
        acc = tl.sum(tl.reshape(acc, [SPLIT_K, BLOCK_M * BLOCK_N]), 0)
    elif SPLIT_K > 1:
        elements: tl.constexpr = BLOCK_M * BLOCK_N
        acc = tl.permute(tl.reshape(acc, [SPLIT_K, elements]), (1, 0))
        if SPLIT_K == 8:
            a, b = tl.split(tl.reshape(acc, [elements, 4, 2]))
            acc = a + b
        if SPLIT_K >= 4:
            a, b = tl.split(tl.reshape(acc, [elements, 2, 2]))
            acc = a + b
        a, b = tl.split(acc)
        acc = a + b
    return acc
