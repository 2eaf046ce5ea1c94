"""A run's directory: made before the first step, and found again to resume the run."""

import contextlib
import os
import shlex
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning as L
from omegaconf import DictConfig, OmegaConf

from lightning_module.atomic_files import remove_left_over, write_atomically
from lightning_module.checkpoints import find_checkpoint
from lightning_module.errors import CheckpointError, RunError
from lightning_module.loggers.rewind import UNLOGGED, rewind
from lightning_module.run_config import change, read_config
from lightning_module.run_files import CHECKPOINTS, CONFIG, LAST, TOKENIZER
from lightning_module.run_lock import LOCK, RunLock, read_holder
from lightning_module.settings.config_folder import CONFIGS

# What the root of a file system holds that was just made.
_OF_THE_DISK = ("lost+found",)
_BEING_WRITTEN = (f".{CONFIG}.", f".{LOCK}.", f".{TOKENIZER}.")  # see disk.beside


def check_run_dir(run_dir: Path) -> None:
    """Refuses a directory that holds something already, or that no run can be in.

    Raises:
        RunError: names the way out.
    """
    try:
        if run_dir.is_symlink() and not run_dir.exists():
            raise RunError(f"run_dir {run_dir} is a link to {os.readlink(run_dir)}, which is gone")
        if not run_dir.exists():
            return
        if not run_dir.is_dir():
            raise RunError(f"run_dir {run_dir} exists and is no directory. Choose another")
        if read_holder(run_dir) is not None:
            lock = RunLock(run_dir)
            lock.take()
            lock.release()
        _refuse_used(run_dir)
    except OSError as error:
        raise RunError(f"run_dir {run_dir} cannot be used: {error.strerror}") from error


def _refuse_used(run_dir: Path) -> None:
    if all(map(_is_left_over, run_dir.iterdir())):
        return
    resumable = (run_dir / CONFIG).is_file()
    raise RunError(
        f"run_dir {run_dir} exists and is not empty. Choose another"
        + f", or resume the run in it: resume={run_dir}" * resumable
    )


def _is_left_over(path: Path) -> bool:
    """Whether it is what a start leaves that was killed before it wrote the config."""
    if path.name == CHECKPOINTS and path.is_dir() and not path.is_symlink():
        return all(p.name == TOKENIZER or p.name.startswith(_BEING_WRITTEN) for p in path.iterdir())
    return path.name in (LOCK, *_OF_THE_DISK) or path.name.startswith(_BEING_WRITTEN)


def make_run_dir(run_dir: Path, config: DictConfig, data: Any, lock: RunLock) -> Callable[[], None]:
    """Everything that a run needs to be resumed, before its first step.

    It goes into the directory itself, which may be an empty one that the user made: its mount, its
    links and the shells that stand in it stay. The config is written last: a directory with one
    holds a run, and of two that start in one the lock lets one through.

    Returns:
        What removes it all again, for a start that fails: the directory too, unless it
        was there before.

    Raises:
        RunError: the directory is in use, or cannot be written to; nothing is left behind.
    """
    made: list[Path] = []

    def empty() -> None:
        for path in run_dir.iterdir():
            if path.is_dir() and not path.is_symlink() and path.name not in _OF_THE_DISK:
                shutil.rmtree(path)
            elif path.name not in (LOCK, *_OF_THE_DISK):
                path.unlink(missing_ok=True)

    def leave() -> None:
        lock.release()
        for folder in reversed(made):
            with contextlib.suppress(OSError):  # another run is in it by now
                folder.rmdir()

    def undo() -> None:
        empty()
        leave()

    clean_up = leave
    try:
        for folder in (*reversed(run_dir.parents), run_dir):
            if not folder.exists():
                with contextlib.suppress(FileExistsError):
                    folder.mkdir()
                    made.append(folder)
        lock.take()
        _refuse_used(run_dir)
        clean_up = undo
        empty()  # of what a start left that was killed
        (run_dir / CHECKPOINTS).mkdir()
        data.tokenizer.save(run_dir / CHECKPOINTS / TOKENIZER)
        _write_config(run_dir, config)
    except OSError as error:
        clean_up()
        raise RunError(f"run_dir {run_dir} cannot be made: {error.strerror}") from error
    except BaseException:
        clean_up()
        raise
    return undo


def go_on_in_run_dir(
    run_dir: Path, config: DictConfig, data: Any, trainer: L.Trainer, saved: dict[str, Any] | None
) -> Callable[[], None]:
    """Clears up after a process that was killed, and forgets what it logged after its checkpoint.

    Args:
        run_dir: of the run.
        config: of the run.
        data: of the run, set up.
        trainer: whose loggers continue.
        saved: the checkpoint; None for a run that starts over.

    Returns:
        What takes the changes of the config back, for a start that comes to no step: they may be
        what it failed by.
    """
    before = (run_dir / CONFIG).read_bytes()
    (run_dir / CHECKPOINTS).mkdir(exist_ok=True)
    data.tokenizer.save(run_dir / CHECKPOINTS / TOKENIZER)  # should it be lost or another one
    for folder in (run_dir, run_dir / CHECKPOINTS):
        remove_left_over(folder)
    _write_config(run_dir, config)
    saved = saved or {"global_step": 0}
    rewind(run_dir, trainer, saved["global_step"], saved.get(UNLOGGED, {}))
    return lambda: write_atomically(run_dir / CONFIG, before)


def _write_config(folder: Path, config: DictConfig) -> None:
    write_atomically(folder / CONFIG, OmegaConf.to_yaml(config, resolve=True).encode())


def resumed(
    where: str, changes: Iterable[str], configs: Iterable[Path] = (CONFIGS,)
) -> tuple[DictConfig, Path | None]:
    """The config of an earlier run, changed as asked for, and the checkpoint to resume from.

    A run that was killed before its first checkpoint starts over: None in place of it.

    Args:
        where: the run directory, whose last checkpoint is taken; a checkpoint in one; or `latest`.
        changes: `key=value` as given on the command line.
        configs: folders of configs whose targets the run's config may name.

    Raises:
        CheckpointError: no such run.
        SettingsError: its config is damaged or names code of others, or a change that a run under
            way cannot take.
    """
    where = os.path.expanduser(where)
    if os.path.isfile(where):
        checkpoint: Path | None = Path(where).absolute()
        run_dir = Path(where).absolute().parents[1]
    else:
        found = os.path.lexists(os.path.join(where, CONFIG))
        run_dir = Path(where).absolute() if found else find_checkpoint(where).absolute().parents[1]
        last = run_dir / CHECKPOINTS / LAST
        checkpoint = last if last.is_file() else None
    if not os.path.lexists(run_dir / CONFIG):
        raise CheckpointError(f"{where} cannot be resumed: {run_dir} lacks {CONFIG}")
    config = read_config(run_dir / CONFIG)
    config = _moved(config, Path(str(config.run_dir)), run_dir)
    change(config, changes, run_dir / CONFIG, list(configs))
    return config, checkpoint


def how_to_resume(run_dir: Path) -> str:
    """What a run that ended at once has left, and the command that goes on from there."""
    if not (run_dir / CONFIG).is_file():
        return "It had made no step: there is nothing to resume"
    last = run_dir / CHECKPOINTS / LAST
    found = f"The last checkpoint is {last}" if last.is_file() else "There is no checkpoint yet"
    return f"{found}\nGo on with: {resume_command(run_dir)}"


def resume_command(run_dir: Path) -> str:
    """The command that resumes a run, ready for a shell."""
    return shlex.join(["triton-gru-train", f"resume={run_dir}"])


def _moved(config: DictConfig, old: Path, new: Path) -> DictConfig:
    """The config of a run whose directory, which stands in many places of it, may have moved."""

    def renamed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: renamed(item) for key, item in value.items()}
        if isinstance(value, list):
            return [renamed(item) for item in value]
        if isinstance(value, str) and value and Path(value).is_relative_to(old):
            return str(new / Path(value).relative_to(old))
        return value

    return OmegaConf.create(renamed(OmegaConf.to_container(config)))
