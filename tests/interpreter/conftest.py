"""Collects nothing here unless the process is one for the interpreter (see __init__.py)."""

import os
from pathlib import Path

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETING:
    from tests.interpreter import harness

    harness.install()
else:
    collect_ignore_glob = ["test_*.py"]

    def pytest_collection_modifyitems(items):
        # A file that is named on the command line is collected all the same.
        if any(item.path.parent == Path(__file__).parent for item in items):
            raise pytest.UsageError("run these tests with TRITON_INTERPRET=1 in the environment")


@pytest.fixture(autouse=INTERPRETING)
def poisoned_memory():
    """torch.empty holds NaN: what a kernel forgets to write, or reads too early, shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=INTERPRETING)
def no_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
