"""Where sequences of different lengths end: one vocabulary for PackedSequence and for the scan.

The scan takes padded time-major rows [T, B, ...] and `lengths`, int64 [B] on their device (see
`equations`).
"""

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence


def pad(data: Tensor, batch_sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of a PackedSequence, longest first.

    Args:
        data: [sum of batch_sizes, I].
        batch_sizes: Rows at each step, int64 [T] on the CPU.

    Returns:
        Rows [T, B, I], zero past their ends, and their lengths, int64 [B] on the CPU.
    """
    return pad_packed_sequence(PackedSequence(data, batch_sizes))


def pack(rows: Tensor, lengths: Tensor) -> Tensor:
    """The data of a PackedSequence out of rows [T, B, ...], longest first; lengths on the CPU."""
    return pack_padded_sequence(rows, lengths).data
