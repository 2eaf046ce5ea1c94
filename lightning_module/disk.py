"""Files that are whole or not there, and what a disk says that takes no more."""

import errno
import os
import tempfile
from pathlib import Path

# Errors of a disk that is full, or not to be written to.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS)


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Writes a file whole or not at all, whatever ends the process meanwhile.

    Raises:
        OSError: the disk refused it; what stood at `path` before is untouched.
    """
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            temporary = Path(file.name)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # NamedTemporaryFile makes private files; this one is as readable as its folder.
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise
