"""The progress of a run, on which learning rate, progress bar and remaining time are based."""

import math
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Timer

from lightning_module.distributed import ranks
from lightning_module.trainer_attributes import declared


class SharedClock(L.Callback):
    """The share of `max_time` that has passed, by the clock of rank 0 for all ranks.

    With clocks of their own, ranks would have different learning rates. Read every
    `log_every_n_steps`.
    """

    def __init__(self) -> None:
        self.spent = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reads the clock."""
        self.spent = ranks.from_rank_zero(_time_spent(trainer))

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Reads the clock."""
        if trainer.global_step % declared(trainer).log_every_n_steps == 0:
            self.spent = ranks.from_rank_zero(_time_spent(trainer))


def _time_spent(trainer: L.Trainer) -> float:
    for timer in declared(trainer).callbacks:
        if isinstance(timer, Timer) and (left := timer.time_remaining()) is not None:
            spent = timer.time_elapsed()
            return spent / max(spent + left, 1e-9)
    return 0.0


def progress(trainer: L.Trainer) -> float:
    """Progress of the run, from 0 to 1.

    A run ends at `max_steps`, `max_epochs` or `max_time`, whichever comes first, so the progress is
    the largest of the three shares. A schedule of it is fully annealed at the end of a run on a
    slow machine too, where the time limit comes before the steps.
    """
    shares = [0.0]
    if trainer.max_steps > 0:
        shares.append(trainer.global_step / trainer.max_steps)
    batches = trainer.num_training_batches
    if trainer.max_epochs and trainer.max_epochs > 0 and 0 < batches < math.inf:
        steps_an_epoch = math.ceil(batches / trainer.accumulate_grad_batches)
        shares.append(trainer.global_step / (steps_an_epoch * trainer.max_epochs))
    clock = next((c for c in declared(trainer).callbacks if isinstance(c, SharedClock)), None)
    shares.append(_time_spent(trainer) if clock is None else clock.spent)
    return min(1.0, max(shares))
