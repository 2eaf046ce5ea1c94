"""A layer of the recurrence on a CPU in float32, by scan.c."""

import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from triton_gru.engines.cpu.library import library

# Rows whose gate derivatives are computed before they enter the weights' gradients: their 7H floats
# per row are then read from a cache.
ROWS_A_PIECE = 512
# struct Layer of layer.h: numbers, pointers, parameters and gradients of two directions, and what C
# fills in.
_LAYER = struct.Struct("@11q11q16q2q")
_NO_MEMORY, _WRONG_ROWS = 1, 2


class Layout(NamedTuple):
    """The variant of a layer, and how its rows lie in memory.

    Attributes:
        reset_after: The variant, see `equations`.
        batch_sizes: Of the PackedSequence whose data are x, int64 [T]; or None.
        lengths: Steps of each row, int64 [B], contiguous; or None. Not with batch_sizes.
        resets: Before which steps the state of each direction is reset, bool, contiguous, the shape
            of x with D as the last dimension; or None.
        rows_first: Whether rows come before steps.
    """

    reset_after: bool
    batch_sizes: Tensor | None = None
    lengths: Tensor | None = None
    resets: Tensor | None = None
    rows_first: bool = False


def forward(
    x: Tensor, h0: Tensor, params: Sequence[Tensor], layout: Layout, *, save_gates: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """All states of a layer (N rows in all, D directions, B rows, I input_size, H hidden_size).

    Args:
        x: [N, I] with batch_sizes, else [T, B, I], or [B, T, I] with rows_first; contiguous
            float32, as all that follows.
        h0: [D, B, H].
        params: weight_ih [3H, I], weight_hh [3H, H] and, with biases, bias_ih and bias_hh [3H], of
            each direction.
        layout: See `Layout`.
        save_gates: Whether to return the gates, which `backward` needs.

    Returns:
        y, [..., D * H] as x, zero past the ends of rows; the last states [D, B, H]; and r, z, n
        and with reset_after c, [D, N, 4 or 3, H], undefined past the ends of rows.

    Raises:
        RuntimeError: lengths or batch_sizes do not fit x.
    """
    D, _, H = h0.shape
    y = x.new_empty(*x.shape[:-1], D * H)
    last = torch.empty_like(h0)
    gates = None
    if save_gates:
        gates = x.new_empty(D, x.shape[:-1].numel(), 4 if layout.reset_after else 3, H)
    rest = (y, last, gates, None, None, None)
    _call(library().scan_forward, x, h0, rest, params, (), layout)
    return y, last, gates


def backward(
    dy: Tensor | None,
    dlast: Tensor | None,
    y: Tensor,
    gates: Tensor,
    x: Tensor,
    h0: Tensor,
    params: Sequence[Tensor],
    layout: Layout,
    *,
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
        layout: See `Layout`.
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
    _call(library().scan_backward, x, h0, rest, params, dparams, layout)
    if dx is not None:
        dx = dx[0] if D == 1 else dx[0].add_(dx[1])
    return dx, dh0, dparams


def _call(
    function: Callable[[bytes], int],
    x: Tensor,
    h0: Tensor,
    rest: Sequence[Tensor | None],
    params: Sequence[Tensor],
    dparams: Sequence[Tensor | None],
    layout: Layout,
) -> None:
    D, B, H = h0.shape
    kinds = len(params) // D
    _check_shapes(params, kinds, x.shape[-1], H)
    reset_after, batch_sizes, lengths, resets, rows_first = layout
    if batch_sizes is not None:
        N, T, to_step, to_row = x.shape[0], batch_sizes.shape[0], 0, 0
    elif rows_first:
        N, T, to_step, to_row = B * x.shape[1], x.shape[1], 1, x.shape[1]
    else:
        N, T, to_step, to_row = B * x.shape[0], x.shape[0], B, 1
    by_direction = []
    for d in range(2):
        for group in (params, dparams):
            own = [_at(t) for t in group[d * kinds : (d + 1) * kinds]]
            by_direction += own + [0] * (4 - len(own))
    threads = torch.get_num_threads()
    numbers = (T, B, x.shape[-1], H, D, reset_after, threads, ROWS_A_PIECE, N, to_step, to_row)
    pointers = map(_at, (lengths, batch_sizes, x, resets, h0, *rest))
    result = function(_LAYER.pack(*numbers, *pointers, *by_direction, 0, 0))
    if result == _NO_MEMORY:
        raise MemoryError("triton_gru's CPU engine could not allocate its buffers")
    if result == _WRONG_ROWS and lengths is not None:
        raise RuntimeError(
            f"lengths should be within 0 and {T}, the input's steps, got: {lengths.tolist()}"
        )
    if result == _WRONG_ROWS and batch_sizes is not None:
        raise RuntimeError(
            f"batch_sizes should not increase, begin with at most {B} and add up to the {N} rows "
            f"of data, got: {batch_sizes.tolist()}"
        )


def _check_shapes(params: Sequence[Tensor], kinds: int, I: int, H: int) -> None:  # noqa: E741
    """C writes gradients of the expected sizes."""
    expected = ((3 * H, I), (3 * H, H), (3 * H,), (3 * H,))
    for index, parameter in enumerate(params):
        if parameter.shape != expected[index % kinds]:
            name = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[index % kinds]
            raise RuntimeError(
                f"Expected {name} of shape {list(expected[index % kinds])} for input_size={I} and "
                f"hidden_size={H}, got {list(parameter.shape)}"
            )


def _at(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
