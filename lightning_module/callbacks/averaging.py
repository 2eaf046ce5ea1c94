"""Averages of the weights over a run, beyond Lightning's exponential one."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import WeightAveraging

from lightning_module.training_progress import progress


class StochasticWeightAveraging(WeightAveraging):
    """The mean of the weights after every step of the last part of a run (Izmailov et al. 2018).

    Lightning's callback of this name counts epochs and sets the learning rate; this one follows the
    progress of the run, in steps or time, and leaves the rate to the scheduler. Before the mean
    begins, it is the current weights.

    Args:
        start: progress at which the mean begins, 0 to 1.
    """

    def __init__(self, start: float = 0.75) -> None:
        super().__init__()
        if not 0 <= start < 1:
            raise ValueError(f"averaging start must be at least 0 and below 1; got {start!r}")
        self.start = start
        self._begun = False
        self._trainer: L.Trainer | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Creates the model that holds the mean."""
        self._trainer = trainer
        super().setup(trainer, pl_module, stage)

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """After every step."""
        if step_idx is None or self._average_model is None or self._trainer is None:
            return False
        if not self._begun:
            self._average_model.n_averaged.zero_()  # the next weights replace the current mean
            self._begun = progress(self._trainer) >= self.start
        return True

    def state_dict(self) -> dict[str, Any]:
        """Whether the mean has begun."""
        return super().state_dict() | {"begun": self._begun}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues the mean."""
        super().load_state_dict(state_dict)
        self._begun = state_dict["begun"]
