"""The GRU cell in plain torch, both variants, forward and derivative: every kernel's reference.

One step takes the state `h` to `h'`. With gates in torch's order r (reset), z (update), n (new):

    a_r = W_ir x + b_ir + W_hr h + b_hr          r = sigmoid(a_r)
    a_z = W_iz x + b_iz + W_hz h + b_hz          z = sigmoid(a_z)
    reset_after=True  (nn.GRU, cuDNN):   c = W_hn h + b_hn   n = tanh(W_in x + b_in + r * c)
    reset_after=False (Cho et al. 2014): u = r * h           n = tanh(W_in x + b_in + W_hn u + b_hn)
    h' = (1 - z) * n + z * h

and back, given dh':

    dn = dh' (1-z)      da_n = dn (1-n^2)      dz = dh' (h-n)     da_z = dz z (1-z)
    reset_after=True :  dc = da_n r            da_r = da_n c r (1-r)
                        dh = dh' z + W_hr^T da_r + W_hz^T da_z + W_hn^T dc
    reset_after=False:  du = W_hn^T da_n       da_r = du h r (1-r)
                        dh = dh' z + du r + W_hr^T da_r + W_hz^T da_z

`scan_forward` and `scan_backward` run these over a whole sequence and are the engine called
"reference". What does not depend on the step before is one product over all steps. `scan_backward`
is made of differentiable torch operations, so that autograd can record it for a second derivative.

Shapes, the same for every engine (T steps, B rows, D directions, H hidden_size):

    gates_x    [T, B, D, 3H]       W_ih x + b_ih
    h0         [D, B, H]
    weight_hh  [D, 3H, H]          bias_hh [D, 3H] or None
    y          [T, B, D, H]        every state; direction 1 runs from the last step to the first
    lengths    [B] int64 or None   row b has the steps 0 to lengths[b]-1 and then keeps its state
    resets     [T, B, D] bool or None   where true, the state is zero before that step, in the order
                                   in which the direction takes its steps; false past a row's end
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-5  # as torch.nn.LayerNorm


class LayerWeights(NamedTuple):
    """The parameters of one layer, its directions stacked.

    Attributes:
        weight_ih: [D, 3H, I].
        weight_hh: [D, 3H, H].
        bias_ih: [D, 3H] or None.
        bias_hh: [D, 3H] or None.
    """

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None = None
    bias_hh: Tensor | None = None


class ScanOptions(NamedTuple):
    """What a scan takes besides tensors to compute with; see the module's docstring.

    Attributes:
        reset_after: The variant.
        lengths: int64 [B] or None.
        resets: bool [T, B, D] or None.
    """

    reset_after: bool
    lengths: Tensor | None = None
    resets: Tensor | None = None


def gates(
    gates_x: Tensor,
    h: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    reset_after: bool,
    gain: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gates of one step, or of many steps at once when their states are known.

    Args:
        gates_x: W_ih x + b_ih, [..., 3H].
        h: The state before the step, [..., H].
        weight_hh: [3H, H].
        bias_hh: [3H] or None.
        reset_after: The variant, see the module's docstring.
        gain: [3H], scales the normalised products with weight_hh; None: no normalisation (see
            `engines.regularized`).

    Returns:
        r, z, n and the fourth of the formulas: c with reset_after, else u. Each [..., H].
    """
    H = h.shape[-1]
    x_rz, x_n = gates_x[..., : 2 * H], gates_x[..., 2 * H :]
    if reset_after:
        gates_h = _hidden(h, weight_hh, bias_hh, gain)
        r, z = (x_rz + gates_h[..., : 2 * H]).sigmoid_().chunk(2, -1)
        c = gates_h[..., 2 * H :]
        return r, z, torch.addcmul(x_n, r, c).tanh_(), c
    b_rz, b_n = (None, None) if bias_hh is None else (bias_hh[: 2 * H], bias_hh[2 * H :])
    g_rz, g_n = (None, None) if gain is None else (gain[: 2 * H], gain[2 * H :])
    r, z = (x_rz + _hidden(h, weight_hh[: 2 * H], b_rz, g_rz)).sigmoid_().chunk(2, -1)
    u = r * h
    return r, z, (x_n + _hidden(u, weight_hh[2 * H :], b_n, g_n)).tanh_(), u


def _hidden(state: Tensor, weight: Tensor, bias: Tensor | None, gain: Tensor | None) -> Tensor:
    if gain is None:
        return F.linear(state, weight, bias)
    products = normalise(F.linear(state, weight), gain, state.shape[-1])
    return products if bias is None else products + bias


def normalise(products: Tensor, gain: Tensor, hidden_size: int) -> Tensor:
    """Each gate's products, [..., H] of [..., kH], to mean 0 and variance 1, times the gain."""
    gates = products.unflatten(-1, (-1, hidden_size))
    return F.layer_norm(gates, (hidden_size,), eps=NORM_EPS).flatten(-2) * gain


def step(
    gates_x: Tensor, h: Tensor, weight_hh: Tensor, bias_hh: Tensor | None, reset_after: bool
) -> Tensor:
    """The state after one step, [B, H]; arguments as for `gates`."""
    _, z, n, _ = gates(gates_x, h, weight_hh, bias_hh, reset_after)
    # Exact at both ends: z = 0 gives n, z = 1 gives h to the bit, which (h - n) * z + n does not.
    return torch.lerp(n, h, z)


def scan_forward(
    gates_x: Tensor,
    h0: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    *,
    reset_after: bool,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
) -> Tensor:
    """All states of a layer, [T, B, D, H]; arguments as in the module's docstring."""
    gates_x = hold_past_end(gates_x, lengths)
    directions = []
    for d in range(h0.shape[0]):
        h, weight, bias = h0[d], weight_hh[d], None if bias_hh is None else bias_hh[d]
        states = []
        reset = _each_step(resets, d, len(gates_x))
        for gates_t, reset_t in zip(
            _in_order(gates_x[:, :, d], d), _in_order(reset, d), strict=True
        ):
            h = step(gates_t, _reset(h, reset_t), weight, bias, reset_after)
            states.append(h.unsqueeze(1))
        directions.append(torch.stack(_in_order(states, d)))
    # Not a view: autograd forbids in-place changes of a view that a Function returns.
    return directions[0] if len(directions) == 1 else torch.cat(directions, 2)


def scan_backward(
    dy: Tensor,
    y: Tensor,
    gates_x: Tensor,
    h0: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    *,
    reset_after: bool,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The derivative of `scan_forward`.

    Args:
        dy: The gradient of the loss with respect to y, [T, B, D, H].
        y: The result of `scan_forward`; the gates are recomputed from it, all steps in one product.
        gates_x: As given to `scan_forward`, likewise the following.
        h0: As there.
        weight_hh: As there.
        bias_hh: As there.
        reset_after: As there.
        lengths: As there.
        resets: As there.

    Returns:
        The derivatives by gates_x, h0, weight_hh and bias_hh, in their shapes; None without a bias.
    """
    gates_x = hold_past_end(gates_x, lengths)
    backward = _backward_reset_after if reset_after else _backward_reset_before
    directions = []
    for d in range(h0.shape[0]):
        weight, bias = weight_hh[d], None if bias_hh is None else bias_hh[d]
        before = [y[1:, :, d], h0[d : d + 1]] if d else [h0[d : d + 1], y[:-1, :, d]]
        h = _reset(torch.cat(before), None if resets is None else resets[:, :, d, None])
        gates_all = gates(gates_x[:, :, d], h, weight, bias, reset_after)
        reset = _each_step(resets, d, len(y))
        directions.append(backward(dy[:, :, d], h, *gates_all, weight, reset, d))
    d_gates_x, dh0, dweight_hh, dbias_hh = zip(*directions, strict=True)
    return (
        stack(d_gates_x, 2),
        stack(dh0),
        stack(dweight_hh),
        None if bias_hh is None else stack(dbias_hh),
    )


# The two functions below take all steps of one direction, [T, B, H] each, and return the
# derivatives by gates_x [T, B, 3H], h0 [B, H], weight_hh and bias_hh. Every factor that does not
# depend on dh' is formed for all steps before the loop; a step of reset_after is then four
# operations: dh' by addition, the gates' derivatives and dh' z by scaling, and one product.


def _backward_reset_after(dy, h, r, z, n, c, weight, reset, d):
    by_n = (1 - z) * (1 - n * n)  # da_n = dh' by_n
    by_c = by_n * r
    by_h = torch.stack([by_c * c * (1 - r), (h - n) * z * (1 - z), by_c], 2)
    dh, dh_after, d_gates_h = torch.zeros_like(h[0]), [], []
    # reshape, because is_grads_batched does not support flatten
    d_gates_shape = (h.shape[1], 3 * h.shape[2])
    for dy_t, z_t, by_h_t, reset_t in _against_order(d, dy, z, by_h, reset):
        dh_t = dy_t + dh
        d_gates_t = (by_h_t * dh_t.unsqueeze(1)).reshape(d_gates_shape)
        dh = _reset(torch.addmm(dh_t * z_t, d_gates_t, weight), reset_t)
        dh_after.append(dh_t)
        d_gates_h.append(d_gates_t)
    dh_after, d_gates_h = (torch.stack(_in_order(s, 1 - d)) for s in (dh_after, d_gates_h))
    d_gates_x = torch.cat([d_gates_h[..., : 2 * h.shape[-1]], dh_after * by_n], -1)
    return d_gates_x, dh, _over_all_steps(d_gates_h, h), d_gates_h.sum((0, 1))


def _backward_reset_before(dy, h, r, z, n, u, weight, reset, d):
    H = h.shape[-1]
    by_n = (1 - z) * (1 - n * n)
    by_z = (h - n) * z * (1 - z)
    by_r = h * r * (1 - r)  # da_r = du by_r
    dh, d_gates = torch.zeros_like(h[0]), []
    factors = (r, z, by_r, by_z, by_n)
    for dy_t, r_t, z_t, by_r_t, by_z_t, by_n_t, reset_t in _against_order(d, dy, *factors, reset):
        dh_t = dy_t + dh
        da_n = dh_t * by_n_t
        du = da_n @ weight[2 * H :]
        da_rz = torch.cat([du * by_r_t, dh_t * by_z_t], 1)
        dh = torch.addmm(torch.addcmul(dh_t * z_t, du, r_t), da_rz, weight[: 2 * H])
        dh = _reset(dh, reset_t)
        d_gates.append(torch.cat([da_rz, da_n], 1))
    d_gates = torch.stack(_in_order(d_gates, 1 - d))
    by_weight = [
        _over_all_steps(d_gates[..., : 2 * H], h),
        _over_all_steps(d_gates[..., 2 * H :], u),
    ]
    return d_gates, dh, torch.cat(by_weight), d_gates.sum((0, 1))


def _each_step(resets: Tensor | None, direction: int, steps: int) -> list[Tensor | None]:
    """For each step the rows of the direction that are reset, [B, 1], or None."""
    return [None] * steps if resets is None else list(resets[:, :, direction, None])


def _reset(state: Tensor, reset: Tensor | None) -> Tensor:
    """Zero where reset: the state before a step, and the derivative by the one before that."""
    return state if reset is None else state.masked_fill(reset, 0)


def stack(directions: list[Tensor] | tuple[Tensor, ...], dim: int = 0) -> Tensor:
    """torch.stack, without its copy where there is one direction."""
    return directions[0].unsqueeze(dim) if len(directions) == 1 else torch.stack(directions, dim)


def _over_all_steps(d_gates: Tensor, state: Tensor) -> Tensor:
    """Sum of the outer products d_gates state^T over steps and rows."""
    T, B, H = state.shape
    return d_gates.reshape(T * B, d_gates.shape[-1]).t() @ state.reshape(T * B, H)


def _in_order(steps, direction: int) -> list[Tensor]:
    """The steps of a tensor or list in the order in which the direction takes them."""
    steps = list(steps)
    return steps[::-1] if direction else steps


def _against_order(direction: int, *tensors: Tensor):
    """Steps of several tensors together, the last one that the direction takes first."""
    return zip(*(_in_order(tensor, 1 - direction) for tensor in tensors), strict=True)


def hold_past_end(gates_x: Tensor, lengths: Tensor | None) -> Tensor:
    """Past a row's end, +inf for z: z = 1 copies the state exactly, and no gate gets a gradient."""
    if lengths is None:
        return gates_x
    H = gates_x.shape[-1] // 3
    hold = gates_x.new_zeros(3, H)
    hold[1] = torch.inf
    over = past_end(lengths, gates_x.shape[0])
    return torch.where(over[:, :, None, None], hold.flatten(), gates_x)


def past_end(lengths: Tensor, steps: int) -> Tensor:
    """True past the end of a row, bool [T, B], from lengths [B]."""
    return torch.arange(steps, device=lengths.device).unsqueeze(1) >= lengths
