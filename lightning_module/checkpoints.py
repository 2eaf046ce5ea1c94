"""Checkpoints on disk: written whole or not at all, found by name, read with clear errors."""

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from lightning_module.disk import write_atomically
from lightning_module.predictor import SentencePredictor
from lightning_module.run_files import BEST, CHECKPOINTS, LAST, TOKENIZER
from lightning_module.tokenizers import Tokenizer


class CheckpointError(RuntimeError):
    """A checkpoint cannot be found, read, written or used; says which and what to do."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, then renames: a crash or a full disk leaves what was there.

    (Lightning's own writer goes through the system's temporary directory, from where a move to
    another file system is a copy, and a copy can stop half way.)
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write `checkpoint` to `path`.

        Raises:
            CheckpointError: the disk refused it; what stood at `path` before is untouched.
        """
        path = Path(path)
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, buffer.getbuffer())
        except OSError as error:
            kept = (
                f"the earlier {path.name} is intact" if path.exists() else "nothing was left behind"
            )
            raise CheckpointError(
                f"could not write the checkpoint {path} ({buffer.tell():,} bytes): "
                f"{error.strerror}; {kept}. Free some space, then resume."
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint without running code that it may hold (`weights_only` is always on)."""
        return read_checkpoint(path, map_location)


def read_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read one of our checkpoints.

    Raises:
        CheckpointError: no such file, a truncated or damaged one, or one that another program
            wrote.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except (
        RuntimeError,
        OSError,
        EOFError,
        zipfile.BadZipFile,
        pickle.UnpicklingError,
        KeyError,
        ValueError,
    ) as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size:,} bytes) is no complete checkpoint of this project: "
            f"it is truncated, damaged or from another program ({_first_line(error)})"
        ) from error
    missing = {"state_dict", "hyper_parameters"} - set(
        checkpoint if isinstance(checkpoint, dict) else ()
    )
    if missing or "core" not in checkpoint["hyper_parameters"]:
        raise CheckpointError(
            f"{path} is not a checkpoint of lightning_module.SentencePredictor: it lacks "
            f"{', '.join(sorted(missing)) or 'the hyperparameter core'}"
        )
    return checkpoint


def tokenizer_fingerprint(checkpoint: dict[str, Any]) -> str | None:
    """`Tokenizer.fingerprint` of the one that a checkpoint was trained with, where it says so."""
    # Lightning keeps the state of the data module under its name.
    return checkpoint.get("SentenceDataModule", {}).get("tokenizer")


def find_checkpoint(where: str, runs: str | Path = "runs") -> Path:
    """The file behind `checkpoint=`: `latest`, a run directory (its best or last), or a file.

    Args:
        where: what the user wrote.
        runs: directory below which `latest` looks for the newest checkpoint of any run.

    Raises:
        CheckpointError: there is none.
    """
    if where == "latest":
        found = [
            *Path(runs).glob(f"**/{CHECKPOINTS}/{BEST}"),
            *Path(runs).glob(f"**/{CHECKPOINTS}/{LAST}"),
        ]
        if not found:
            raise CheckpointError(
                f"no run with a checkpoint below {Path(runs).resolve()}. Train one first "
                "(triton-gru-train experiment=quickstart) or name one: checkpoint=PATH"
            )
        where = str(max(found, key=lambda path: path.stat().st_mtime).parent.parent)
    path = Path(where)
    if path.is_file():
        return path
    for name in (BEST, LAST):
        if (path / CHECKPOINTS / name).is_file():
            return path / CHECKPOINTS / name
    what = "is a directory without checkpoints/best.ckpt" if path.is_dir() else "does not exist"
    raise CheckpointError(f"{path} {what}. Give a run directory, a .ckpt file, or latest")


def load_predictor(path: str | Path) -> tuple[SentencePredictor, Tokenizer]:
    """The model of a checkpoint, on the CPU and in evaluation mode, and its tokenizer.

    Raises:
        CheckpointError: the file cannot be read, its settings fit no model of this version, or the
            tokenizer is
            missing or another one.
    """
    path = Path(path)
    checkpoint = read_checkpoint(path)
    try:
        model = SentencePredictor(**checkpoint["hyper_parameters"])
        model.load_state_dict(checkpoint["state_dict"])
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"the settings and weights in {path} fit no model of this version of lightning_module: "
            f"{error}"
        ) from error
    tokenizer_file = path.parent / TOKENIZER
    if not tokenizer_file.is_file():
        raise CheckpointError(
            f"{TOKENIZER} is missing beside {path}; copy it from the run that wrote the checkpoint"
        )
    tokenizer = Tokenizer.load(tokenizer_file)
    if tokenizer.vocab_size != model.hparams.vocab_size:
        raise CheckpointError(
            f"{tokenizer_file} has {tokenizer.vocab_size} tokens, but the model of {path.name} was "
            f"trained with {model.hparams.vocab_size}: it is another run's tokenizer"
        )
    if tokenizer_fingerprint(checkpoint) not in (None, tokenizer.fingerprint):
        raise CheckpointError(
            f"{tokenizer_file} is another run's tokenizer: {path.name} was trained with one that "
            f"gives text other ids; copy {TOKENIZER} from the run that wrote the checkpoint"
        )
    return model.eval(), tokenizer


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
