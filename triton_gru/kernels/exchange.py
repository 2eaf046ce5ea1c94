"""How the programs of a group exchange a vector at every step. One interface, two protocols.

SENTINEL  Before the launch every slot of the buffer holds a bit pattern that arithmetic never
          yields: all ones, a negative quiet NaN. A reader loads its tile, volatile, until no
          element holds the pattern. Each element is its own flag: no counter, no fence, and no
          reuse hazard, because each slot is written once in a launch. `publish` stores NaN
          results as the positive canonical NaN, so a diverged run ends in NaN, never in a wait.
COUNTER   The writer stores, then adds 1 to its group's counter with release; a reader polls the
          counter, reads it once with acquire, and loads. The counter only grows: event e is
          complete when it reaches GROUP * (e + 1).

Both protocols follow these rules:
* A poll is bounded. After the bound the program sets the error words and no longer waits.
* Nothing relies on reading one's own stores back in program order (triton#10924, triton#9887):
  under SENTINEL an element that has not arrived is read again, whoever wrote it; under COUNTER the
  barrier and the release/acquire pair are between store and load.
* Loads under COUNTER go to L2 (`.cg`): an L1 line may have been filled before its neighbour wrote.
"""

import triton
import triton.language as tl

SENTINEL = tl.constexpr(0)
COUNTER = tl.constexpr(1)


@triton.jit
def as_words(pointer):
    """The same address, read as 32-bit words: two elements of a 16-bit dtype at a time."""
    return pointer.to(tl.pointer_type(tl.int32))


@triton.jit
def unpack(word, DTYPE: tl.constexpr):
    """The elements in a tensor of words; the last axis doubles for a 16-bit dtype."""
    if DTYPE.primitive_bitwidth == 32:
        return word.to(DTYPE, bitcast=True)
    else:
        pair = tl.join(word.to(tl.int16), (word >> 16).to(tl.int16))
        shape: tl.constexpr = word.shape[:-1] + [2 * word.shape[-1]]  # noqa: RUF005
        return tl.reshape(pair, shape).to(DTYPE, bitcast=True)


@triton.jit
def _load(
    base,
    rows,
    block,
    extra,
    extra_rows,
    mask,
    K,
    BLOCKS: tl.constexpr,
    EXTRA: tl.constexpr,
    BLOCK_K: tl.constexpr,
    K_BLOCKS: tl.constexpr,
    TAIL: tl.constexpr,
    PROTOCOL: tl.constexpr,
):
    """Every chunk of every block, as one tuple; volatile under SENTINEL, from L2 under COUNTER.

    The chunks remain words until `product`: unpacking there also prevents the compiler from staging
    all of them in shared memory at once, next to the weights.
    """
    tiles: "tuple[tl.tensor, ...]" = ()  # noqa: UP037 - Triton evaluates annotations
    for i in tl.static_range((BLOCKS + EXTRA) * K_BLOCKS):
        # One tensor of addresses for all chunks of a shape: they differ by a constant.
        k = tl.arange(0, TAIL if i % K_BLOCKS == K_BLOCKS - 1 else BLOCK_K)[None, :]
        if i < BLOCKS * K_BLOCKS:
            at = as_words(base) + (rows + k) + (i // K_BLOCKS) * block + (i % K_BLOCKS) * BLOCK_K
        else:
            at = as_words(extra) + (extra_rows + k) + (i % K_BLOCKS) * BLOCK_K
        inside = mask & (k + (i % K_BLOCKS) * BLOCK_K < K)
        if PROTOCOL == SENTINEL:
            tiles += (tl.load(at, mask=inside, other=0, volatile=True),)
        else:
            tiles += (tl.load(at, mask=inside, other=0, cache_modifier=".cg"),)
    return tiles


@triton.jit
def _lacking(tile, WORD: tl.constexpr):
    """Not 0, in the bits of LACKING, where an element is missing.

    Two 16-bit elements are tested at once: a half of w is all ones if and only if a half of ~w is
    zero, and ~w - 0x00010001 = -0x00010002 - w borrows into the top bit of exactly the lowest such
    half (the top bit being clear in ~w, set in w). Subtract, and, or: one instruction an element.
    """
    if WORD == 2:
        return (-0x00010002 - tile) & tile
    else:
        return tile == -1


@triton.jit
def _flags(lacking, WORD: tl.constexpr):
    """1 if an element, or either of a pair of 16-bit elements, is missing, else 0."""
    if WORD == 2:
        lacking = (lacking & -0x7FFF8000) != 0
    return lacking.to(tl.int32)


@triton.jit
def _any_missing(
    tiles,
    BLOCKS: tl.constexpr,
    K_BLOCKS: tl.constexpr,
    NARROW: tl.constexpr,
    WORD: tl.constexpr,
):
    """Not 0 if any element of any tile is missing; each block's last tile is NARROW times narrower.

    One reduction for all, as it costs barriers: the flags of the wide tiles are folded to the size
    of the narrow ones within each thread, in any order.
    """
    lacking = _lacking(tiles[0], WORD)
    for i in tl.static_range(1, BLOCKS * K_BLOCKS):
        if NARROW == 1 or i % K_BLOCKS < K_BLOCKS - 1:
            lacking = lacking | _lacking(tiles[i], WORD)
    missing = _flags(lacking, WORD)
    if NARROW > 1:
        lacking = _lacking(tiles[K_BLOCKS - 1], WORD)
        for i in tl.static_range(1, BLOCKS):
            lacking = lacking | _lacking(tiles[i * K_BLOCKS + K_BLOCKS - 1], WORD)
        last = _flags(lacking, WORD)
        size: tl.constexpr = last.numel
        missing = tl.max(tl.reshape(missing, [size, NARROW], can_reorder=True), axis=1)
        missing = missing | tl.reshape(last, [size], can_reorder=True)
    return tl.max(missing)


@triton.jit
def receive(
    base,
    rows,
    block,
    extra,
    extra_rows,
    mask,
    K,
    counter,
    target,
    polls,
    BLOCKS: tl.constexpr,
    EXTRA: tl.constexpr,
    BLOCK_K: tl.constexpr,
    K_BLOCKS: tl.constexpr,
    TAIL: tl.constexpr,
    WORD: tl.constexpr,
    PROTOCOL: tl.constexpr,
):
    """Waits for vectors of K words; returns their chunks of words, and 1 if the wait timed out.

    All chunks are loaded before the first is tested, so their latencies overlap. All lengths and
    offsets below are in 32-bit words.

    Args:
        base: pointer to the first block in the slot of this step.
        rows: offset of each row from `base`, of the shape of `tile.chunk_rows`.
        block: distance from one block to the next.
        extra: pointer to one further block, in another buffer; read if EXTRA.
        extra_rows: as `rows`, for `extra`.
        mask: rows to load.
        K: words in a block, beyond which a chunk reads 0.
        counter: this group's counter (COUNTER only).
        target: value the counter must have reached (COUNTER only).
        polls: polls after which the wait times out.
        BLOCKS: blocks at `base`.
        EXTRA: 1 if there is a block at `extra`, else 0.
        BLOCK_K: words per chunk.
        K_BLOCKS: chunks per block.
        TAIL: words in the last chunk of a block.
        WORD: elements per word, 2 for a 16-bit dtype and 1 for float32.
        PROTOCOL: SENTINEL or COUNTER.
    """
    left = polls
    if PROTOCOL == COUNTER:
        seen = tl.load(counter, volatile=True)
        while (seen < target) & (left > 0):
            seen = tl.load(counter, volatile=True)
            left -= 1
        taken = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
        late = ((taken < target) & (seen < target) & (left <= 0)).to(tl.int32)
        tl.debug_barrier()
    # fmt: off
    tiles = _load(base, rows, block, extra, extra_rows, mask, K,
                  BLOCKS, EXTRA, BLOCK_K, K_BLOCKS, TAIL, PROTOCOL)
    if PROTOCOL == SENTINEL:
        missing = _any_missing(tiles, BLOCKS + EXTRA, K_BLOCKS, BLOCK_K // TAIL, WORD)
        while (missing != 0) & (left > 0):
            tiles = _load(base, rows, block, extra, extra_rows, mask, K,
                          BLOCKS, EXTRA, BLOCK_K, K_BLOCKS, TAIL, PROTOCOL)
            missing = _any_missing(tiles, BLOCKS + EXTRA, K_BLOCKS, BLOCK_K // TAIL, WORD)
            left -= 1
        late = ((missing != 0) & (left <= 0)).to(tl.int32)
    # fmt: on
    return tiles, late


@triton.jit
def publish(pointers, value, mask, PROTOCOL: tl.constexpr):
    """Stores this program's part of a vector. Under COUNTER, `announce` must follow."""
    value = value.to(pointers.dtype.element_ty)
    if PROTOCOL == SENTINEL:
        if value.dtype.primitive_bitwidth == 32:
            nan = tl.full(value.shape, 0x7FC00000, tl.int32).to(value.dtype, bitcast=True)
        elif value.dtype == tl.bfloat16:
            nan = tl.full(value.shape, 0x7FC0, tl.int16).to(value.dtype, bitcast=True)
        else:
            nan = tl.full(value.shape, 0x7E00, tl.int16).to(value.dtype, bitcast=True)
        value = tl.where(value == value, value, nan)
    tl.store(pointers, value, mask=mask)


@triton.jit
def announce(counter, PROTOCOL: tl.constexpr):
    """Signals the group that all earlier stores of this program are done (COUNTER only)."""
    if PROTOCOL == COUNTER:
        tl.debug_barrier()
        tl.atomic_add(counter, 1, sem="release", scope="gpu")


@triton.jit
def report(error, late, member, step):
    """Sets the error words: 1 + the program that timed out, and its step."""
    if late != 0:
        tl.store(error + 1, step)
        tl.store(error, member + 1)
