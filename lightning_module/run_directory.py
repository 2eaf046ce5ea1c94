"""A run's directory: created before the first step, found again to resume the run."""

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

# Content of the root of a newly made file system.
_OF_THE_DISK = ("lost+found",)
_BEING_WRITTEN = (f".{CONFIG}.", f".{LOCK}.", f".{TOKENIZER}.")  # see atomic_files.beside


def check_run_dir(run_dir: Path) -> None:
    """Raises if a directory is not empty or cannot hold a run.

    Raises:
        RunError: the message says what to do.
    """
    try:
        if run_dir.is_symlink() and not run_dir.exists():
            raise RunError(
                f"run_dir {run_dir} is a link to {os.readlink(run_dir)}, which does not exist"
            )
        if not run_dir.exists():
            return
        if not run_dir.is_dir():
            raise RunError(f"run_dir {run_dir} exists and is not a directory. Choose another")
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
    """Whether a start left it that was killed before it wrote the config."""
    if path.name == CHECKPOINTS and path.is_dir() and not path.is_symlink():
        return all(p.name == TOKENIZER or p.name.startswith(_BEING_WRITTEN) for p in path.iterdir())
    return path.name in (LOCK, *_OF_THE_DISK) or path.name.startswith(_BEING_WRITTEN)


def make_run_dir(run_dir: Path, config: DictConfig, data: Any, lock: RunLock) -> Callable[[], None]:
    """Writes everything that is needed to resume a run, before its first step.

    It writes to the directory itself, which may be an empty one of the user's: mounts, links and
    shells in it stay valid. The config is written last: a directory with a config holds a run, and
    if two runs start in one directory, the lock admits one.

    Returns:
        A function that removes everything again, for a start that fails: the directory too, unless
        it existed before.

    Raises:
        RunError: the directory is in use, or cannot be written to; nothing is left in it.
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
            with contextlib.suppress(OSError):  # another run may use it by now
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
        empty()  # removes the files of a killed start
        (run_dir / CHECKPOINTS).mkdir()
        data.tokenizer.save(run_dir / CHECKPOINTS / TOKENIZER)
        _write_config(run_dir, config)
    except OSError as error:
        clean_up()
        raise RunError(f"run_dir {run_dir} cannot be created: {error.strerror}") from error
    except BaseException:
        clean_up()
        raise
    return undo


def resume_in_run_dir(
    run_dir: Path, config: DictConfig, data: Any, trainer: L.Trainer, saved: dict[str, Any] | None
) -> Callable[[], None]:
    """Removes what a killed process left, and what it logged after its checkpoint.

    Args:
        run_dir: the run directory.
        config: config of the run.
        data: data module of the run, set up.
        trainer: the trainer with the loggers that continue.
        saved: the checkpoint; None for a run that starts over.

    Returns:
        A function that restores the previous config, for a start that reaches no step: the changes
        may be the cause.
    """
    before = (run_dir / CONFIG).read_bytes()
    (run_dir / CHECKPOINTS).mkdir(exist_ok=True)
    data.tokenizer.save(run_dir / CHECKPOINTS / TOKENIZER)  # in case it is missing or another one
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
    """The config of an earlier run with the changes, and the checkpoint to resume from.

    A run that was killed before its first checkpoint starts over: then the checkpoint is None.

    Args:
        where: the run directory (its last checkpoint), a checkpoint in one, or `latest`.
        changes: `key=value` as given on the command line.
        configs: folders of configs whose targets the run's config may name.

    Raises:
        CheckpointError: no such run.
        SettingsError: its config is damaged or names foreign code, or a change that a resumed run
            cannot take.
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
    """The state after a run was ended at once, and the command that resumes it."""
    if not (run_dir / CONFIG).is_file():
        return "No step was done: there is nothing to resume"
    last = run_dir / CHECKPOINTS / LAST
    found = f"The last checkpoint is {last}" if last.is_file() else "There is no checkpoint yet"
    return f"{found}\nResume with: {resume_command(run_dir)}"


def resume_command(run_dir: Path) -> str:
    """The command that resumes a run, ready for a shell."""
    return shlex.join(["triton-gru-train", f"resume={run_dir}"])


def _moved(config: DictConfig, old: Path, new: Path) -> DictConfig:
    """The config of a run whose directory, which occurs in many values, may have moved."""

    def renamed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: renamed(item) for key, item in value.items()}
        if isinstance(value, list):
            return [renamed(item) for item in value]
        if isinstance(value, str) and value and Path(value).is_relative_to(old):
            return str(new / Path(value).relative_to(old))
        return value

    return OmegaConf.create(renamed(OmegaConf.to_container(config)))
