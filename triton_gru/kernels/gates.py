"""The gates of one GRU step and their derivatives, once, for every kernel.

All of it is float32, for any shape. `hidden_r`, `hidden_z` and `hidden_n` are
the products of the hidden state (or, for n with `reset_after=False`, of r * h) with the three
blocks of `weight_hh`, biases included. The formulas are those of `triton_gru/equations.py`.
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)); exp overflows to inf for x < -88 and the quotient is then exactly 0."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """(1 - e) / (1 + e), e = exp(-2 |x|), sign restored.

    2 / (1 + exp(-2x)) - 1 is one operation shorter, but rounds 1 + exp in [1, 2] before it
    subtracts; this form keeps the absolute error near half of that, and cannot overflow.
    """
    e = tl.exp(-2.0 * tl.abs(x))
    magnitude = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def blend(z, n, h):
    """The state h' = (1 - z) n + z h: exactly n at z = 0 and exactly h at z = 1."""
    return (1.0 - z) * n + z * h


@triton.jit
def candidate(x_n, r, hidden_n, RESET_AFTER: tl.constexpr):
    """The candidate state n. With `reset_after=False` r is already part of `hidden_n`."""
    if RESET_AFTER:
        return tanh(x_n + r * hidden_n)
    else:
        return tanh(x_n + hidden_n)


@triton.jit
def update_gradients(dh, z, n, h):
    """From dh' to the pre-activations of n and z: (da_n, da_z)."""
    da_n = dh * (1.0 - z) * (1.0 - n * n)
    da_z = dh * (h - n) * z * (1.0 - z)
    return da_n, da_z


@triton.jit
def reset_gradient(into_r, r):
    """da_r, where `into_r` is da_n * c (reset_after) or du * h (not reset_after)."""
    return into_r * r * (1.0 - r)
