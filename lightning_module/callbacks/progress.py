"""Progress and speed of a run: a bar in a terminal, plain lines anywhere else."""

import sys
import time
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.progress import Progress, TaskID

from lightning_module.data.chunks import Chunk
from lightning_module.terminal.progress_bars import progress_bars
from lightning_module.trainer_attributes import declared
from lightning_module.training_progress import progress


class Throughput(L.Callback):
    """Logs `tokens_per_second`: tokens trained on over the time spent training, without validation.

    Tokens of all ranks.
    """

    def __init__(self) -> None:
        self.total_tokens = 0
        self.total_seconds = 0.0
        self._since: float | None = None
        self._tokens = 0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Chunk, batch_idx: int
    ) -> None:
        if self._since is None:
            self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Chunk, *_: Any
    ) -> None:
        self._tokens += batch.token_count()
        if trainer.global_step % declared(trainer).log_every_n_steps == 0:
            seconds, tokens = self._read(pl_module)
            pl_module.log("tokens_per_second", tokens / seconds)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._read(pl_module)
        self._since = None  # the next training batch restarts the clock

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._read(pl_module)

    @property
    def tokens_per_second(self) -> float:
        """Mean over the whole run so far."""
        return self.total_tokens / self.total_seconds if self.total_seconds else 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.total_tokens, "seconds": self.total_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.total_tokens, self.total_seconds = state_dict["tokens"], state_dict["seconds"]

    def _read(self, pl_module: L.LightningModule) -> tuple[float, int]:
        if self._since is None:
            return 0.0, 0
        if pl_module.device.type != "cpu":  # the clock below includes the device's work
            torch.accelerator.synchronize(pl_module.device)
        tokens = self._tokens
        now = time.perf_counter()
        seconds = now - self._since
        self._since, self._tokens = now, 0
        self.total_seconds += seconds
        self.total_tokens += tokens
        return seconds, tokens


class RunProgress(L.Callback):
    """Shows progress, loss, speed and remaining time of the run.

    Args:
        every_seconds: interval of the plain lines if there is no terminal.
    """

    def __init__(self, every_seconds: float = 10.0) -> None:
        self.every_seconds = every_seconds
        self.console = Console(file=sys.stdout, highlight=False)
        self._bars: Progress | None = None
        self._run: TaskID | None = None
        self._validation: TaskID | None = None
        self._next_line = 0.0
        self._begun = (0.0, 0.0)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begun = (time.monotonic(), progress(trainer))
        self._next_line = time.monotonic() + self.every_seconds
        if self.console.is_terminal and trainer.is_global_zero:
            self._bars = progress_bars(self.console)
            self._run = self._bars.add_task("", total=1.0)
            self._bars.start()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step % declared(trainer).log_every_n_steps and not trainer.should_stop:
            return
        self._show(trainer, progress(trainer), self._status(trainer))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or self._bars is None:
            return
        # The run's own bar stops meanwhile and shows why.
        self._show(trainer, progress(trainer), f"step {trainer.global_step}  validating")
        self._validation = self._bars.add_task("validation", total=sum(trainer.num_val_batches))

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Chunk,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.sanity_checking:
            return
        done, of = batch_idx + 1, sum(trainer.num_val_batches)
        status = f"validation: chunk {done:,} of {of:,}"
        if self._bars is not None and self._validation is not None:
            self._bars.update(self._validation, completed=done, description=status)
        elif self._line_is_due():
            self._say(trainer, f"{progress(trainer):4.0%} step {trainer.global_step}  {status}")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._bars is not None and self._validation is not None:
            self._bars.remove_task(self._validation)
            self._validation = None
            self._show(trainer, progress(trainer), self._status(trainer))
        m = {name: value.item() for name, value in trainer.callback_metrics.items()}
        if trainer.sanity_checking or "val_loss" not in m:
            return
        self._say(
            trainer,
            f"step {trainer.global_step}: validation loss {m['val_loss']:.4f} nats per token, "
            f"perplexity {m['val_perplexity']:.2f}, "
            f"{m['val_bits_per_char']:.3f} bits per character, "
            f"next token right {m['val_top1']:.1%} (top 5: {m['val_top5']:.1%})",
        )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        early = trainer.early_stopping_callback
        if early is not None and early.wait_count >= early.patience:
            self._say(trainer, f"ended early: no lower loss in {early.wait_count} validations")
        # The whole run, also if something other than its limits ended it.
        self._next_line = 0.0
        self._show(trainer, 1.0, self._status(trainer, 1.0))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def _show(self, trainer: L.Trainer, used: float, status: str) -> None:
        if self._bars is not None and self._run is not None:
            self._bars.update(self._run, completed=used, description=status)
        elif self._line_is_due():
            self._say(trainer, f"{used:4.0%} {status}")

    def _line_is_due(self) -> bool:
        due = time.monotonic() >= self._next_line
        if due:
            self._next_line = time.monotonic() + self.every_seconds
        return due

    def _status(self, trainer: L.Trainer, used: float | None = None) -> str:
        m = trainer.callback_metrics
        begun, used_then = self._begun
        used = progress(trainer) if used is None else used
        left = (time.monotonic() - begun) * (1 - used) / max(used - used_then, 1e-9)
        shown: list[tuple[str, Callable[[float], str]]] = [
            ("train_loss", lambda v: f"loss {v:.3f}"),
            ("val_loss", lambda v: f"validation {v:.3f}"),
            ("tokens_per_second", lambda v: f"{v:,.0f} tokens/s"),
        ]
        parts = [show(m[name].item()) for name, show in shown if name in m]
        return "  ".join([f"step {trainer.global_step}", *parts, f"{_clock(left)} left"])

    def _say(self, trainer: L.Trainer, line: str) -> None:
        if trainer.is_global_zero:
            self.console.print(line, markup=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(min(seconds, 359_999)), 60)
    return (
        f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
        if minutes >= 60
        else f"{minutes}:{seconds:02}"
    )
