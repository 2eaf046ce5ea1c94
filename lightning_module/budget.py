"""How much of a run is done: the one clock of the learning rate, the progress bar and the ETA."""

import math

import lightning as L
from lightning.pytorch.callbacks import Timer


def budget_used(trainer: L.Trainer) -> float:
    """Share of the training budget that is spent, from 0 to 1.

    A run ends at `max_steps`, `max_epochs` or `max_time`, whichever comes first, so the share spent
    is the largest of the three. A schedule that follows it is fully annealed at the end of a run on
    a slow machine too, where the time limit comes before the steps.
    """
    shares = [0.0]
    if trainer.max_steps > 0:
        shares.append(trainer.global_step / trainer.max_steps)
    batches = trainer.num_training_batches
    if trainer.max_epochs and trainer.max_epochs > 0 and 0 < batches < math.inf:
        steps_an_epoch = math.ceil(batches / trainer.accumulate_grad_batches)
        shares.append(trainer.global_step / (steps_an_epoch * trainer.max_epochs))
    for timer in trainer.callbacks:
        if isinstance(timer, Timer) and (left := timer.time_remaining()) is not None:
            spent = timer.time_elapsed()
            shares.append(spent / max(spent + left, 1e-9))
    return min(1.0, max(shares))
