import lightning as L
import pytest
from hydra.utils import instantiate
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.profilers import SimpleProfiler

from benchmarks.training_overhead import composed, profile


def test_its_settings_make_a_trainer(tmp_path):
    trainer = instantiate(composed(steps=3, run_dir=str(tmp_path)).trainer, logger=False)
    assert trainer.max_steps == 3
    assert trainer.num_devices == 1


@pytest.fixture
def profiler(tmp_path):
    """Of three steps of a training, as Lightning names its parts today."""
    profiler = SimpleProfiler()
    L.Trainer(
        max_steps=3, profiler=profiler, accelerator="cpu", limit_val_batches=0, logger=False,
        gradient_clip_val=1.0, default_root_dir=tmp_path, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[L.Callback()],
    ).fit(BoringModel())  # fmt: skip
    return profiler


def test_every_part_of_a_step_is_found(profiler):
    shares = dict(profile(profiler))
    seconds = profiler.recorded_durations
    whole = seconds["run_training_epoch"][0]
    chunks = seconds["[_TrainingEpochLoop].train_dataloader_next"]
    assert len(chunks) >= 3
    assert shares["the next chunk"] == pytest.approx(sum(chunks) / whole)
    assert all(0 < share < 1 for share in shares.values())


def test_a_part_that_is_not_found_is_an_error(profiler):
    del profiler.recorded_durations["[_TrainingEpochLoop].train_dataloader_next"]
    with pytest.raises(LookupError, match="the next chunk"):
        profile(profiler)
