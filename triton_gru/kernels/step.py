"""One time step, for decoding and reinforcement learning: no loop over time, nothing resident.

At small batch a step takes the time of one read of W_hh, so the weights are streamed through the
matrix units tile by tile, with some columns for every multiprocessor; a tile has 16 rows, so up to
16 rows of batch cost no further weight traffic. With `reset_after=False` the candidate needs all of
r * h, so the step is two launches (PHASE 1 and 2) instead of one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_gru.kernels.gates import blend, candidate, sigmoid
from triton_gru.kernels.launch import current
from triton_gru.kernels.tile import owned, total, zero_sum
from triton_gru.plan.plan import step_tiles
from triton_gru.plan.selection import DTYPES, matrix_precision

WHOLE_STEP = tl.constexpr(0)  # reset_after: everything from h
GATES = tl.constexpr(1)  # not reset_after: r and z from h; writes r * h and z
CANDIDATE = tl.constexpr(2)  # not reset_after: n from r * h; reads z


@triton.jit
def _load_weight_chunk(weight, k, col, hidden):
    inside = (k < hidden) & (col < hidden)
    return tl.load(weight + col.to(tl.int64) * hidden + k, mask=inside, other=0.0)


# Not specialised: Triton turns an argument that equals 1 into a constant, which has no `.to`, and
# recompiles for 1 and for multiples of 16; batches and steps come in all sizes.
@triton.jit(do_not_specialize=["batch", "hidden"])
def step_kernel(
    gates_x,  # [B, 3H]
    weight,  # [3H, H]
    bias,  # [3H]; read if HAS_BIAS
    h,  # [B, H]
    gated,  # [B, H], r * h; written in GATES, read in CANDIDATE
    update,  # [B, H] float32, z; written in GATES, read in CANDIDATE
    out,  # [B, H]
    batch,  # B
    hidden,  # H
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    PHASE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One column tile of one row tile. Grid: (column tiles, row tiles)."""
    col0 = tl.program_id(0) * BLOCK_N
    row0 = tl.program_id(1) * BLOCK_M
    part: tl.constexpr = BLOCK_K // SPLIT_K
    split = tl.arange(0, SPLIT_K)[:, None, None] * part
    k_vector = split + tl.arange(0, part)[None, None, :]
    k_weight = split + tl.arange(0, part)[None, :, None]
    # B * 3H may be 2^31 and more.
    tile_row = (row0 + tl.arange(0, BLOCK_M)[None, :, None]).to(tl.int64)
    tile_col = col0 + tl.arange(0, BLOCK_N)[None, None, :]
    source = gated if PHASE == CANDIDATE else h
    square = hidden.to(tl.int64) * hidden

    acc_r = zero_sum(BLOCK_M, BLOCK_N, SPLIT_K)
    acc_z = zero_sum(BLOCK_M, BLOCK_N, SPLIT_K)
    acc_n = zero_sum(BLOCK_M, BLOCK_N, SPLIT_K)
    for k0 in range(0, hidden, BLOCK_K):
        inside = (tile_row < batch) & (k_vector + k0 < hidden)
        vector = tl.load(source + tile_row * hidden + k_vector + k0, mask=inside, other=0.0)
        if PHASE != CANDIDATE:
            w_r = _load_weight_chunk(weight, k_weight + k0, tile_col, hidden)
            w_z = _load_weight_chunk(weight + square, k_weight + k0, tile_col, hidden)
            acc_r = tl.dot(vector, w_r, acc_r, input_precision=PRECISION)
            acc_z = tl.dot(vector, w_z, acc_z, input_precision=PRECISION)
        if PHASE != GATES:
            w_n = _load_weight_chunk(weight + 2 * square, k_weight + k0, tile_col, hidden)
            acc_n = tl.dot(vector, w_n, acc_n, input_precision=PRECISION)

    row, col = owned(row0, col0, BLOCK_M, BLOCK_N, SPLIT_K)
    real = (row < batch) & (col < hidden)
    row = row.to(tl.int64)
    own = row * hidden + col
    own_gates = row * 3 * hidden + col
    state = tl.load(h + own, mask=real, other=0.0).to(tl.float32)
    if PHASE != CANDIDATE:
        a_r = total(acc_r, BLOCK_M, BLOCK_N, SPLIT_K, PRECISION)
        a_z = total(acc_z, BLOCK_M, BLOCK_N, SPLIT_K, PRECISION)
        a_r += tl.load(gates_x + own_gates, mask=real, other=0.0).to(tl.float32)
        a_z += tl.load(gates_x + own_gates + hidden, mask=real, other=0.0).to(tl.float32)
        if HAS_BIAS:
            a_r += tl.load(bias + col, mask=real, other=0.0).to(tl.float32)
            a_z += tl.load(bias + hidden + col, mask=real, other=0.0).to(tl.float32)
        r = sigmoid(a_r)
        z = sigmoid(a_z)
    if PHASE == GATES:
        tl.store(gated + own, (r * state).to(gated.dtype.element_ty), mask=real)
        tl.store(update + own, z, mask=real)
    else:
        x_n = tl.load(gates_x + own_gates + 2 * hidden, mask=real, other=0.0).to(tl.float32)
        h_n = total(acc_n, BLOCK_M, BLOCK_N, SPLIT_K, PRECISION)
        if HAS_BIAS:
            h_n += tl.load(bias + 2 * hidden + col, mask=real, other=0.0).to(tl.float32)
        if PHASE == CANDIDATE:
            z = tl.load(update + own, mask=real, other=0.0)
            n = candidate(x_n, z, h_n, False)
        else:
            n = candidate(x_n, r, h_n, True)
        new = blend(z, n, state)
        tl.store(out + own, new.to(out.dtype.element_ty), mask=real)


def step(
    gates_x: Tensor,
    h: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    *,
    reset_after: bool,
) -> Tensor:
    """The state after one step.

    Args:
        gates_x: W_ih x + b_ih, [B, 3H]; its dtype is the one computed in.
        h: The state before, [B, H].
        weight_hh: [3H, H].
        bias_hh: [3H] or None.
        reset_after: The variant.

    Returns:
        [B, H].
    """
    B, H = h.shape
    dtype = gates_x.dtype
    if dtype not in DTYPES:
        raise TypeError(f"the kernels compute {', '.join(map(str, DTYPES))}, got: {dtype}")
    gates_x, h = gates_x.contiguous(), h.to(dtype).contiguous()
    out = torch.empty_like(h)
    gated = h if reset_after else torch.empty_like(h)
    update = h if reset_after else torch.empty_like(h, dtype=torch.float32)
    tiles = step_tiles(DTYPES[dtype])
    grid = (-(-H // tiles.block_n), -(-B // tiles.block_m))
    phases = (0,) if reset_after else (1, 2)
    with current(gates_x.device):
        for phase in phases:
            step_kernel[grid](
                gates_x=gates_x,
                weight=weight_hh.to(dtype).contiguous(),
                bias=gates_x if bias_hh is None else bias_hh.to(dtype).contiguous(),
                h=h,
                gated=gated,
                update=update,
                out=out,
                batch=B,
                hidden=H,
                BLOCK_M=tiles.block_m,
                BLOCK_N=tiles.block_n,
                BLOCK_K=tiles.block_k,
                SPLIT_K=tiles.warps,
                PHASE=phase,
                HAS_BIAS=bias_hh is not None,
                PRECISION=matrix_precision(dtype),
                num_warps=tiles.warps,
                num_stages=tiles.stages,
            )
    return out
