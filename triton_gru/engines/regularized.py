"""Regularisation of a GRU's recurrence, in plain torch: dropout masks and normalised gates.

All of it is off by default. Masks are drawn here by torch, before a backend runs, so that a seed
gives the same masks with every backend.

- recurrent_dropout (Gal and Ghahramani, arXiv:1512.05287): one mask per row for the whole sequence,
  on the state that enters W_hh; z multiplies the unmasked state.
- weight_dropout (DropConnect on W_hh, as in AWD-LSTM, Merity et al., arXiv:1708.02182): some
  elements of W_hh are zero for the whole call. To the scan it is another W_hh, so every backend
  supports it.
- zoneout (Krueger et al., arXiv:1606.01305): an element of the state keeps its value with this
  probability at each step; in evaluation the state is the expected value.
- layer_norm (Ba et al., arXiv:1607.06450): W_ih x and W_hh h, gate by gate, are normalised to mean
  0 and variance 1 over the units and scaled by a gain; the biases are added after that.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_gru import equations
from triton_gru.equations import LayerWeights, ScanOptions
from triton_gru.torch_modes import without_autocast


def inside_a_step(recurrent_dropout: float, zoneout: float, layer_norm: bool) -> tuple[str, ...]:
    """The names of those that act within a step, as `choose_backend` takes them."""
    if not (recurrent_dropout or zoneout or layer_norm):
        return ()
    given = {
        "recurrent_dropout": recurrent_dropout,
        "zoneout": zoneout,
        "layer_norm": layer_norm,
    }
    return tuple(name for name, value in given.items() if value)


def drop_weights(params: Sequence[Tensor], kinds: int, p: float) -> list[Tensor]:
    """The parameters, `kinds` of them per direction, with elements of every W_hh dropped."""
    return [F.dropout(w, p) if i % kinds == 1 else w for i, w in enumerate(params)]


def layer(
    x: Tensor,
    h0: Tensor,
    weights: LayerWeights,
    options: ScanOptions,
    gains: Sequence[Tensor] | None = None,
    *,
    recurrent_dropout: float = 0.0,
    zoneout: float = 0.0,
    training: bool = False,
) -> tuple[Tensor, Tensor]:
    """A layer with regularisation, recorded by autograd step by step.

    Args:
        x: As in `engines.autograd`, likewise the following three.
        h0: [D, B, H].
        weights: The layer's parameters.
        options: Variant, lengths and resets.
        gains: Of W_ih x and of W_hh h, [D, 3H] each, or None without layer normalisation.
        recurrent_dropout: Probability, applied while training.
        zoneout: Probability.
        training: Whether masks are drawn.

    Returns:
        y [T, B, D * H] and the last states [D, B, H].
    """
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    reset_after, lengths, resets = options
    D, B, H = h0.shape
    T = x.shape[0]
    mask = held = None
    if training and recurrent_dropout:
        mask = F.dropout(torch.ones_like(h0), recurrent_dropout)
    if training and zoneout:
        held = torch.rand(T, D, B, H, device=x.device) < zoneout
    with without_autocast(x.device):
        gates_x = F.linear(x, weight_ih.flatten(0, 1)).unflatten(-1, (D, 3 * H))
        if gains is not None:
            gates_x = equations.normalise(gates_x, gains[0], H)
        if bias_ih is not None:
            gates_x = gates_x + bias_ih
        gates_x = equations.hold_past_end(gates_x, lengths)
        ys, last = [], []
        for d in range(D):
            h, states = h0[d], []
            parameters = (weight_hh[d], None if bias_hh is None else bias_hh[d], reset_after)
            gain = None if gains is None else gains[1][d]
            for t in reversed(range(T)) if d else range(T):
                if resets is not None:
                    h = h.masked_fill(resets[t, :, d, None], 0)
                seen = h if mask is None else h * mask[d]
                _, z, n, _ = equations.gates(gates_x[t, :, d], seen, *parameters, gain)
                new = torch.lerp(n, h, z)
                if held is not None:
                    new = torch.where(held[t, d], h, new)
                elif zoneout:
                    new = torch.lerp(new, h, zoneout)
                states.append(h := new)
            last.append(h)
            ys.append(torch.stack(states[::-1] if d else states))
        return equations.stack(ys, 2).flatten(2), torch.stack(last)
