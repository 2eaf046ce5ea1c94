"""The tests of torch's features once more, with the kernels."""

import pytest
import torch

from tests.triton_gru.counterparts import IN, B, T
from tests.triton_gru.test_torch_features_autograd import (  # noqa: F401
    test_activation_checkpointing,
    test_an_ensemble_under_vmap,
    test_backward_in_eval_mode,
    test_batched_cotangents,
    test_double_backward,
    test_forward_mode,
    test_functional_call_and_grad,
    test_grad_modes,
    test_jacobians_and_hessians,
    test_per_sample_gradients,
    test_vmap_over_the_batch,
    test_vmap_with_lengths,
)
from tests.triton_gru.test_torch_features_modules import (  # noqa: F401
    test_copies,
    test_hooks,
    test_meta_device_and_to_empty,
    test_optimizers,
    test_parametrizations,
    test_prune,
    test_replaced_and_tied_parameters,
    test_share_memory,
)
from tests.triton_gru.test_torch_features_training import (  # noqa: F401
    test_autocast_and_grad_scaler,
    test_deterministic_algorithms,
)

pytestmark = pytest.mark.parametrize("reset_after", [True, False])


@pytest.fixture
def backend():
    return "triton"


@pytest.fixture
def x():
    return torch.randn(T, B, IN)
