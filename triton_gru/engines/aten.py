"""torch's own GRU (ATen, cuDNN) over rows of different lengths, without synchronization.

torch takes such rows only as a PackedSequence, whose lengths must be on the host, and for which
ATen on a CPU takes about twice the time of padded rows, forward and backward
(`python -m benchmarks.lengths_cpu`). Here it runs over the padded rows, layer by layer: nothing
before a row's end depends on what comes after it, and for the second direction each row is reversed
within its length, so that it starts at its last step.
"""

import torch
from torch import Tensor

from triton_gru.engines import varlen
from triton_gru.equations import LayerWeights, stack
from triton_gru.torch_modes import records


def layer(
    x: Tensor,
    h0: Tensor,
    weights: LayerWeights,
    lengths: Tensor,
) -> tuple[Tensor, Tensor]:
    """A layer with reset_after=True and lengths; arguments as in `engines.autograd`.

    Returns:
        y [T, B, D * H], undefined past a row's end, and the last states
        [D, B, H].
    """
    T, B, _ = x.shape
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    mirrored = varlen.reversed_indices(lengths, T) if len(h0) == 2 else None
    # The last step of each row; of a row without steps the first one, which is not used.
    last_index = (lengths - 1).clamp(min=0) * B + torch.arange(B, device=x.device)
    # cuDNN saves tensors for its backward only in training mode, which has no other effect here, as
    # dropout between layers is the caller's. A trace must serve both modes.
    train = torch.jit.is_tracing() or records(x, h0, *weights)
    ys, last = [], []
    for d, first in enumerate(h0):
        params = [weight_ih[d], weight_hh[d]]
        if bias_ih is not None and bias_hh is not None:
            params += [bias_ih[d], bias_hh[d]]
        rows = x if d == 0 or mirrored is None else varlen.reverse(x, mirrored)
        y, _ = torch.gru(
            rows, first.unsqueeze(0), params, bias_ih is not None, 1, 0.0, train, False, False
        )
        at_end = y.flatten(0, 1).index_select(0, last_index)
        last.append(torch.where((lengths > 0).unsqueeze(1), at_end, first.to(y.dtype)))
        ys.append(y if d == 0 or mirrored is None else varlen.reverse(y, mirrored))
    return stack(ys, 2).flatten(2), torch.stack(last)
