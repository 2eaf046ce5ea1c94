"""The command `triton-gru-train`: from a Hydra config to a run directory."""

if __name__ == "__main__":  # python -m, before the imports below, see commands.py
    from lightning_module import commands

    commands.train()
    raise SystemExit

import logging
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.fabric.plugins.environments import LightningEnvironment
from omegaconf import DictConfig

from lightning_module.atomic_files import NO_ROOM
from lightning_module.callbacks.stopping import EndWhenTakenOver
from lightning_module.callbacks.store_failure import StopWhenStoreFails
from lightning_module.checkpoints import (
    BEST,
    AtomicCheckpointIO,
    read_checkpoint,
    tokenizer_fingerprint,
)
from lightning_module.data.datamodule import SentenceDataModule
from lightning_module.data.loading import ChunkLoader
from lightning_module.data.shards.tokens import ShardTokens
from lightning_module.distributed import ranks
from lightning_module.distributed.processes import EXPECTED, launch
from lightning_module.distributed.ranks import World, make_strategy
from lightning_module.errors import (
    CheckpointError,
    RankFailed,
    RunError,
    SettingsError,
    Stopped,
    StoreError,
)
from lightning_module.kernel_check import measure_kernels
from lightning_module.lightning_warnings import quiet
from lightning_module.model import SentencePredictor
from lightning_module.run_directory import (
    check_run_dir,
    how_to_resume,
    make_run_dir,
    resume_command,
    resume_in_run_dir,
    resumed,
)
from lightning_module.run_files import CHECKPOINTS, CONFIG, LAST, METRICS, read_metrics, summarize
from lightning_module.run_lock import RunLock
from lightning_module.settings.instantiation import build
from lightning_module.terminal.signals import Interrupted, exit_code
from lightning_module.training_progress import SharedClock

log = logging.getLogger(__name__)


def train(
    config: DictConfig, checkpoint: Path | None = None, *, resuming: bool = False
) -> dict[str, Any]:
    """Train as `config` says and fill its run directory; in each rank, where there are several.

    Args:
        config: as `conf/train.yaml` composes it.
        checkpoint: resume from here, in the same run directory.
        resuming: the run directory is one of this run; without a checkpoint it starts over.

    Returns:
        The validation metrics of the best checkpoint (see `summarize`).

    Raises:
        DataError: the text or the tokenizer cannot be used.
        RunError: the run directory is in use, or the settings make no model.
        CheckpointError: a checkpoint cannot be read or written.
        StoreError: the data could no longer be read; the state of the run is saved.
        Diverged: the loss became NaN or infinite.
        Stopped: a signal ended the run; its state is saved.
    """
    world = World.of(config.trainer)
    ranks.join(world, config.rank_timeout)
    # torchrun's processes each composed a config, and ${now:} may differ.
    config, checkpoint = ranks.from_rank_zero((config, checkpoint))
    lock = RunLock(Path(config.run_dir))
    try:
        # Before the checkpoint is read: no other process may write it from here on.
        ranks.once(lock.take if resuming else lambda: check_run_dir(lock.run_dir))
        L.seed_everything(config.seed, workers=True, verbose=False)
        # Everything that can be wrong with settings and data shows before anything is written.
        data = _data(config)
        trainer = _trainer(config, world, data, lock)
        saved = read_checkpoint(checkpoint) if checkpoint is not None else None
        model = build(
            "model",
            config.model,
            optimizer=build("optimizer", config.optimizer),
            schedule=build("scheduler", config.scheduler),
            vocab_size=data.vocab_size,
            chars_per_token=data.chars_per_token,
        )
        _check(model, data, trainer.strategy.root_device, saved, checkpoint)
        if ranks.rank() == 0:
            log.info(model.describe())
        if config.compile:
            model.compile()
        if config.get("check", "auto") == "auto":  # older configs have none
            measure_kernels(model.core, model.hparams.embedding_size, data, trainer)
        if resuming:
            undo = ranks.once(lambda: resume_in_run_dir(lock.run_dir, config, data, trainer, saved))
        else:
            undo = ranks.once(lambda: make_run_dir(lock.run_dir, config, data, lock))
        begun = saved["global_step"] if saved else 0
        _fit(trainer, model, data, checkpoint, begun, lock.run_dir, undo, resuming)
        return summarize(read_metrics(lock.run_dir / METRICS))
    finally:
        lock.release()


def _data(config: DictConfig) -> SentenceDataModule:
    for key in ("paths", "val_paths"):  # a run is resumed from any directory
        if config.data.get(key):
            config.data[key] = [
                path if "://" in path else os.path.abspath(os.path.expanduser(path))
                for path in config.data[key]
            ]
    if "url" in config.data and "://" not in config.data.url and "::" not in config.data.url:
        config.data.url = os.path.abspath(os.path.expanduser(config.data.url))
    data = build("data", config.data, tokenizer=build("tokenizer", config.tokenizer))
    ranks.once_a_machine(data.prepare_data)
    data.setup("fit")
    if ranks.rank() == 0:
        log.info(data.describe())
    return data


def _trainer(
    config: DictConfig, world: World, data: SentenceDataModule, lock: RunLock
) -> L.Trainer:
    if config.logger.get("csv") is None:
        raise RunError(
            "logger.csv cannot be left out: curves, summary and resuming are made from metrics.csv"
        )
    if config.trainer.strategy == "fsdp" and config.callbacks.get("averaging"):
        raise RunError(
            "averaging= keeps all weights on every rank, strategy=fsdp a part on each: set "
            "strategy=ddp or averaging=null"
        )
    if (
        isinstance(config.trainer.val_check_interval, int)
        and config.trainer.check_val_every_n_epoch is not None
        and config.trainer.val_check_interval
        > ChunkLoader(data.train, config.trainer.limit_train_batches).pass_length
    ):
        config.trainer.check_val_every_n_epoch = None  # longer than a pass: counted across passes
    callbacks: list[L.Callback] = [EndWhenTakenOver(lock)]
    if isinstance(data.train.tokens, ShardTokens):
        callbacks.append(StopWhenStoreFails(lock.run_dir / CHECKPOINTS))
    callbacks += [build(f"callbacks.{k}", c) for k, c in config.callbacks.items() if c]
    if world.size > 1:
        callbacks.append(SharedClock())
    settings: dict[str, Any] = {}
    if isinstance(config.trainer.strategy, str):
        settings["strategy"] = make_strategy(config.trainer.strategy, world)
    if world.environment is not None and config.trainer.devices == "auto":
        settings["devices"] = world.here
    return build(
        "trainer",
        config.trainer,
        callbacks=callbacks,
        logger=[build(f"logger.{k}", c) for k, c in config.logger.items() if c],
        plugins=[AtomicCheckpointIO(), world.environment or LightningEnvironment()],
        **settings,
    )


def _check(
    model: SentencePredictor,
    data: SentenceDataModule,
    device: torch.device,
    saved: dict[str, Any] | None,
    checkpoint: Path | None,
) -> None:
    """Tries the model on one token and loads the weights of a checkpoint into it.

    Raises:
        RunError: it does not run on the device, or not on such data.
        CheckpointError: the checkpoint is of another model or of another tokenizer.
    """
    if saved and tokenizer_fingerprint(saved) not in (None, data.tokenizer.fingerprint):
        raise CheckpointError(
            f"{checkpoint} was trained with another tokenizer than the one that this text and "
            "these settings make, so its tokens mean something else. Restore the text "
            f"({data.tokenizer_settings.kind} tokens are made from it) and tokenizer= of the run "
            "that wrote it, or start a new run"
        )
    try:
        with torch.no_grad():
            model.to(device)(torch.zeros(1, 1, dtype=torch.int64, device=device))
    except (TypeError, ValueError, RuntimeError) as error:
        raise RunError(f"the settings of model cannot be used: {error}") from error
    if data.batching == "packed" and not model.takes_resets:
        raise RunError(
            "data.batching=packed needs a layer that can be reset inside a row: "
            f"model/layer_type=gru or gru_reset_before, not {model.hparams['layer_type']['name']}. "
            "With this one set data.batching=stream"
        )
    if saved:
        try:
            model.load_state_dict(saved["state_dict"])
        except RuntimeError as error:
            raise CheckpointError(
                f"{checkpoint} does not fit the model that the config describes: "
                + " ".join(str(error).split())
            ) from error


def _fit(
    trainer: L.Trainer,
    model: SentencePredictor,
    data: SentenceDataModule,
    checkpoint: Path | None,
    begun: int,
    run_dir: Path,
    undo: Callable[[], None] | None,
    resuming: bool,
) -> None:
    """Trains; where no step ran after the `begun` of the checkpoint, undoes what was written."""
    try:
        trainer.fit(model, datamodule=data, ckpt_path=checkpoint)
    except BaseException as error:
        again = f"resume from the last checkpoint: resume={run_dir}"
        asked_to_end = isinstance(error, Stopped | Interrupted)
        if undo and trainer.global_step <= begun and not (resuming and asked_to_end):
            undo()  # no step ran: the run is as it was, or its name free for another one
            again = again if resuming else "train again"
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise CheckpointError(
                f"could not write to {run_dir}: {error.strerror}. Free some space, then {again}"
            ) from error
        raise


def run(config: DictConfig, changes: list[str]) -> None:
    """What `triton-gru-train` does; leaves with SystemExit where that failed.

    Args:
        config: of a new run, or with `resume` set to the run to resume.
        changes: settings to change in a run that is resumed, as typed.
    """
    resuming = config.resume is not None
    checkpoint = None
    run_dir = Path(
        os.path.abspath(os.path.expanduser(config.resume if resuming else config.run_dir))
    )
    another_run = not resuming and (run_dir / CONFIG).is_file()  # which will be refused
    try:
        quiet()
        if resuming:
            # Of this command: a folder given with --config-dir is trusted like the project's own.
            sources = HydraConfig.get().runtime.config_sources
            folders = [Path(s.path) for s in sources if s.provider in ("main", "command-line")]
            config, checkpoint = resumed(config.resume, changes, folders)
            run_dir = Path(config.run_dir)
        else:
            config.run_dir = str(run_dir)
        world = World.of(config.trainer)
        if world.size == 1 or world.environment is not None:
            metrics = train(config, checkpoint, resuming=resuming)
        else:
            metrics = launch(config, checkpoint, world.size, resuming)
    except Stopped as stopped:
        if ranks.rank() == 0:
            print(f"\n{stopped}\nResume with: {resume_command(run_dir)}", file=sys.stderr)
        raise SystemExit(exit_code(stopped.signal)) from None
    except Interrupted as interrupted:
        if ranks.rank() == 0:
            left = "There is nothing to resume" if another_run else how_to_resume(run_dir)
            print(f"\n{interrupted}\n{left}", file=sys.stderr)
        raise SystemExit(exit_code(interrupted.signal)) from None
    except (SettingsError, RankFailed, *EXPECTED.values()) as error:
        if ranks.rank() == 0:
            print(f"error: {error}", file=sys.stderr)
            if isinstance(error, StoreError) and (run_dir / CONFIG).is_file():
                print(how_to_resume(run_dir), file=sys.stderr)
        raise SystemExit(1) from None
    if ranks.rank() == 0:
        _show(metrics or {}, Path(config.run_dir))
    ranks.leave()


def _show(metrics: dict[str, Any], run_dir: Path) -> None:
    """What the last validation, printed before, leaves to be said."""
    kept = [name for name in (BEST, LAST) if (run_dir / CHECKPOINTS / name).is_file()]
    if metrics and BEST in kept:
        is_last = metrics["val_loss"] >= metrics["last_val_loss"]
        what = ", the last validation" if is_last else f": {metrics['val_loss']:.4f} nats per token"
        print(f"{BEST} is of step {metrics['best_step']}{what}")
    for profile in sorted(run_dir.glob("fit-profile*.txt")):  # of debug=profile
        print(f"Where the time went: {profile}")
    if not kept:
        print(f"No step was trained, so there is no checkpoint in {run_dir}")
        return
    print(f"Checkpoints, curves, samples and summary are in {run_dir}")
    print(f"Predict with: triton-gru-predict {shlex.quote(f'checkpoint={run_dir}')}")
