"""Checkpoints on disk: atomic writing, finding by name, reading with clear errors."""

import io
import os
import pickle
import pickletools
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from lightning_module.atomic_files import write_atomically
from lightning_module.data.tokenizers import Tokenizer
from lightning_module.errors import CheckpointError
from lightning_module.model import SentencePredictor
from lightning_module.run_files import BEST, CHECKPOINTS, LAST, TOKENIZER

_NEEDED = ("state_dict", "hyper_parameters")
# Classes of tensors and of Lightning's state that a checkpoint may contain.
_DATA = re.compile(
    r"collections\.OrderedDict|torch\._utils\._rebuild_\w+|torch\.(storage\.)?\w+Storage"
    r"|torch\.(Size|device|Tensor|bool|(b?float|u?int|complex)\d+\w*)|torch\.nn\.parameter\.Parameter"
)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a temporary file, then renames it: a crash or a full disk leaves the previous file.

    (Lightning's own writer uses the system's temporary directory; a move from there to another file
    system is a copy, which can stop half way.)
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write `checkpoint` to `path`.

        Raises:
            CheckpointError: the write failed; the previous content of `path` is unchanged.
        """
        path = Path(path)
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, buffer.getbuffer())
        except OSError as error:
            kept = (
                f"the earlier {path.name} is intact"
                if path.exists()
                else "no partial file was left"
            )
            raise CheckpointError(
                f"could not write the checkpoint {path} ({buffer.tell():,} bytes): "
                f"{error.strerror}; {kept}. Free some space, then resume."
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint without running code that it contains (`weights_only` is always on)."""
        return read_checkpoint(path, map_location)


def read_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read one of our checkpoints.

    Raises:
            CheckpointError: no such file, a truncated or damaged one, or one of another program.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # for accepted files too
            checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except (
        RuntimeError,
        OSError,
        EOFError,
        zipfile.BadZipFile,
        pickle.UnpicklingError,
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        IndexError,
    ) as error:
        named = _code_in(path)
        if named:
            # Without torch's own message, which advises loading the file anyway.
            raise CheckpointError(
                f"{path} holds code objects ({', '.join(named)}), which would run on loading: "
                "it was not loaded. A checkpoint of this project holds only numbers and text"
            ) from None
        raise CheckpointError(
            f"{path} ({path.stat().st_size:,} bytes) is not a complete checkpoint of this project: "
            f"it is truncated, damaged or from another program ({_first_line(error)})"
        ) from error
    kept = checkpoint if isinstance(checkpoint, dict) else {}
    missing = {key for key in _NEEDED if not isinstance(kept.get(key), dict)}
    # Earlier versions wrote core.
    if missing or not {"layer_type", "core"} & checkpoint["hyper_parameters"].keys():
        raise CheckpointError(
            f"{path} is not a checkpoint of lightning_module.SentencePredictor: it lacks "
            f"{', '.join(sorted(missing)) or 'the hyperparameter layer_type'}"
        )
    return checkpoint


def tokenizer_fingerprint(checkpoint: dict[str, Any]) -> str | None:
    """`Tokenizer.fingerprint` of the tokenizer that a checkpoint was trained with, if it has it."""
    # Lightning stores the state of the data module under its name.
    return checkpoint.get("SentenceDataModule", {}).get("tokenizer")


def find_checkpoint(where: str, runs: str | Path = "runs") -> Path:
    """The file for `checkpoint=`: `latest`, a run directory (its best or last), or a file.

    Args:
        where: the value of `checkpoint=`.
        runs: directory below which `latest` searches for the newest checkpoint of any run.

    Raises:
        CheckpointError: there is none.
    """
    where, runs = os.path.expanduser(where), os.path.expanduser(runs)
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
    if os.path.isfile(path):  # Path.is_file raises if the name is too long
        return path
    for name in (BEST, LAST):
        if os.path.isfile(path / CHECKPOINTS / name):
            return path / CHECKPOINTS / name
    what = (
        "is a directory without checkpoints/best.ckpt" if os.path.isdir(path) else "does not exist"
    )
    raise CheckpointError(f"{path} {what}. Give a run directory, a .ckpt file, or latest")


def load_predictor(path: str | Path) -> tuple[SentencePredictor, Tokenizer]:
    """The model of a checkpoint, on the CPU and in evaluation mode, and its tokenizer.

    Raises:
        CheckpointError: the file cannot be read, its settings fit no model of this version, or the
            tokenizer is missing or another run's.
    """
    path = Path(path)
    checkpoint = read_checkpoint(path)
    try:
        model = SentencePredictor(**checkpoint["hyper_parameters"])
        model.load_state_dict(checkpoint["state_dict"])
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"the settings and weights in {path} fit no model of this version of lightning_module: "
            + " ".join(str(error).split())
        ) from error
    tokenizer_file = path.parent / TOKENIZER
    if not tokenizer_file.is_file():
        raise CheckpointError(
            f"{TOKENIZER} is missing beside {path}; copy it from the run that wrote the checkpoint"
        )
    tokenizer = Tokenizer.load(tokenizer_file)
    if tokenizer.vocab_size != model.hparams["vocab_size"]:
        raise CheckpointError(
            f"{tokenizer_file} has {tokenizer.vocab_size} tokens, but the model of {path.name} was "
            f"trained with {model.hparams['vocab_size']}: it is another run's tokenizer"
        )
    if tokenizer_fingerprint(checkpoint) not in (None, tokenizer.fingerprint):
        raise CheckpointError(
            f"{tokenizer_file} is another run's tokenizer: {path.name} was trained with one that "
            f"encodes text differently; copy {TOKENIZER} from the run that wrote the checkpoint"
        )
    return model.eval(), tokenizer


def _code_in(path: Path) -> list[str]:
    """Names of code objects in a checkpoint, at most three; found without running them."""
    named: dict[str, None] = {}
    texts: list[str] = []
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = [name for name in archive.namelist() if name.endswith("data.pkl")]
                content = b"".join(map(archive.read, names))
        else:  # torch before 1.6 wrote several pickles, one after the other
            content = path.read_bytes()
        file = io.BytesIO(content)
        while file.tell() < len(content):
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name in ("GLOBAL", "INST") and isinstance(argument, str):
                    named[argument.replace(" ", ".")] = None
                elif opcode.name == "STACK_GLOBAL":
                    named[".".join(texts[-2:])] = None
                elif isinstance(argument, str):
                    texts.append(argument)
    except (OSError, ValueError, IndexError, RuntimeError, zipfile.BadZipFile):
        pass  # damaged, or the end of the pickles
    return [name for name in named if not _DATA.fullmatch(name)][:3]


def _first_line(error: BaseException) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    # torch's own advice, in the same line, is to load the file without this check.
    return "it cannot be unpickled" if "weights" in line.lower() else line
