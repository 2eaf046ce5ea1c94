"""A layer of the recurrence on a CPU in float32, by scan.c."""

import struct
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from triton_gru.engines.cpu.library import library
from triton_gru.engines.varlen import PackedRows

# Rows whose gate derivatives are computed before they enter the weights' gradients: their 7H floats
# per row are then read from a cache.
ROWS_A_PIECE = 1024
# struct Layer of layer.h: numbers, pointers, and the parameters and gradients of two directions.
_LAYER = struct.Struct("@10q10q16q")


def forward(
    x: Tensor,
    h0: Tensor,
    params: Sequence[Tensor],
    rows: PackedRows | None,
    resets: Tensor | None,
    *,
    rows_first: bool,
    reset_after: bool,
    save_gates: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """All states of a layer (N rows in all, D directions, B rows, I input_size, H hidden_size).

    Args:
        x: [N, I] with `rows`, else [T, B, I], or [B, T, I] with rows_first; contiguous float32, as
            all that follows.
        h0: [D, B, H].
        params: weight_ih [3H, I], weight_hh [3H, H] and, with biases, bias_ih and bias_hh [3H], of
            each direction.
        rows: The rows of each step; None if all rows have all steps.
        resets: Before which steps the state of each direction is reset, bool, the shape of x with D
            as the last dimension; or None.
        rows_first: Whether rows come before steps.
        reset_after: The variant, see `equations`.
        save_gates: Whether to return the gates, which `backward` needs.

    Returns:
        y, [..., D * H] as x; the last states [D, B, H]; and r, z, n and with reset_after c,
        [D, N, 4 or 3, H].
    """
    D, _, H = h0.shape
    y = x.new_empty(*x.shape[:-1], D * H)
    last = torch.empty_like(h0)
    gates = None
    if save_gates:
        gates = x.new_empty(D, x.shape[:-1].numel(), 4 if reset_after else 3, H)
    rest = (y, last, gates, None, None, None)
    _call(library().scan_forward, x, resets, h0, rest, params, (), rows, rows_first, reset_after)
    return y, last, gates


def backward(
    dy: Tensor | None,
    dlast: Tensor | None,
    y: Tensor,
    gates: Tensor,
    x: Tensor,
    h0: Tensor,
    params: Sequence[Tensor],
    rows: PackedRows | None,
    resets: Tensor | None,
    *,
    rows_first: bool,
    reset_after: bool,
    input_needed: bool = True,
    params_needed: bool = True,
) -> tuple[Tensor | None, Tensor, list[Tensor | None]]:
    """The derivative of `forward` by x, h0 and params.

    Args:
        dy: The gradient of the loss with respect to y, contiguous, or None.
        dlast: That with respect to the last states, or None.
        y: As returned by `forward`.
        gates: As returned by `forward`.
        x: As given to `forward`, likewise the following.
        h0: [D, B, H].
        params: The parameters of each direction.
        rows: The rows of each step, or None.
        resets: Bool, or None.
        rows_first: Whether rows come before steps.
        reset_after: The variant.
        input_needed: Whether to compute the derivative by x; else None is returned for it.
        params_needed: Whether to compute those by params.
    """
    D = len(h0)
    dx = x.new_empty(D, *x.shape) if input_needed else None
    # A row's derivative is kept until the step that is the row's last one.
    if dlast is None:
        dh0 = torch.zeros_like(h0)
    else:
        dh0 = dlast.clone(memory_format=torch.contiguous_format)
    dparams = [torch.empty_like(p) if params_needed else None for p in params]
    rest = (y, None, gates, dy, dx, dh0)
    _call(
        library().scan_backward, x, resets, h0, rest, params, dparams, rows, rows_first, reset_after
    )
    if dx is not None:
        dx = dx[0] if D == 1 else dx[0].add_(dx[1])
    return dx, dh0, dparams


def _call(
    function: Callable[[bytes], int],
    x: Tensor,
    resets: Tensor | None,
    h0: Tensor,
    rest: Sequence[Tensor | None],
    params: Sequence[Tensor],
    dparams: Sequence[Tensor | None],
    rows: PackedRows | None,
    rows_first: bool,
    reset_after: bool,
) -> None:
    D, B, H = h0.shape
    kinds = len(params) // D
    if rows is None:
        T, to_step, to_row = (x.shape[1], 1, x.shape[1]) if rows_first else (x.shape[0], B, 1)
        offsets = None
    else:
        offsets, to_step, to_row = rows.offsets, 0, 0
        T = len(offsets) - 1
    by_direction = []
    for d in range(2):
        for group in (params, dparams):
            own = [_at(t) for t in group[d * kinds : (d + 1) * kinds]]
            by_direction += own + [0] * (4 - len(own))
    threads = torch.get_num_threads()
    numbers = (T, B, x.shape[-1], H, D, reset_after, threads, ROWS_A_PIECE, to_step, to_row)
    if function(
        _LAYER.pack(*numbers, _at(offsets), *map(_at, (x, resets, h0, *rest)), *by_direction)
    ):
        raise MemoryError("triton_gru's CPU engine could not allocate its buffers")


def _at(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
