"""Early ends of a run: a diverged loss, Ctrl-C, a terminated process."""

import math
import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.callbacks import EarlyStopping as LightningEarlyStopping

from lightning_module.callbacks.last_checkpoint import between_steps, may_save
from lightning_module.distributed import ranks
from lightning_module.errors import Diverged, Stopped
from lightning_module.run_files import LAST
from lightning_module.run_lock import RunLock
from lightning_module.terminal.signals import SIGNALS, Interrupted
from lightning_module.trainer_attributes import declared
from lightning_module.training_progress import progress

_UNTIL_SAVED = (
    "finishing the current step or validation, then saving. "
    "Ctrl-C ends the run at once, without saving"
)


class StopWhenDiverged(L.Callback):
    """Ends the run with `Diverged`, naming the first step whose loss was NaN or infinite.

    On a GPU the first such step is kept on the device and read every `log_every_n_steps` and before
    each validation (hence before each checkpoint), so that no step synchronizes. Several ranks
    exchange it as often, and raise the same error.
    """

    def __init__(self) -> None:
        self._first_bad: torch.Tensor | None = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any
    ) -> None:
        loss = outputs["loss"].detach()
        if self._first_bad is None:
            self._first_bad = torch.zeros((), dtype=torch.int64, device=loss.device)
        bad_now = ~torch.isfinite(loss) & (self._first_bad == 0)
        self._first_bad = torch.where(bad_now, trainer.global_step, self._first_bad)
        every_step = loss.device.type == "cpu" and trainer.world_size == 1
        if every_step or trainer.global_step % declared(trainer).log_every_n_steps == 0:
            self._check()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._check()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loss = trainer.callback_metrics.get("val_loss")
        if loss is not None and not torch.isfinite(loss):
            self._diverged(f"the validation loss after step {trainer.global_step} is {loss.item()}")

    def _check(self) -> None:
        step = math.inf if self._first_bad is None else int(self._first_bad) or math.inf
        step = ranks.agree(step, highest=False)
        if step < math.inf:
            self._diverged(f"the training loss of step {step:.0f} is NaN or infinite")

    @staticmethod
    def _diverged(what: str) -> None:
        raise Diverged(
            f"{what}: training diverged and was stopped; the checkpoints are from earlier steps. "
            "Try a lower optimizer.lr, a longer scheduler.warmup or a smaller "
            "trainer.gradient_clip_val."
        )


class EndWhenTakenOver(L.Callback):
    """Ends a run that another process has taken over (see run_lock.py) before it writes again."""

    def __init__(self, lock: RunLock) -> None:
        self.lock = lock

    def on_train_batch_end(self, *_: Any) -> None:
        self.lock.check()

    def on_validation_end(self, *_: Any) -> None:
        self.lock.check()


class StopOnSignal(Checkpoint):
    """On SIGINT or SIGTERM: finish the step, save `last.ckpt`, end the run with `Stopped`.

    A signal during a validation or just before one takes effect after it, because a resumed run
    does not repeat a validation. Several ranks exchange after each validation and every
    `log_every_n_steps` whether a signal arrived, and stop after the same step. A SIGINT after
    another signal raises `Interrupted` at once.

    A `Checkpoint`, as `LastCheckpoint` is: all other callbacks have processed the step or the
    validation after which it ends the run.
    """

    def __init__(self, checkpoint_dir: str | Path) -> None:
        self.checkpoint = Path(checkpoint_dir) / LAST
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._receive) for s in SIGNALS}

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        alone = trainer.world_size == 1
        if may_save(trainer) and (
            alone or trainer.global_step % declared(trainer).log_every_n_steps == 0
        ):
            self._stop_if_asked_to(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        over = progress(trainer) >= 1  # the run ends anyway
        if not trainer.sanity_checking and not over and between_steps(trainer):
            self._stop_if_asked_to(trainer)

    def _stop_if_asked_to(self, trainer: L.Trainer) -> None:
        number = int(ranks.agree(self.received or 0))
        if number:
            for logger in trainer.loggers:
                logger.save()
            trainer.save_checkpoint(self.checkpoint)
            raise Stopped(
                number,
                f"stopped by {signal.Signals(number).name} after step {trainer.global_step}; "
                f"saved {self.checkpoint}",
            )

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise Interrupted(number)
        if self.received is None and ranks.rank() == 0:
            name = signal.Signals(number).name
            # print might find its buffer locked by the code that the signal interrupted.
            os.write(2, f"\n{name}: {_UNTIL_SAVED}\n".encode())
        self.received = number


class ValidateAtEnd(L.Callback):
    """Validates after the last step too, whichever limit ends the run."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if progress(trainer) >= 1:
            trainer.should_stop = True  # Lightning validates once more before it stops


class EarlyStopping(LightningEarlyStopping):
    """Ends a run whose validation loss no longer falls; see `callbacks=early_stopping`.

    Its state is in the checkpoints: a resumed run ends at the same validation.

    Args:
        patience: consecutive validations without a new lowest `val_loss` that end the run.
        min_delta: minimum decrease in nats per token that counts as lower.

    Raises:
        ValueError: one of them is out of range.
    """

    def __init__(self, patience: int = 3, min_delta: float = 0.0) -> None:
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
            raise ValueError(f"patience must be a whole number of at least 1; got {patience!r}")
        if isinstance(min_delta, bool) or not isinstance(min_delta, (int, float)) or min_delta < 0:
            raise ValueError(f"min_delta must be a number of at least 0; got {min_delta!r}")
        # After every validation, and before the checkpoint that follows it.
        super().__init__(
            "val_loss", min_delta, patience, check_finite=False, check_on_train_epoch_end=False
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # The patience is the current setting, not the checkpoint's.
        super().load_state_dict({**state_dict, "patience": self.patience})
