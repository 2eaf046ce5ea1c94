import importlib.util
import shutil
import signal
from pathlib import Path

import pytest
import torch

from triton_gru.engines.cpu import library

# The layer and its kernels are tested with torch, triton, numpy and pytest alone.
if importlib.util.find_spec("hydra") is None:
    collect_ignore = ["lightning_module", "test_packaging.py"]

# torch.testing._internal calls this when it is imported, and nothing in the process could set a
# flag of torch.backends from then on, as the benchmarks do.
torch.backends.disable_global_flags = lambda: None


# A shell starts what it runs in the background with Ctrl-C ignored, and that is inherited: the
# commands that tests interrupt would not hear it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def engine_cache(tmp_path_factory):
    """A cache folder with the CPU engine, which each process would build in 2 to 10 s."""
    folder = tmp_path_factory.mktemp("engine")
    if library.obstacle() is None:
        shutil.copytree(Path(library.library()._name).parent, folder / "cpu")
    return folder


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory():
    """Fills what torch.empty returns with NaN, so that reading what was never written shows."""
    torch.use_deterministic_algorithms(True)  # without it, the filling is off
    yield
    torch.use_deterministic_algorithms(False)
