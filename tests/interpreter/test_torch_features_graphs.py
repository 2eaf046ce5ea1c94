"""What traces a model, with the kernels."""

import pytest

from tests.triton_gru.test_torch_features_graphs import (  # noqa: F401
    fresh_dynamo,
    test_compiles_once_for_all_sizes,
    test_export,
    test_symbolic_trace,
)


@pytest.fixture
def backend():
    return "triton"
