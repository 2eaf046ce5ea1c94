import pytest

from lightning_module.data.shards import index, reading, tables, tokens
from tests.lightning_module.data.shards.making import FaultyStore


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_GRU_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def store():
    """A store in memory that can fail, empty."""
    FaultyStore.reset()
    yield FaultyStore
    FaultyStore.reset()


@pytest.fixture
def block(monkeypatch):
    """Sets the size of a block, in bytes."""

    def set_size(size):
        for module in (index, tables, tokens):
            monkeypatch.setattr(module, "BLOCK", size)

    return set_size


@pytest.fixture
def impatient(monkeypatch):
    """Reads are given up after a second."""
    for name, seconds in {"PATIENCE": 1.0, "ATTEMPT": 0.3, "PAUSE": 0.01}.items():
        monkeypatch.setattr(reading, name, seconds)
