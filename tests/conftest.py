import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory():
    """Fills what torch.empty returns with NaN, so that reading what was never written shows."""
    torch.use_deterministic_algorithms(True)  # without it, the filling is off
    yield
    torch.use_deterministic_algorithms(False)
