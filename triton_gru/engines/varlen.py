"""Sequences of different lengths: conversions between packed data, padded rows, lengths and resets.

The scan takes padded time-major rows [T, B, ...], `lengths`, int64 [B], and `resets`, bool
[T, B, D], all on one device (see `equations`). Nothing here synchronizes with that device.
"""

import torch
from torch import Tensor

from triton_gru.equations import past_end


def resets_of_directions(resets: Tensor, lengths: Tensor | None, directions: int) -> Tensor:
    """The steps before which the state of each direction is reset, in the order of its steps.

    In the first direction these are the first steps of sequences; in the second, which runs
    backward, the last steps: those whose next step is a first one.

    Args:
        resets: Where sequences begin, bool [T, B].
        lengths: [B], or None if all rows have T steps. A reset past a row's end is ignored.
        directions: D, 1 or 2.

    Returns:
        bool [T, B, D].
    """
    if lengths is not None:
        resets = resets & ~past_end(lengths, resets.shape[0])
    if directions == 1:
        return resets.unsqueeze(-1)
    backwards = torch.cat([resets[1:], torch.zeros_like(resets[:1])])
    return torch.stack([resets, backwards], -1)


def indices(
    batch_sizes: Tensor, batch: int, total: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The indices of the steps of a PackedSequence among padded rows.

    Args:
        batch_sizes: Rows at each step, int64 [T] on the CPU, as a PackedSequence has them.
        batch: The first of them, B; a tensor in a trace.
        total: Their sum N.
        device: Device of the results; only batch_sizes is copied to it.

    Returns:
        The lengths of the rows, int64 [B], longest first, and the index t * B + b of each step of
        the packed data among the rows [T * B, ...], int64 [N].
    """
    sizes = batch_sizes.to(device, non_blocking=True)
    lengths = (sizes.unsqueeze(1) > torch.arange(batch, device=device)).sum(0)
    ends = sizes.cumsum(0)
    item = torch.arange(total, device=device)
    step = torch.searchsorted(ends, item, right=True)
    row = item - (ends - sizes).index_select(0, step)
    return lengths, step * batch + row


def pad(data: Tensor, index: Tensor, steps: int, batch: int) -> Tensor:
    """Rows [T, B, ...], zero past their ends, out of packed data [N, ...] and its `indices`."""
    rows = data.new_zeros(steps * batch, *data.shape[1:])
    return rows.index_copy(0, index, data).reshape(steps, batch, *data.shape[1:])


def pack(rows: Tensor, index: Tensor) -> Tensor:
    """Packed data [N, ...] out of rows [T, B, ...] and its `indices`."""
    return rows.flatten(0, 1).index_select(0, index)


def reversed_indices(lengths: Tensor, steps: int) -> Tensor:
    """The index of each step of rows that are reversed within their lengths.

    Args:
        lengths: [B].
        steps: T.

    Returns:
        Indices t * B + b among the rows [T * B, ...], int64 [T * B]. Steps past a row's end stay.
    """
    B = lengths.shape[0]  # not len(), which is a constant in a trace
    step = torch.arange(steps, device=lengths.device).unsqueeze(1)
    mirrored = torch.where(step < lengths, lengths - 1 - step, step)
    return (mirrored * B + torch.arange(B, device=lengths.device)).flatten()


def reverse(rows: Tensor, indices: Tensor) -> Tensor:
    """Rows [T, B, ...] reversed by their `reversed_indices`; twice restores them."""
    return rows.flatten(0, 1).index_select(0, indices).reshape(rows.shape)
