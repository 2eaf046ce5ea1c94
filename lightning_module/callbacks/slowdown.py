"""Reports when a run has become much slower."""

import time
from typing import Any

import lightning as L

from lightning_module.data.chunks import Chunk

# Two consecutive windows: a single one is slow if the process was stopped for a while, or if
# torch.compile compiles for a new shape.
WINDOWS = 2


class NoteSlowdown(L.Callback):
    """Prints a line when the speed falls below a share of the best speed of this process.

    The speed is measured over windows of training time, without validations and the writing of
    checkpoints.

    Args:
        share: share of the best speed.
        window_seconds: length of a window.
        every_minutes: minimum time between two such lines.
    """

    def __init__(
        self, share: float = 0.2, window_seconds: float = 5.0, every_minutes: float = 30.0
    ) -> None:
        self.share, self.window_seconds, self.every_minutes = share, window_seconds, every_minutes
        self._since: float | None = None
        self._seconds = 0.0  # of this window, as are the tokens
        self._tokens = 0
        self._best = 0.0
        self._slow_windows = 0
        self._said_at = float("-inf")

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock."""
        if self._since is None:
            self._since = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Chunk, *_: Any
    ) -> None:
        """End the window if it is long enough."""
        now = time.monotonic()
        self._tokens += batch.token_count()
        self._seconds += now - (now if self._since is None else self._since)
        self._since = now
        if self._seconds < self.window_seconds:
            return
        speed = self._tokens / self._seconds
        self._seconds, self._tokens = 0.0, 0
        self._best = max(self._best, speed)
        self._slow_windows = self._slow_windows + 1 if speed < self.share * self._best else 0
        due = now - self._said_at >= 60 * self.every_minutes
        if self._slow_windows >= WINDOWS and due and trainer.is_global_zero:
            self._said_at = now
            cpu = pl_module.device.type == "cpu"
            print(
                f"step {trainer.global_step}: {speed:,.0f} tokens/s, less than {self.share:.0%} of "
                f"this run's best, {self._best:,.0f}"
                + "; other processes may be using the processors"
                * cpu,
                flush=True,
            )

    def on_validation_start(self, *_: Any) -> None:
        """Stop the clock until the next training batch."""
        self._since = None

    def on_save_checkpoint(self, *_: Any) -> None:
        """Stop the clock until the checkpoint is written and the next batch begins."""
        self._since = None
