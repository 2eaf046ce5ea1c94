"""A layer of the recurrence on a CPU in float32, by scan.c."""

import ctypes

import torch
from torch import Tensor

from triton_gru.cpu.library import library
from triton_gru.sequences import PackedRows

# Rows whose gate derivatives are formed before they go into the weights' gradients: what they fill,
# 7H floats a row, is then read from a cache.
ROWS_A_PIECE = 1024


class _Direction(ctypes.Structure):
    _fields_ = [
        ("reverse", ctypes.c_int64),
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("h0", "weight_ih", "weight_hh", "bias_x", "bias_h", "resets", "gates", "dx"),
                *("d_gates_x", "d_gates_h", "state", "u", "dh", "y", "dy"),
            )
        ),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in (
                *("steps", "batch", "inputs", "hidden", "directions", "reset_after"),
                *("first", "last"),
            )
        ),
        ("offsets", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("direction", _Direction * 2),
    ]


def forward(
    x: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    rows: PackedRows,
    resets: Tensor | None,
    *,
    reset_after: bool,
    save_gates: bool,
) -> tuple[Tensor, Tensor | None]:
    """All states of a layer (N packed rows, D directions, B rows, I input_size, H hidden_size).

    Args:
        x: [N, I], or [T, B, I] where all rows have T steps; float32 as all that follows.
        h0: [D, B, H].
        weight_ih: [D, 3H, I].
        weight_hh: [D, 3H, H].
        bias_ih: [D, 3H] or None.
        bias_hh: [D, 3H] or None.
        rows: Which rows belong to which step.
        resets: Before which steps each direction starts anew, bool [N, D], or None.
        reset_after: The variant, see `equations`.
        save_gates: Whether the gates are returned, which `backward` needs.

    Returns:
        y, [N, D * H] or [T, B, D * H], and r, z, n and with reset_after c, [D, N, 4 or 3, H].
    """
    D, B, H = h0.shape
    N = x.shape[:-1].numel()
    x, h0 = x.contiguous(), h0.contiguous()
    kept = 4 if reset_after else 3
    y = x.new_empty(*x.shape[:-1], D * H)
    gates = x.new_empty(D, N, kept, H) if save_gates else None
    keep = [_pack(weight_ih, H, True), _pack(weight_hh, H, True)]
    bias_x = bias_h = None
    if bias_ih is not None:
        bias_h = bias_hh.contiguous()
        bias_x = bias_ih + bias_h
        if reset_after:
            bias_x[:, 2 * H :] = bias_ih[:, 2 * H :]
    u = None if reset_after else x.new_empty(D, B, H)
    if resets is not None:
        resets = resets.contiguous()
    layer = _layer(x, rows, D, B, H, reset_after)
    for d in range(D):
        layer.direction[d] = _Direction(
            d,
            h0=h0[d].data_ptr(),
            weight_ih=keep[0][d].data_ptr(),
            weight_hh=keep[1][d].data_ptr(),
            bias_x=_at(bias_x, d),
            bias_h=_at(bias_h, d) if reset_after else None,
            resets=None if resets is None else resets.data_ptr() + d,
            gates=_at(gates, d),
            u=_at(u, d),
            y=y.data_ptr() + 4 * d * H,
        )
    _call(library().scan_forward, layer)
    return y, gates


def backward(
    dy: Tensor,
    dlast: Tensor,
    y: Tensor,
    gates: Tensor,
    x: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    rows: PackedRows,
    resets: Tensor | None,
    *,
    reset_after: bool,
    input_needed: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The derivative of `forward`, by x, h0, weight_ih, weight_hh, bias_ih and bias_hh.

    Args:
        dy: What the loss passes to y, [N, D * H].
        dlast: What it passes to the last states, [D, B, H].
        y: What `forward` returned, as gates; and what it was given.
        gates: As above.
        x: As above.
        h0: As above.
        weight_ih: As above.
        weight_hh: As above.
        rows: As above.
        resets: As above.
        reset_after: As above.
        input_needed: Whether the derivative by x is wanted, which is None otherwise.
    """
    D, B, H = h0.shape
    shape, x = x.shape, x.flatten(0, -2)
    N, I = x.shape  # noqa: E741
    x, h0, dy = x.contiguous(), h0.contiguous(), dy.contiguous()
    if resets is not None:
        resets = resets.contiguous()
    packed = [_pack(weight_ih, H, False) if input_needed else None, _pack(weight_hh, H, False)]
    dx = x.new_empty(D, N, I) if input_needed else None
    # A row's derivative stays as it is until the row's last step has its turn.
    dh0 = dlast.clone(memory_format=torch.contiguous_format)
    dweight_ih, dweight_hh = torch.zeros_like(weight_ih), torch.zeros_like(weight_hh)
    dbias = x.new_zeros(2, D, 3 * H)
    T = len(rows.offsets) - 1
    offsets = rows.offsets.tolist()
    pieces = _pieces(offsets, D)
    most = max(
        max(offsets[e] - offsets[s], offsets[T - s] - offsets[T - e] if D == 2 else 0)
        for s, e in pieces
    )
    d_gates_x, state = x.new_empty(D, most, 3 * H), x.new_empty(D, most, H)
    d_gates_h = torch.empty_like(d_gates_x) if reset_after else d_gates_x
    u = None if reset_after else torch.empty_like(state)
    layer = _layer(x, rows, D, B, H, reset_after)
    for d in range(D):
        layer.direction[d] = _Direction(
            d,
            h0=h0[d].data_ptr(),
            weight_ih=_at(packed[0], d),
            weight_hh=_at(packed[1], d),
            resets=None if resets is None else resets.data_ptr() + d,
            gates=_at(gates, d),
            dx=_at(dx, d),
            d_gates_x=_at(d_gates_x, d),
            d_gates_h=_at(d_gates_h, d),
            state=_at(state, d),
            u=_at(u, d),
            dh=_at(dh0, d),
            y=y.data_ptr() + 4 * d * H,
            dy=dy.data_ptr() + 4 * d * H,
        )
    for s, e in reversed(pieces):
        layer.first, layer.last = s, e
        _call(library().scan_backward, layer)
        for d in range(D):
            lo, hi = (offsets[T - e], offsets[T - s]) if d else (offsets[s], offsets[e])
            R = hi - lo
            _outer(d_gates_x[d], 3 * H, x[lo:hi], R, dweight_ih[d], dbias[0, d])
            if reset_after:
                _outer(d_gates_h[d], 3 * H, state[d], R, dweight_hh[d], dbias[1, d])
            else:
                _outer(d_gates_x[d], 3 * H, state[d], R, dweight_hh[d], None, columns=(0, 2 * H))
                _outer(d_gates_x[d], 3 * H, u[d], R, dweight_hh[d], None, columns=(2 * H, 3 * H))
    if input_needed:
        dx = (dx[0] if D == 1 else dx[0].add_(dx[1])).view(shape)
    return dx, dh0, dweight_ih, dweight_hh, dbias[0], dbias[1 if reset_after else 0].clone()


def _layer(x: Tensor, rows: PackedRows, D: int, B: int, H: int, reset_after: bool) -> _Layer:
    T = len(rows.offsets) - 1
    return _Layer(T, B, x.shape[-1], H, D, reset_after, 0, T, rows.offsets.data_ptr(), x.data_ptr())


def _at(tensor: Tensor | None, d: int) -> int | None:
    return None if tensor is None else tensor.data_ptr() + 4 * d * tensor.stride(0)


def _pieces(offsets: list[int], D: int) -> list[tuple[int, int]]:
    """Runs of steps, from the first on, of about ROWS_A_PIECE rows."""
    T, pieces, start = len(offsets) - 1, [], 0
    for t in range(1, T + 1):
        if (
            t == T
            or max(
                offsets[t + 1] - offsets[start],
                offsets[T - start] - offsets[T - t - 1] if D == 2 else 0,
            )
            > ROWS_A_PIECE
        ):
            pieces.append((start, t))
            start = t
    return pieces


def _pack(weight: Tensor, H: int, transposed: bool) -> Tensor:
    """Weights [D, 3H, K] as scan.c's products read them: of W^T gate by gate, or of W."""
    weight = weight.contiguous()
    D, G, K = weight.shape
    width = library().tile_width()
    pack = library().pack
    if transposed:
        out = weight.new_empty(D, 3, -(-H // width), K, width)
        for d in range(D):
            for g in range(3):
                pack(weight[d, g * H :].data_ptr(), 1, K, K, H, out[d, g].data_ptr())
        return out
    out = weight.new_empty(D, -(-K // width), G, width)
    for d in range(D):
        pack(weight[d].data_ptr(), K, 1, G, K, out[d].data_ptr())
    return out


def _outer(
    a: Tensor,
    M: int,
    b: Tensor,
    rows: int,
    out: Tensor,
    sums: Tensor | None,
    columns: tuple[int, int] | None = None,
) -> None:
    """Out [M, N] += a^T b over the first rows of a [., M] and b [., N]; sums [M] += a's columns."""
    first, last = columns or (0, M)
    status = library().outer(
        a.data_ptr(),
        M,
        first,
        last,
        b.data_ptr(),
        b.shape[-1],
        rows,
        out.data_ptr(),
        None if sums is None else sums.data_ptr(),
        torch.get_num_threads(),
    )
    _check(status)


def _call(function, layer: _Layer) -> None:
    _check(function(ctypes.byref(layer), torch.get_num_threads()))


def _check(status: int) -> None:
    if status:
        raise MemoryError("triton_gru's CPU engine could not allocate its buffers")
