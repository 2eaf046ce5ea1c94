"""The factors of dh and the gates' gradients of all steps, against autograd in float64."""

import pytest
import torch

from triton_gru.kernels.factors import factors, gates_gradients
from triton_gru.plan.plan import padded_size

T, B, D, H = 3, 5, 2, 131  # more rows and more columns than a program takes
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def made(seed=0):
    g = torch.Generator().manual_seed(seed)
    gates_x, gates_h = (torch.randn(T, B, D, 3 * H, generator=g) for _ in range(2))
    before = [torch.randn(T, B, H, generator=g) for _ in range(D)]
    return gates_x, gates_h, before, g


def leaves(gates_x, gates_h, before):
    """The input parts and the hidden part of n, with gradients; and h."""
    parts = [*gates_x.double().chunk(3, -1), *gates_h.double().chunk(3, -1)]
    x_r, x_z, x_n, g_r, g_z, c = (part.clone().requires_grad_() for part in parts)
    h = torch.stack(before, 2).double()
    return torch.sigmoid(x_r + g_r), torch.sigmoid(x_z + g_z), x_n, c, h, (x_r, x_z, x_n, c)


def gradients(gates_x, gates_h, before, dh, du, reset_after):
    """By the input parts of r, z and n, and by the hidden part of n."""
    r, z, x_n, c, h, by = leaves(gates_x, gates_h, before)
    n = torch.tanh(x_n + (r * c if reset_after else c))
    outputs, gradients = [(1 - z) * n + z * h], [dh]
    if not reset_after:  # c is what u = r h was multiplied to: its gradient by r is du h
        outputs, gradients = [*outputs, r * h], [dh, du]
    return torch.autograd.grad(outputs, by, gradients)


@pytest.mark.parametrize("reset_after", [True, False])
def test_factors(reset_after):
    gates_x, gates_h, before, _ = made()
    ones = torch.ones(T, B, D, H, dtype=torch.double)
    by_r, by_z, by_n, by_c = gradients(gates_x, gates_h, before, ones, ones, reset_after)
    found = factors(gates_x, gates_h, before, padded_size(H), reset_after)
    exact = torch.stack([by_r, by_z, by_c if reset_after else by_n], 3)
    torch.testing.assert_close(found[..., :H].double(), exact, **CLOSE)
    assert found.shape[-1] == 144 and not found[..., H:].any()


@pytest.mark.parametrize("with_lengths", [True, False])
@pytest.mark.parametrize("reset_after", [True, False])
def test_gates_gradients(reset_after, with_lengths):
    gates_x, gates_h, before, g = made(1)
    dh, du = (torch.randn(T, B, D, padded_size(H), generator=g) for _ in range(2))
    lengths = torch.tensor([3, 0, 1, 2, 3]) if with_lengths else None
    d_gates, d_c = gates_gradients(gates_x, gates_h, before, dh, du, lengths, reset_after)
    exact = gradients(
        gates_x, gates_h, before, dh[..., :H].double(), du[..., :H].double(), reset_after
    )
    if with_lengths:
        past = torch.arange(T)[:, None] >= lengths
        exact = [one.masked_fill(past[..., None, None], 0) for one in exact]
    torch.testing.assert_close(d_gates.double(), torch.stack(exact[:3], 3), **CLOSE)
    torch.testing.assert_close(d_c.double(), exact[3] if reset_after else exact[2], **CLOSE)
