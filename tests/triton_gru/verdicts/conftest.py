"""Each test has a cache of its own and a process that has decided nothing."""

import pytest

from triton_gru.verdicts import deciding, store


def forget():
    """As in a new process."""
    for known in (store._here, store._warned, deciding._decided, deciding._told):
        known.clear()
    store._valid.cache_clear()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("TRITON_GRU_CACHE", str(folder))
    for name in ("TRITON_GRU_VERDICTS", "TRITON_GRU_CHECK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(store, "_shipped", lambda: ())
    forget()
    yield folder
    forget()
