"""What the gates' gradients are dh and du times, for all steps: kernels and host side.

A backward that exchanges dh (`gluon_backward.py`) knows before its first step what dh is multiplied
by, as it depends on the forward alone:

    reset_after=True   da_r = dh F_r, da_z = dh F_z, dc = dh F_c; the factors are F_r, F_z, F_c
    reset_after=False  da_n = dh F_n, da_z = dh F_z, da_r = du F_u; the factors are F_u, F_z, F_n

`factors` forms them before the scan, in the dtype of the exchange, as each program multiplies all
columns of dh. `gates_gradients` forms the gradients after it, in float32, from dh and du as they
were exchanged and from the gates once more: a factor rounded twice would be one rounding more.
"""

import triton
import triton.language as tl
from torch import Tensor

from triton_gru.kernels import launch
from triton_gru.kernels.gates import candidate, reset_gradient, sigmoid, update_gradients

# Rows (steps x batch) and columns of a program of 4 warps: 8 elements a thread.
ROWS, COLUMNS = 8, 128


@triton.jit
def load_gates(gates_x, gates_h, before, row, col, mask, hidden, lane, RESET_AFTER: tl.constexpr):
    """r, z, n, the hidden part of n, and the state before, in float32."""
    x = gates_x + lane * 3 * hidden + col
    g = gates_h + lane * 3 * hidden + col
    x_r = tl.load(x, mask=mask, other=0.0).to(tl.float32)
    x_z = tl.load(x + hidden, mask=mask, other=0.0).to(tl.float32)
    x_n = tl.load(x + 2 * hidden, mask=mask, other=0.0).to(tl.float32)
    g_r = tl.load(g, mask=mask, other=0.0).to(tl.float32)
    g_z = tl.load(g + hidden, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(g + 2 * hidden, mask=mask, other=0.0).to(tl.float32)
    h = tl.load(before + row * hidden + col, mask=mask, other=0.0).to(tl.float32)
    r = sigmoid(x_r + g_r)
    z = sigmoid(x_z + g_z)
    return r, z, candidate(x_n, r, c, RESET_AFTER), c, h


@triton.jit
def elements(rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows and columns of this program, of so many; rows as int64, they count all steps."""
    across = tl.cdiv(columns, BLOCK_N)
    program = tl.program_id(0)
    row = (program // across) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    col = (program % across) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    return row.to(tl.int64), col


# Not specialised, as in backward.py; likewise below.
@triton.jit(do_not_specialize=["rows", "direction"])
def factors_kernel(
    gates_x,  # [rows, D, 3H]
    gates_h,  # [rows, D, 3H]
    before,  # [rows, H], of this direction
    out,  # [rows, D, 3, HP], result
    rows,  # T B
    direction,
    hidden,  # H
    padded,  # HP
    DIRECTIONS: tl.constexpr,
    RESET_AFTER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Fills `out` of one direction. Grid: tiles of rows x tiles of columns."""
    row, col = elements(rows, padded, BLOCK_M, BLOCK_N)
    lane = row * DIRECTIONS + direction
    real = (row < rows) & (col < hidden)
    # fmt: off
    r, z, n, c, h = load_gates(
        gates_x, gates_h, before, row, col, real, hidden, lane, RESET_AFTER
    )
    # fmt: on
    by_n, by_z = update_gradients(1.0, z, n, h)
    if RESET_AFTER:
        by_r = reset_gradient(by_n * c, r)
        by_n = by_n * r
    else:
        by_r = reset_gradient(h, r)
    at = out + lane * 3 * padded + col
    stored = (row < rows) & (col < padded)
    tl.store(at, tl.where(real, by_r, 0.0).to(out.dtype.element_ty), mask=stored)
    tl.store(at + padded, tl.where(real, by_z, 0.0).to(out.dtype.element_ty), mask=stored)
    tl.store(at + 2 * padded, tl.where(real, by_n, 0.0).to(out.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["rows", "batch", "direction"])
def gates_gradients_kernel(
    gates_x,  # [rows, D, 3H]
    gates_h,  # [rows, D, 3H]
    before,  # [rows, H], of this direction
    dh,  # [rows, D, HP]
    du,  # [rows, D, HP]; read if not RESET_AFTER
    d_gates,  # [rows, D, 3, H], result
    d_c,  # [rows, D, H], result; written if RESET_AFTER
    lengths,  # [B] int32; read if HAS_LENGTHS
    rows,  # T B
    batch,  # B
    direction,
    hidden,  # H
    padded,  # HP
    DIRECTIONS: tl.constexpr,
    RESET_AFTER: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Fills `d_gates` and `d_c` of one direction. Grid: tiles of rows x tiles of columns."""
    row, col = elements(rows, hidden, BLOCK_M, BLOCK_N)
    lane = row * DIRECTIONS + direction
    real = (row < rows) & (col < hidden)
    # fmt: off
    r, z, n, c, h = load_gates(
        gates_x, gates_h, before, row, col, real, hidden, lane, RESET_AFTER
    )
    # fmt: on
    by_dh = tl.load(dh + lane * padded + col, mask=real, other=0.0).to(tl.float32)
    da_n, da_z = update_gradients(by_dh, z, n, h)
    if RESET_AFTER:
        da_r = reset_gradient(da_n * c, r)
    else:
        by_du = tl.load(du + lane * padded + col, mask=real, other=0.0).to(tl.float32)
        da_r = reset_gradient(by_du * h, r)
    dc = da_n * r
    if HAS_LENGTHS:
        active = row // batch < tl.load(lengths + row % batch, mask=row < rows, other=0)
        da_r = tl.where(active, da_r, 0.0)
        da_z = tl.where(active, da_z, 0.0)
        da_n = tl.where(active, da_n, 0.0)
        dc = tl.where(active, dc, 0.0)
    at = d_gates + lane * 3 * hidden + col
    tl.store(at, da_r.to(d_gates.dtype.element_ty), mask=real)
    tl.store(at + hidden, da_z.to(d_gates.dtype.element_ty), mask=real)
    tl.store(at + 2 * hidden, da_n.to(d_gates.dtype.element_ty), mask=real)
    if RESET_AFTER:
        tl.store(d_c + lane * hidden + col, dc.to(d_c.dtype.element_ty), mask=real)


def factors(
    gates_x: Tensor, gates_h: Tensor, before: list[Tensor], padded: int, reset_after: bool
) -> Tensor:
    """The factors of all steps, [T, B, D, 3, HP].

    Args:
        gates_x: [T, B, D, 3H], contiguous.
        gates_h: Likewise.
        before: For each direction the state that each step started from, [T, B, H], contiguous.
        padded: HP.
        reset_after: The variant.
    """
    T, B, D, _ = gates_x.shape
    out = gates_x.new_empty(T, B, D, 3, padded)
    for direction, h in enumerate(before):
        factors_kernel[_grid(T * B, padded)](
            gates_x,
            gates_h,
            h,
            out,
            T * B,
            direction,
            h.shape[-1],
            padded,
            DIRECTIONS=D,
            RESET_AFTER=reset_after,
            BLOCK_M=ROWS,
            BLOCK_N=COLUMNS,
        )
    return out


def gates_gradients(
    gates_x: Tensor,
    gates_h: Tensor,
    before: list[Tensor],
    dh: Tensor,
    du: Tensor,
    lengths: Tensor | None,
    reset_after: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of the gates of all steps, zero past a row's end.

    Args:
        gates_x: As in `factors`, likewise the following.
        gates_h: As there.
        before: As there.
        dh: The gradient by each step's state, [T, B, D, HP], contiguous.
        du: Without reset_after that by r * h, likewise.
        lengths: [B] or None.
        reset_after: As there.

    Returns:
        By gates_x [T, B, D, 3, H], and by the hidden part of n [T, B, D, H].
    """
    T, B, D, _ = gates_x.shape
    H = before[0].shape[-1]
    d_gates = gates_x.new_empty(T, B, D, 3, H)
    d_c = gates_x.new_empty(T, B, D, H) if reset_after else d_gates[:, :, :, 2]
    for direction, h in enumerate(before):
        gates_gradients_kernel[_grid(T * B, H)](
            gates_x,
            gates_h,
            h,
            dh,
            du,
            d_gates,
            d_c,
            launch.lengths_argument(lengths, gates_x),
            T * B,
            B,
            direction,
            H,
            dh.shape[-1],
            DIRECTIONS=D,
            RESET_AFTER=reset_after,
            HAS_LENGTHS=lengths is not None,
            BLOCK_M=ROWS,
            BLOCK_N=COLUMNS,
        )
    return d_gates, d_c


def _grid(rows: int, columns: int) -> tuple[int]:
    return (triton.cdiv(rows, ROWS) * triton.cdiv(columns, COLUMNS),)
