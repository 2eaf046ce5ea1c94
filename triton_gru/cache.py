"""The cache directory, and atomic writes to it."""

import os
import uuid
from pathlib import Path


def cache_directory() -> Path:
    """$TRITON_GRU_CACHE, or ~/.cache/triton_gru. It need not exist."""
    return Path(os.environ.get("TRITON_GRU_CACHE") or "~/.cache/triton_gru").expanduser()


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces a file atomically; its mode follows the umask, which `tempfile` ignores.

    `lightning_module.atomic_files` has the same for the training project: its commands check their
    arguments before torch is imported (4 s), and any module of triton_gru imports torch.

    Raises:
        OSError: The write failed; the previous content of `path` is unchanged.
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
