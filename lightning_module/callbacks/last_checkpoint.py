"""The checkpoint that a run resumes from, and when it may be written."""

import math
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from lightning_module.distributed import ranks
from lightning_module.loggers.rewind import UNLOGGED, unlogged_row
from lightning_module.run_files import LAST
from lightning_module.trainer_attributes import declared
from lightning_module.training_progress import progress


class LastCheckpoint(Checkpoint):
    """Saves `last.ckpt` after each validation, every few minutes, and at the end of a run.

    A `Checkpoint`, which Lightning calls after all other callbacks: so the file has their state.

    Args:
        checkpoint_dir: folder of the file.
        every_minutes: the longest training time that a killed run loses. Checked every
            `log_every_n_steps`.
    """

    def __init__(self, checkpoint_dir: str | Path, every_minutes: float = 10.0) -> None:
        self.path = Path(checkpoint_dir) / LAST
        self.every_minutes = every_minutes
        self._saved_step = -1
        self._saved_at = math.inf
        self._due = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._saved_at = time.monotonic()

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        # Lightning's count of logged steps is one too low in a run resumed from the last checkpoint
        # of a finished run.
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if not may_save(trainer):
            return
        if trainer.global_step % declared(trainer).log_every_n_steps == 0:
            minutes = ranks.from_rank_zero(time.monotonic() - self._saved_at) / 60
            self._due = self._due or minutes >= self.every_minutes
        if self._due:
            self._save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self._due = True  # within a step: after the step
        if between_steps(trainer):
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._saved_step != trainer.global_step:
            self._save(trainer)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[UNLOGGED] = unlogged_row(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        for logger in trainer.loggers:  # first, so that the rows before the checkpoint are on disk
            logger.save()
        trainer.save_checkpoint(self.path)
        self._saved_step, self._saved_at, self._due = trainer.global_step, time.monotonic(), False


def may_save(trainer: L.Trainer) -> bool:
    """Whether a run resumed from after this batch equals this run.

    It would not repeat a validation that follows the batch: the checkpoint is saved after it.
    """
    loop = trainer.fit_loop
    fetcher = loop._data_fetcher
    validation_follows = (
        progress(trainer) >= 1  # see ValidateAtEnd
        or (fetcher is not None and loop.epoch_loop._should_check_val_fx(fetcher))
    )
    return between_steps(trainer) and not validation_follows


def between_steps(trainer: L.Trainer) -> bool:
    """Whether no gradient is pending, as with `accumulate_grad_batches`.

    Gradients are not saved: a run resumed from within a step would differ.
    """
    batches = trainer.fit_loop.epoch_loop.batch_idx + 1
    return batches % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
