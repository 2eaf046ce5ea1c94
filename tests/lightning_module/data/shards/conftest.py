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
    """Reads are given up after 0.6 s."""
    for name, seconds in {"PATIENCE": 0.6, "ATTEMPT": 0.2, "PAUSE": 0.01}.items():
        monkeypatch.setattr(reading, name, seconds)


@pytest.fixture
def train_on(tmp_path):
    """Trains on shards in this process, a few steps of the smallest model."""

    def run(url, run_dir, *overrides, **how):
        from hydra import compose, initialize_config_dir

        from lightning_module import train
        from lightning_module.lightning_warnings import quiet
        from lightning_module.settings.config_folder import CONFIGS

        quiet()
        small = [
            *("data=shards", f"data.url={url}", f"run_dir={run_dir}", "model.hidden_size=8"),
            *("model.embedding_size=4", "data.batch_size=3", "data.seq_len=8", "logger=csv"),
            *("trainer.accelerator=cpu", "trainer.log_every_n_steps=1", "trainer.max_steps=9"),
            *("trainer.max_epochs=-1", "trainer.check_val_every_n_epoch=null"),
            *("trainer.val_check_interval=4", "callbacks.samples.num_sentences=0"),
            *("trainer.num_sanity_val_steps=0", "trainer.enable_model_summary=false"),
        ]
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            config = compose("train", [*small, *map(str, overrides)])
        return train.train(config, **how)

    return run
