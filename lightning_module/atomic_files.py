"""Atomic writes, and the errors of a disk that is full or read-only.

All files of the training project that must never be partly written are written here. It imports no
torch, so a command can use it before torch is imported; `triton_gru.cache`, which the layer uses,
imports it. A folder of files that are valid only together is renamed as a whole: `TokenCache`.
"""

import errno
import os
import re
import uuid
from pathlib import Path

# Errors of a disk that is full or not writable.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS)

_BESIDE = re.compile(r"\..+\.[0-9a-f]{12}")


def beside(path: Path) -> Path:
    """A hidden name in the folder of `path` that no other process uses.

    `open` and `mkdir` create it with the mode that the umask and the folder give; what `tempfile`
    creates is accessible to its user alone.
    """
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")


def remove_left_over(folder: Path) -> None:
    """Removes the temporary files of `write_atomically` whose process was killed."""
    for path in folder.iterdir():
        if _BESIDE.fullmatch(path.name):
            path.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Replaces a file atomically, even if the process ends meanwhile.

    Raises:
        OSError: the write failed; the previous content of `path` is unchanged.
    """
    temporary = beside(path)
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
