"""Gates, candidates and states of a GRU at every step."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from triton_gru import equations, functional
from triton_gru.torch_modes import without_autocast
from triton_gru.validation import check_sequence


class Trace(NamedTuple):
    """The gates, candidates and states of a GRU over a sequence, with the symbols of `equations`.

    Each tensor is [L, D, *, H] with L layers, D directions, H hidden_size and, for *, the layout of
    the input: [T, B], [B, T] with batch_first, [T] for one row. So `trace.z[layer, direction]` has
    the shape of the input, H instead of I, and `trace.h[-1]` is the output of forward. In both
    directions an element's index is its time step.

    Attributes:
        r: The reset gate, within 0 and 1: how much of the past enters the candidate.
        z: The update gate, within 0 and 1: the share of the state that is kept; 1 keeps all of
            it, 0 replaces it by the candidate.
        n: The candidate, within -1 and 1.
        h: The state after the step, (1 - z) * n + z * (the state before it).
    """

    r: Tensor
    z: Tensor
    n: Tensor
    h: Tensor


def trace(
    module: nn.RNNBase, input: Tensor, hx: Tensor | None = None, *, reset_after: bool, backend: str
) -> Trace:
    """The gates, candidates and states of a GRU at every step, without dropout.

    The states are computed by the module's backend; the gates are computed from them by the
    equations, one product over all steps. Differentiable.

    Args:
        module: A GRU.
        input: [T, B, I]; [B, T, I] with batch_first; [T, I] for one row.
        hx: The first states, [L * D, B, H], or [L * D, H] for one row. None means zeros.
        reset_after: The module's variant.
        backend: The backend that computes the states.

    Raises:
        TypeError: input is a PackedSequence, whose rows have different lengths: trace them one by
            one.
    """
    if isinstance(input, PackedSequence):
        raise TypeError(
            "trace() expects a tensor, got a PackedSequence: trace its rows one by one, "
            "as in trace(row) with row [T, I]"
        )
    module._update_flat_weights()
    params = [weight for weight in module._flat_weights if weight is not None]
    unbatched = check_sequence(input, hx, params[0], False, module.batch_first)
    L, D, H = module.num_layers, 2 if module.bidirectional else 1, module.hidden_size
    x = input.unsqueeze(1) if unbatched else input.transpose(0, 1) if module.batch_first else input
    hx = hx.unsqueeze(1) if unbatched and hx is not None else hx
    hx = functional._first_states(hx, (L * D, x.shape[1], H), x)
    per_layer = len(params) // L
    layers = []
    for layer, h0 in enumerate(hx.unflatten(0, (L, D))):
        group = params[layer * per_layer : (layer + 1) * per_layer]
        y, _ = functional.gru(
            x,
            h0,
            group,
            bias=module.bias,
            bidirectional=module.bidirectional,
            reset_after=reset_after,
            backend=backend,
        )
        assert isinstance(y, Tensor)  # as x is
        with without_autocast(x.device):  # in the dtype of the states
            layers.append(_gates(x, h0, y, group, D, reset_after))
        x = y
    stacked = (torch.stack(tensors) for tensors in zip(*layers, strict=True))
    if unbatched:
        return Trace(*(tensor.squeeze(3) for tensor in stacked))
    return Trace(*(t.transpose(2, 3) if module.batch_first else t for t in stacked))


def _gates(
    x: Tensor, h0: Tensor, y: Tensor, params: list[Tensor], D: int, reset_after: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """r, z, n and h of one layer, [D, T, B, H] each, from its states y, [T, B, D * H]."""
    kinds = len(params) // D
    directions = []
    for d, h in enumerate(y.unflatten(-1, (D, -1)).unbind(2)):
        tensors = [parameter.to(y.dtype) for parameter in params[d * kinds : (d + 1) * kinds]]
        weight_ih, weight_hh = tensors[:2]
        bias_ih, bias_hh = tensors[2:] if kinds == 4 else (None, None)
        first = h0[d : d + 1].to(y.dtype)
        before = torch.cat([h[1:], first] if d else [first, h[:-1]])
        gates_x = torch.nn.functional.linear(x.to(y.dtype), weight_ih, bias_ih)
        r, z, n, _ = equations.gates(gates_x, before, weight_hh, bias_hh, reset_after)
        directions.append((r, z, n, h))
    r, z, n, h = (torch.stack(tensors) for tensors in zip(*directions, strict=True))
    return r, z, n, h
