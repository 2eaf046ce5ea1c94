"""Skips without a GPU, and keeps one broken kernel from failing every test after it."""

import os

# Deterministic algorithms, which poison torch.empty, need it of cuBLAS before CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

from triton_gru import check

HERE = os.path.dirname(__file__)
# Seconds for one test; under compute-sanitizer it takes many more.
TIMEOUT = int(os.environ.get("TRITON_GRU_TEST_TIMEOUT", "120"))
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available() and not INTERPRETING

if INTERPRETING:
    from tests.interpreter import harness

    harness.install()

try:
    import triton  # noqa: F401
except ImportError:
    collect_ignore_glob = ["test_*.py"]


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: nothing the interpreter could stand in for")


def pytest_collection_modifyitems(items):
    for item in items:
        if not str(item.path).startswith(HERE):
            continue
        # A kernel that hangs holds the interpreter in a CUDA call, which no signal interrupts: the
        # other method ends the process, which xdist replaces.
        item.add_marker(pytest.mark.gpu)
        item.add_marker(pytest.mark.timeout(TIMEOUT, method="thread"))
        if not CUDA and not INTERPRETING:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        elif not CUDA and "cuda" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a real CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """After an illegal access nothing works in a process: end it, or say so and stop.

    Under xdist (`-n 1`) a fresh process takes over; this test counts as crashed.
    """
    report = yield
    if report.when == "teardown" and CUDA and str(item.path).startswith(HERE):
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            if "PYTEST_XDIST_WORKER" in os.environ:
                os._exit(3)
            pytest.exit(f"{item.nodeid} broke the device's context: {error}", returncode=3)
    return report


@pytest.fixture(autouse=True)
def reported_errors():
    """No test leaves a timeout for the next one to raise."""
    yield
    if CUDA or INTERPRETING:
        check()
