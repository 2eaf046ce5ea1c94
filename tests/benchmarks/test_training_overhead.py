import pytest
from hydra.utils import instantiate
from lightning.pytorch.profilers import SimpleProfiler

from benchmarks.training_overhead import composed, profile


def test_its_settings_make_a_trainer(tmp_path):
    trainer = instantiate(composed(steps=3, run_dir=str(tmp_path)).trainer, logger=False)
    assert trainer.max_steps == 3
    assert trainer.num_devices == 1


def test_shares_of_a_profile_name_every_second_once():
    profiler = SimpleProfiler()
    profiler.recorded_durations |= {
        "run_training_epoch": [10.0],
        "run_training_batch": [9.0],
        "[Strategy]SingleDeviceStrategy.training_step": [1.0, 2.0],
        "[Strategy]SingleDeviceStrategy.backward": [4.0],
        "[_TrainingEpochLoop].train_dataloader_next": [0.5],
        "[Callback]Throughput.on_train_batch_end": [0.25],
        "[Callback]Throughput.on_validation_end": [7.0],
    }
    shares = dict(profile(profiler))
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["forward"] == pytest.approx(0.3)
    assert shares["the next chunk"] == pytest.approx(0.05)
    assert shares["callbacks"] == pytest.approx(0.025)
    assert shares["the rest: optimizer, logging, loops"] == pytest.approx(0.225)
