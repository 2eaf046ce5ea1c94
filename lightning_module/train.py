"""The command `triton-gru-train`: from a Hydra config to a run directory."""

import logging
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import hydra
import lightning as L
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from lightning_module.checkpoints import (
    CHECKPOINTS,
    CONFIG,
    LAST,
    TOKENIZER,
    AtomicCheckpointIO,
    CheckpointError,
    find_checkpoint,
    read_checkpoint,
)
from lightning_module.corpora import DataError
from lightning_module.guards import Diverged, Stopped
from lightning_module.overrides import quote_arguments
from lightning_module.predictor import SentencePredictor
from lightning_module.reports import METRICS, read_metrics, summarize

log = logging.getLogger(__name__)

# In a checkout the configs lie at its top; a wheel carries them inside the package (see
# pyproject.toml).
_PACKAGE = Path(__file__).parent
CONFIGS = next(p for p in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if p.is_dir())


class RunError(RuntimeError):
    """A run that cannot begin as asked for; the message says why and what to do."""


def train(config: DictConfig, checkpoint: Path | None = None) -> dict[str, Any]:
    """Train as `config` says and fill its run directory.

    Args:
        config: as `conf/train.yaml` composes it.
        checkpoint: go on from here, in the same run directory.

    Returns:
        The validation metrics of the best checkpoint (see `summarize`).

    Raises:
        DataError: the text or the tokenizer cannot be used.
        RunError: the run directory is in use, or the settings make no model.
        CheckpointError: a checkpoint cannot be read or written.
        Diverged: the loss became NaN or infinite.
        Stopped: a signal ended the run; its state is saved.
    """
    run_dir = Path(config.run_dir)
    if checkpoint is None and run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise RunError(
            f"run_dir {run_dir} exists and is not empty. Choose another, or go on with the run "
            f"in it: resume={run_dir}"
        )
    L.seed_everything(config.seed, workers=True, verbose=False)
    # Everything that can be wrong with settings and data shows before anything is written.
    data = instantiate(config.data, tokenizer=instantiate(config.tokenizer))
    data.prepare_data()
    data.setup("fit")
    log.info(data.describe())
    try:
        model = SentencePredictor(
            data.vocab_size,
            chars_per_token=data.chars_per_token,
            optimizer=instantiate(config.optimizer),
            **OmegaConf.to_container(config.model, resolve=True),
        )
    except (TypeError, ValueError) as error:
        raise RunError(f"the settings below model make no model: {error}") from error
    trainer = instantiate(
        config.trainer,
        callbacks=[instantiate(c) for c in config.callbacks.values() if c is not None],
        logger=_loggers(config, checkpoint),
        plugins=[AtomicCheckpointIO()],
    )

    (run_dir / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, run_dir / CONFIG, resolve=True)
    data.tokenizer.save(run_dir / CHECKPOINTS / TOKENIZER)
    try:
        trainer.fit(model, datamodule=data, ckpt_path=checkpoint)
    except RuntimeError as error:
        if checkpoint is not None and "state_dict" in str(error):
            raise CheckpointError(
                f"{checkpoint} does not fit the model that the config describes: {error}"
            ) from error
        raise
    return summarize(read_metrics(run_dir / METRICS))


def _loggers(config: DictConfig, checkpoint: Path | None) -> list[Any]:
    """The loggers; when a run goes on, `metrics.csv` keeps the rows up to where it goes on from."""
    step = read_checkpoint(checkpoint)["global_step"] if checkpoint is not None else 0
    rows = read_metrics(Path(config.run_dir) / METRICS, up_to_step=step - 1)
    loggers = {name: instantiate(c) for name, c in config.logger.items() if c is not None}
    if "csv" in loggers and rows:
        # Lightning's logger begins by deleting the file.
        for row in rows:
            metrics = {name: value for name, value in row.items() if name != "step"}
            loggers["csv"].log_metrics(metrics, int(row["step"]))
        loggers["csv"].save()
    return list(loggers.values())


def resumed(where: str, overrides: list[str]) -> tuple[DictConfig, Path]:
    """The config of an earlier run, with today's overrides, and the checkpoint to go on from.

    Args:
        where: the run directory, or `latest`.
        overrides: `key=value` as given on the command line.

    Raises:
        CheckpointError: no such run, or one that stopped before its first checkpoint.
        RunError: an override that a run under way cannot take.
    """
    run_dir = find_checkpoint(where).parent.parent
    checkpoint = run_dir / CHECKPOINTS / LAST
    if not checkpoint.is_file() or not (run_dir / CONFIG).is_file():
        raise CheckpointError(
            f"{run_dir} lacks {CHECKPOINTS}/{LAST} or {CONFIG}: it cannot be resumed"
        )
    config = OmegaConf.load(run_dir / CONFIG)
    changes = [o for o in overrides if not o.startswith("resume=")]
    for change in changes:
        key = change.partition("=")[0]
        if "/" in key or isinstance(OmegaConf.select(config, key, default=config), DictConfig):
            raise RunError(
                f"{change} cannot be changed in a run under way: with resume= only single "
                f"values of its {run_dir / CONFIG} can, such as trainer.max_steps=5000"
            )
    config.merge_with_dotlist(changes)
    config.run_dir = str(run_dir)  # the run may have been moved
    return config, checkpoint


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")
def _task(config: DictConfig) -> float:
    quiet()
    job = HydraConfig.get()
    sweeping = job.mode == RunMode.MULTIRUN
    try:
        checkpoint = None
        if config.resume is not None:
            config, checkpoint = resumed(config.resume, list(job.overrides.task))
        elif sweeping:
            config.run_dir = job.runtime.output_dir
        metrics = train(config, checkpoint)
    except Stopped as stopped:
        print(f"\n{stopped}\nGo on with: triton-gru-train resume={config.run_dir}", file=sys.stderr)
        raise SystemExit(128 + stopped.signal) from None
    except (DataError, RunError, CheckpointError, Diverged) as error:
        if sweeping:
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    _show(metrics, Path(config.run_dir))
    return metrics.get("val_loss", math.nan)


def quiet() -> None:
    """Silence what Lightning says of choices that are made here on purpose."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        # Chunks are gathered from a memory map in microseconds: workers would only slow that down.
        ".*does not have many workers",
        # `train` has made sure that the run directory is new, or that it is to be gone on with.
        "Experiment logs directory .* exists and is not empty",
        "Checkpoint directory .* exists and is not empty",
        # Lightning 2.6 under torch 2.13, once a run.
        ".*LeafSpec.* is deprecated",
    ):
        warnings.filterwarnings("ignore", message=message)


def _show(metrics: dict[str, Any], run_dir: Path) -> None:
    table = Table(title=f"{run_dir}", title_justify="left", show_header=False)
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    Console().print(table)
    print(f"Curves, samples and summary are in {run_dir}")


def main() -> None:
    """Entry point of `triton-gru-train`."""
    quote_arguments()
    _task()


if __name__ == "__main__":
    main()
