"""torch's own GRU (ATen, cuDNN) over rows of different lengths, without a wait for the device.

torch takes such rows only as a PackedSequence, whose lengths the host has to know, and for which
ATen on a CPU takes about twice the time of padded rows, forward and backward
(`python -m benchmarks.lengths_cpu`). Here it runs over the padded rows, layer by layer: nothing
before a row's end depends on what comes after it, and for the second direction each row is reversed
within its length, so that it starts at its last step.
"""

import torch
from torch import _VF, Tensor

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
        y [T, B, D * H], of which nothing past a row's end has a meaning, and the last states
        [D, B, H].
    """
    T, B, _ = x.shape
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    mirrored = varlen.reversed_indices(lengths, T) if len(h0) == 2 else None
    # The last step of each row, or, where it has none, the first one, which is not looked at.
    last_place = (lengths - 1).clamp(min=0) * B + torch.arange(B, device=x.device)
    # cuDNN keeps what its backward takes in its training mode only, which says nothing else here:
    # dropout between layers is the caller's. A trace serves both.
    train = torch.jit.is_tracing() or records(x, h0, *weights)
    ys, last = [], []
    for d, first in enumerate(h0):
        params = [weight_ih[d], weight_hh[d]]
        if bias_ih is not None and bias_hh is not None:
            params += [bias_ih[d], bias_hh[d]]
        rows = x if d == 0 or mirrored is None else varlen.reverse(x, mirrored)
        y, _ = _VF.gru(
            rows, first.unsqueeze(0), params, bias_ih is not None, 1, 0.0, train, False, False
        )
        at_end = y.flatten(0, 1).index_select(0, last_place)
        last.append(torch.where((lengths > 0).unsqueeze(1), at_end, first.to(y.dtype)))
        ys.append(y if d == 0 or mirrored is None else varlen.reverse(y, mirrored))
    return stack(ys, 2).flatten(2), torch.stack(last)
