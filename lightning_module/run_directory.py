"""A run's directory: made at once before the first step, and found again to go on with the run."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
from omegaconf import DictConfig, OmegaConf

from lightning_module.checkpoints import CheckpointError, find_checkpoint
from lightning_module.disk import write_atomically
from lightning_module.metrics_log import MetricsLogger
from lightning_module.ranks import RunError
from lightning_module.run_files import CHECKPOINTS, CONFIG, LAST, METRICS, TOKENIZER, read_metrics


def check_run_dir(run_dir: Path) -> None:
    """Refuses a directory that holds something already.

    Raises:
        RunError: names the way out.
    """
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        resumable = (run_dir / CONFIG).is_file()
        raise RunError(
            f"run_dir {run_dir} exists and is not empty. Choose another"
            + f", or go on with the run in it: resume={run_dir}" * resumable
        )


def make_run_dir(run_dir: Path, config: DictConfig, data: Any) -> None:
    """Everything that a run needs to be resumed, before its first step; all at once."""
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{run_dir.name}-", dir=run_dir.parent))
    try:
        (new / CHECKPOINTS).mkdir()
        data.tokenizer.save(new / CHECKPOINTS / TOKENIZER)
        _write_config(new, config)
        new.chmod(0o755)  # mkdtemp makes it for its user alone
        new.rename(run_dir)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def go_on_in_run_dir(
    run_dir: Path, config: DictConfig, data: Any, trainer: L.Trainer, steps: int
) -> None:
    """Clears up after a process that was killed, and forgets what it logged after `steps`."""
    data.tokenizer.save(run_dir / CHECKPOINTS / TOKENIZER)  # should it be lost or another one
    for left in (run_dir / CHECKPOINTS).glob(".*.ckpt.*"):
        left.unlink()  # half a checkpoint, of a process that was killed in writing it
    _write_config(run_dir, config)
    # What was logged after the checkpoint will be logged again.
    rows = read_metrics(run_dir / METRICS, up_to_step=steps - 1)
    for logger in trainer.loggers:
        if isinstance(logger, MetricsLogger):
            logger.experiment.keep([row | {"step": int(row["step"])} for row in rows])


def _write_config(folder: Path, config: DictConfig) -> None:
    write_atomically(folder / CONFIG, OmegaConf.to_yaml(config, resolve=True).encode())


def resumed(where: str, overrides: list[str]) -> tuple[DictConfig, Path | None]:
    """The config of an earlier run, with today's overrides, and the checkpoint to go on from.

    A run that was killed before its first checkpoint begins anew: None in place of it.

    Args:
        where: the run directory, whose last checkpoint is taken; a checkpoint in one; or `latest`.
        overrides: `key=value` as given on the command line.

    Raises:
        CheckpointError: no such run.
        RunError: an override that a run under way cannot take.
    """
    if Path(where).is_file():
        checkpoint = Path(where).absolute()
        run_dir = checkpoint.parents[1]
    else:
        found = (Path(where) / CONFIG).is_file()
        run_dir = Path(where).absolute() if found else find_checkpoint(where).absolute().parents[1]
        last = run_dir / CHECKPOINTS / LAST
        checkpoint = last if last.is_file() else None
    if not (run_dir / CONFIG).is_file():
        raise CheckpointError(f"{where} cannot be resumed: {run_dir} lacks {CONFIG}")
    config = OmegaConf.load(run_dir / CONFIG)
    changes = [o for o in overrides if not o.startswith("resume=")]
    for change in changes:
        key = change.partition("=")[0]
        if key == "run_dir":
            raise RunError("run_dir= does not go with resume=: copy the run and resume the copy")
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
