"""Human-readable outputs of a run: samples.txt, curves.png, summary.json."""

import json
import platform
import time
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch

from lightning_module.callbacks.progress import Throughput
from lightning_module.data.tokenizers import Tokenizer
from lightning_module.generation import continue_prompt
from lightning_module.model import SentencePredictor
from lightning_module.run_files import CURVES, METRICS, SAMPLES, SUMMARY, read_metrics, summarize
from lightning_module.trainer_attributes import declared

LEARNING_RATE = "lr"


class SampleWriter(L.Callback):
    """Appends to `samples.txt`, after each validation, how the model continues fixed prompts.

    Args:
        run_dir: folder of the file.
        prompts: texts to continue; empty: the first words of the validation text.
        num_sentences: continuations per prompt.
        temperature: see `continue_prompt`.
        top_p: see `continue_prompt`.
        max_tokens: see `continue_prompt`.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        prompts: list[str],
        num_sentences: int,
        temperature: float,
        top_p: float,
        max_tokens: int,
    ) -> None:
        self.file = Path(run_dir) / SAMPLES
        self.prompts = list(prompts)
        self._continue = partial(
            continue_prompt,
            num_sentences=num_sentences,
            temperature=temperature,
            top_p=top_p,
            max_tokens=max_tokens,
        )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for prompt in self.prompts:  # an unknown character fails here, not after an hour
            declared(trainer).datamodule.tokenizer.encode(prompt)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        tokenizer: Tokenizer = declared(trainer).datamodule.tokenizer
        loss = trainer.callback_metrics["val_loss"].item()
        lines = [f"== step {trainer.global_step}, validation loss {loss:.4f} nats per token"]
        for prompt in self.prompts or [self._opening(trainer, tokenizer)]:
            for text in self._continue(cast(SentencePredictor, pl_module), tokenizer, prompt):
                lines.append(f"> {prompt}|{text}")
        with self.file.open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n\n")

    @staticmethod
    def _opening(trainer: L.Trainer, tokenizer: Tokenizer) -> str:
        """The first line of the validation text, as far as the tokenizer has its characters."""
        ids = next(iter(declared(trainer).datamodule.val_dataloader())).inputs[:40, 0].tolist()
        if ids[0] == tokenizer.doc_id:
            del ids[0]
        if tokenizer.unk_id in ids:
            del ids[ids.index(tokenizer.unk_id) :]
        return tokenizer.decode(ids).lstrip("\n").split("\n")[0]


class RunReport(L.Callback):
    """Draws `curves.png` after each validation and writes `summary.json` at the end of the run.

    Both are computed from `metrics.csv`, which the CSV logger writes, so they can be recomputed.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.run_dir = Path(run_dir)
        # What the Triton kernels measured for the shapes of the run, by class; see kernel_check.
        self.verdicts: dict[str, dict[str, Any]] = {}
        self._earlier_seconds = 0.0
        self._begun = time.monotonic()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begun = time.monotonic()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking:
            rows = self._rows(trainer)
            if rows:
                draw_curves(rows, self.run_dir / CURVES)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        summary = summarize(self._rows(trainer))
        throughput = next(
            (c for c in declared(trainer).callbacks if isinstance(c, Throughput)), None
        )
        if throughput is not None:
            summary["tokens_per_second"] = throughput.tokens_per_second
        summary["parameters"] = sum(p.numel() for p in pl_module.parameters())
        summary["wall_seconds"] = self.seconds
        summary["steps"] = trainer.global_step
        summary["device"] = _device_name(pl_module.device)
        summary["versions"] = _versions()
        if self.verdicts:
            summary["verdicts"] = self.verdicts
        text = json.dumps(summary, indent=2, ensure_ascii=False)
        (self.run_dir / SUMMARY).write_text(text + "\n", encoding="utf-8")

    @property
    def seconds(self) -> float:
        """Wall time of the run, earlier parts of a resumed one included."""
        return self._earlier_seconds + time.monotonic() - self._begun

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._earlier_seconds = state_dict["seconds"]

    def _rows(self, trainer: L.Trainer) -> list[dict[str, float]]:
        for logger in trainer.loggers:
            logger.save()
        return read_metrics(self.run_dir / METRICS)


def draw_curves(rows: list[dict[str, float]], path: Path) -> None:
    """Draw loss and learning rate against the step into a PNG.

    Args:
        rows: as `read_metrics` returns them.
        path: of the PNG.
    """
    from matplotlib.figure import (
        Figure,
    )  # takes 0.5 s to import

    figure = Figure(figsize=(8, 5), layout="constrained")
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))

    def curve(axes: Any, name: str, **style: Any) -> None:
        points = [(row["step"] + 1, row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), **style)

    curve(loss, "train_loss", label="training, one chunk", color="0.7", linewidth=0.8)
    curve(loss, "val_loss", label="validation text", color="tab:blue", marker="o", markersize=4)
    validated = [row for row in rows if "val_loss" in row]
    if validated:
        best = min(validated, key=lambda row: row["val_loss"])
        loss.annotate(
            f"best {best['val_loss']:.3f}",
            (best["step"] + 1, best["val_loss"]),
            xytext=(0, 12),
            textcoords="offset points",
            ha="right",
            color="tab:blue",
        )
        # The loss of the first steps would flatten the rest of the curve.
        loss.set_ylim(top=1.15 * max(row["val_loss"] for row in validated))
    loss.set_ylabel("nats per token")
    loss.legend(frameon=False)
    curve(rate, LEARNING_RATE, color="tab:orange")
    rate.set_ylabel("learning rate")
    rate.set_xlabel("step")
    for axes in (loss, rate):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def _device_name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or "cpu"
    )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("triton-gru", "torch", "triton", "lightning", "hydra-core", "tokenizers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
