"""Atomic writes, and the errors of a disk that is full or read-only.

All files of the training project that must be whole are written here. It imports no torch, so a
command can use it before torch is there; to import `triton_gru.cache`, which the layer uses,
imports it. A folder of several files that are valid together is renamed instead: `TokenCache`.
"""

import errno
import os
import re
import uuid
from pathlib import Path

# Errors of a disk that is full, or not to be written to.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS)

_BESIDE = re.compile(r"\..+\.[0-9a-f]{12}")


def beside(path: Path) -> Path:
    """A hidden name that no other process uses, in the folder of `path`.

    What is made there by `open` and `mkdir` has the mode that the umask and the folder give; the
    names of `tempfile` are made for their user alone.
    """
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")


def remove_left_over(folder: Path) -> None:
    """Removes what `write_atomically` leaves in a folder when its process is killed."""
    for path in folder.iterdir():
        if _BESIDE.fullmatch(path.name):
            path.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Writes a file whole or not at all, whatever ends the process meanwhile.

    Raises:
        OSError: the disk refused it; what stood at `path` before is untouched.
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
