"""The recurrence in float64, step by step, with resets: what every kernel is compared with.

`triton_gru.equations` is the specification of one step; this runs it over time under autograd, so
that the gradients are autograd's and share nothing with the kernels' derivatives.
"""

import torch
from torch import Tensor

from triton_gru import equations


def scan(
    gates_x: Tensor,
    h0: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    *,
    reset_after: bool,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    reset_state: Tensor | None = None,
) -> Tensor:
    """y, [T, B, D, H], differentiable; arguments as `launch_forward.scan_forward`."""
    T, _, D, _ = gates_x.shape
    ys = [[None] * D for _ in range(T)]
    for d in range(D):
        h = h0[d]
        bias = None if bias_hh is None else bias_hh[d]
        for t in reversed(range(T)) if d else range(T):
            before = h
            if resets is not None:
                row = torch.zeros_like(h) if reset_state is None else reset_state[d]
                before = torch.where(resets[t, :, d, None], row, h)
            after = equations.step(gates_x[t, :, d], before, weight_hh[d], bias, reset_after)
            h = after if lengths is None else torch.where((t < lengths)[:, None], after, h)
            ys[t][d] = h
    return torch.stack([torch.stack(row, 1) for row in ys])
