"""A run whose data cannot be read any more saves before it ends."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from lightning_module.callbacks.last_checkpoint import between_steps, may_save
from lightning_module.callbacks.stopping import StopOnSignal
from lightning_module.data.loading import ShardLoader
from lightning_module.distributed import ranks
from lightning_module.errors import StoreError
from lightning_module.run_files import LAST
from lightning_module.trainer_attributes import declared
from lightning_module.training_progress import progress


class StopWhenStoreFails(Checkpoint):
    """With `data=shards`: saves `last.ckpt` and raises `StoreError` if the store fails.

    After a step it waits until the tokens of the next step are in memory, which the loader has had
    read ahead. So the store fails between two steps, where a checkpoint is exact, and not within
    an accumulated one. Several ranks wait every `log_every_n_steps`, for the tokens of as many
    steps, and exchange whether a store failed: all save after the same step. A rank whose tokens
    are used up before that raises the error, and the others end as they do when a rank fails.

    A validation that cannot read ends early on its rank. When all ranks are at its end, they save
    a checkpoint from which the resumed run begins with the validation.

    A `Checkpoint`, as `LastCheckpoint` is; before it and before `StopOnSignal`, for which it stops
    waiting when a signal arrives.
    """

    def __init__(self, checkpoint_dir: str | Path) -> None:
        self.checkpoint = Path(checkpoint_dir) / LAST

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        loader = trainer.train_dataloader
        if not isinstance(loader, ShardLoader) or not between_steps(trainer):
            return
        every = 1 if trainer.world_size == 1 else declared(trainer).log_every_n_steps
        due = trainer.global_step % every == 0 or trainer.is_last_batch
        if not due or progress(trainer) >= 1:  # the run ends anyway
            return
        failure: str | None = None
        try:
            loader.wait_for(every * trainer.accumulate_grad_batches, self._signal(trainer))
        except StoreError as error:
            failure = str(error)
        failure = _of_any_rank(failure)
        # Where a validation follows, it comes first, and `LastCheckpoint` saves after it.
        if failure and may_save(trainer):
            self._save_and_stop(trainer, failure)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if isinstance(trainer.val_dataloaders, ShardLoader) and not trainer.sanity_checking:
            trainer.val_dataloaders.ends_early = True

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loader = trainer.val_dataloaders
        if not isinstance(loader, ShardLoader) or trainer.sanity_checking:
            return
        failure = _of_any_rank(str(loader.failure) if loader.failure else None)
        if not failure:
            return
        if progress(trainer) >= 1 or not between_steps(trainer):
            # A run resumed from its last step would do nothing. From an earlier checkpoint it does
            # the steps and this validation again.
            raise StoreError(failure)
        # As if saved within the first step of the validation: Lightning resumes such a run with the
        # validation, from its beginning.
        validation = trainer.fit_loop.epoch_loop.val_loop.batch_progress
        validation.total.reset_on_restart()
        validation.current.reset()
        validation.increment_ready()
        validation.increment_started()
        self._save_and_stop(trainer, failure)

    def _signal(self, trainer: L.Trainer) -> Callable[[], bool]:
        """Whether a signal asks the run to end."""
        stopping = [c for c in declared(trainer).callbacks if isinstance(c, StopOnSignal)]
        return lambda: any(callback.received is not None for callback in stopping)

    def _save_and_stop(self, trainer: L.Trainer, failure: str) -> None:
        for logger in trainer.loggers:
            logger.save()
        trainer.save_checkpoint(self.checkpoint)
        raise StoreError(
            f"{failure}. Stopped after step {trainer.global_step}; saved {self.checkpoint}"
        )


def _of_any_rank(failure: str | None) -> str | None:
    """The failure of one of the ranks that have one; collective."""
    if not ranks.agree(failure is not None):
        return None
    return ranks.from_rank_zero(next(filter(None, ranks.gathered(failure)), None))
