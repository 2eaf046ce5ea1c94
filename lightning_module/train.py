"""The command `triton-gru-train`: from a Hydra config to a run directory."""

import logging
import os
import shutil
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch.loggers import CSVLogger
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
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
from lightning_module.sweep_jobs import Job, end_with_sweep, run_job

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
        resumable = (run_dir / CHECKPOINTS / LAST).is_file()
        raise RunError(
            f"run_dir {run_dir} exists and is not empty. Choose another"
            + f", or go on with the run in it: resume={run_dir}" * resumable
        )
    if config.logger.get("csv") is None:
        raise RunError(
            "logger.csv cannot be left out: curves, summary and resuming are made from metrics.csv"
        )
    L.seed_everything(config.seed, workers=True, verbose=False)
    # Everything that can be wrong with settings and data shows before anything is written.
    if "paths" in config.data:  # a run is resumed from any directory
        config.data.paths = [os.path.abspath(Path(p).expanduser()) for p in config.data.paths]
    data = _built("data", config.data, tokenizer=_built("tokenizer", config.tokenizer))
    data.prepare_data()
    data.setup("fit")
    log.info(data.describe())
    trainer = _built(
        "trainer",
        config.trainer,
        callbacks=[_built(f"callbacks.{k}", c) for k, c in config.callbacks.items() if c],
        logger=[_built(f"logger.{k}", c) for k, c in config.logger.items() if c],
        plugins=[AtomicCheckpointIO()],
    )
    if trainer.world_size > 1:
        raise RunError(
            f"trainer.devices and num_nodes ask for {trainer.world_size} processes; training runs "
            "in one so far: set trainer.devices=1 trainer.num_nodes=1"
        )
    model = _model(config, data, trainer.strategy.root_device)
    if checkpoint is not None:
        try:
            model.load_state_dict(read_checkpoint(checkpoint)["state_dict"])
        except RuntimeError as error:
            raise CheckpointError(
                f"{checkpoint} does not fit the model that the config describes: {error}"
            ) from error
        _keep_metrics(trainer.loggers[0], run_dir, read_checkpoint(checkpoint)["global_step"])

    (run_dir / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, run_dir / CONFIG, resolve=True)
    data.tokenizer.save(run_dir / CHECKPOINTS / TOKENIZER)
    try:
        trainer.fit(model, datamodule=data, ckpt_path=checkpoint)
    except Exception:
        if checkpoint is None and trainer.global_step == 0:
            # Nothing was learnt: the name is free for another try.
            shutil.rmtree(run_dir)
        raise
    return summarize(read_metrics(run_dir / METRICS))


def _built(what: str, config: DictConfig, **arguments: Any) -> Any:
    """What a group of the config describes.

    Raises:
        RunError: it cannot be built; names the group and the cause.
    """
    try:
        return instantiate(config, **arguments)
    except (InstantiationException, OmegaConfBaseException) as error:
        cause = error.__cause__ or error
        text = str(cause).split("\n    full_key")[0]
        raise RunError(f"the settings of {what} cannot be used: {text}") from error


def _model(config: DictConfig, data: Any, device: torch.device) -> SentencePredictor:
    """The model, after it and its optimizer have been tried on one token.

    Raises:
        RunError: the settings make no model, or none that runs on the device.
    """
    try:
        model = SentencePredictor(
            data.vocab_size,
            chars_per_token=data.chars_per_token,
            optimizer=_built("optimizer", config.optimizer),
            schedule=_built("scheduler", config.scheduler),
            **OmegaConf.to_container(config.model, resolve=True),
        )
        model.optimizer_factory(model.parameters())
        with torch.no_grad():
            model.to(device)(torch.zeros(1, 1, dtype=torch.int64, device=device))
    except (TypeError, ValueError, RuntimeError, OmegaConfBaseException) as error:
        if isinstance(error, RunError):
            raise
        raise RunError(f"model, optimizer and scheduler make no model: {error}") from error
    return model


def _keep_metrics(logger: CSVLogger, run_dir: Path, steps: int) -> None:
    """Leaves in `metrics.csv` what was logged in the first `steps`, for a run that goes on there.

    Lightning's logger begins by deleting the file.
    """
    for row in read_metrics(run_dir / METRICS, up_to_step=steps - 1):
        metrics = {name: value for name, value in row.items() if name != "step"}
        logger.log_metrics(metrics, int(row["step"]))
    logger.save()


def resumed(where: str, overrides: list[str]) -> tuple[DictConfig, Path]:
    """The config of an earlier run, with today's overrides, and the checkpoint to go on from.

    Args:
        where: the run directory, whose last checkpoint is taken; a checkpoint in one; or `latest`.
        overrides: `key=value` as given on the command line.

    Raises:
        CheckpointError: no such run, or one that stopped before its first checkpoint.
        RunError: an override that a run under way cannot take.
    """
    checkpoint = find_checkpoint(where)
    run_dir = checkpoint.absolute().parent.parent
    if not Path(where).is_file():
        checkpoint = run_dir / CHECKPOINTS / LAST
    if not checkpoint.is_file() or not (run_dir / CONFIG).is_file():
        raise CheckpointError(f"{where} cannot be resumed: {run_dir} lacks {LAST} or {CONFIG}")
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
    return _moved(config, Path(config.run_dir), run_dir), checkpoint


def _moved(config: DictConfig, old: Path, new: Path) -> DictConfig:
    """The config of a run whose directory, which stands in many places of it, may have moved."""

    def renamed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: renamed(item) for key, item in value.items()}
        if isinstance(value, list):
            return [renamed(item) for item in value]
        if isinstance(value, str) and Path(value).is_relative_to(old):
            return str(new / Path(value).relative_to(old))
        return value

    return OmegaConf.create(renamed(OmegaConf.to_container(config)))


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")
def _task(config: DictConfig) -> Job | None:
    job = HydraConfig.get()
    if job.mode == RunMode.MULTIRUN:
        return run_job()
    quiet()
    try:
        checkpoint = None
        if config.resume is not None:
            config, checkpoint = resumed(config.resume, list(job.overrides.task))
        else:
            config.run_dir = os.path.abspath(config.run_dir)
        metrics = train(config, checkpoint)
    except Stopped as stopped:
        print(f"\n{stopped}\nGo on with: triton-gru-train resume={config.run_dir}", file=sys.stderr)
        raise SystemExit(128 + stopped.signal) from None
    except KeyboardInterrupt:
        print("\ninterrupted before the first step; nothing to resume", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except (DataError, RunError, CheckpointError, Diverged) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    _show(metrics, Path(config.run_dir))
    return None


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
    end_with_sweep()
    quote_arguments()
    _task()


if __name__ == "__main__":
    main()
