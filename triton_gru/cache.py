"""Where this project keeps files between runs, and how it writes them."""

import os
import uuid
from pathlib import Path


def cache_directory() -> Path:
    """$TRITON_GRU_CACHE, or ~/.cache/triton_gru. It need not exist."""
    return Path(os.environ.get("TRITON_GRU_CACHE") or "~/.cache/triton_gru").expanduser()


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all; its mode is the umask's, which `tempfile` ignores.

    `lightning_module.atomic_files` has the same for the training project: its commands refuse wrong
    arguments before torch is imported (4 s), and to import any module of triton_gru imports torch.

    Raises:
        OSError: The disk refused it; what stood at `path` before is untouched.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
