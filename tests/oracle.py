"""The recurrence in float64, step by step, with resets: what every kernel is compared with.

`triton_gru.equations` is the specification of one step; this runs it over time under autograd, so
that the gradients are autograd's and share nothing with the kernels' derivatives. With NaN and
infinities among the arguments it is exact too, to the place of each: a row past its end takes no
part, where a product with a mask of 0 would make NaN of what its padding holds.
"""

import torch
from torch import Tensor

from triton_gru import equations


class _Blend(torch.autograd.Function):
    """h' = (1 - z) n + z h, each derivative one product, as `equations` states them.

    Autograd's own of z is the difference of two products, which is NaN for an infinite dh', and
    torch.lerp, which `equations.step` takes, is NaN for an infinite h at z >= 0.5.
    """

    @staticmethod
    def forward(ctx, z, n, h):
        ctx.save_for_backward(z, n, h)
        return (1 - z) * n + z * h

    @staticmethod
    def backward(ctx, dh):
        z, n, h = ctx.saved_tensors
        return dh * (h - n), dh * (1 - z), dh * z


def scan(
    gates_x: Tensor,
    h0: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    *,
    reset_after: bool,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
) -> Tensor:
    """y, [T, B, D, H], differentiable; arguments as `kernels.forward.scan_forward`."""
    T, B, D, _ = gates_x.shape
    ys = [[None] * D for _ in range(T)]
    for d in range(D):
        h = h0[d]
        bias = None if bias_hh is None else bias_hh[d]
        for t in reversed(range(T)) if d else range(T):
            rows = torch.arange(B) if lengths is None else (t < lengths).nonzero()[:, 0]
            before = h[rows]
            if resets is not None:
                before = before.masked_fill(resets[t, rows, d, None], 0)
            _, z, n, _ = equations.gates(
                gates_x[t, rows, d], before, weight_hh[d], bias, reset_after
            )
            h = h.index_copy(0, rows, _Blend.apply(z, n, before))
            ys[t][d] = h
    return torch.stack([torch.stack(row, 1) for row in ys])
