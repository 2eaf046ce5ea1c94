"""The gates behind what the kernels return."""

import pytest
import torch

import triton_gru
from tests.interpreter import harness
from tests.tolerances import assert_close


@pytest.mark.parametrize("reset_after", [True, False])
def test_trace_explains_the_states_of_the_kernels(reset_after):
    torch.manual_seed(0)
    options = {"num_layers": 2, "bidirectional": True, "reset_after": reset_after}
    ours = triton_gru.GRU(5, 20, backend="triton", **options)
    reference = triton_gru.GRU.from_torch(ours, backend="reference")
    x = torch.randn(4, 3, 5)
    with harness.interleaving(1), torch.no_grad():
        mine, (y, _) = ours.trace(x), ours(x)
    assert_close(torch.cat([*mine.h[-1]], -1), y)
    torch.testing.assert_close(list(mine), list(reference.trace(x)), rtol=2e-5, atol=2e-5)
