"""Checksums that detect changes of a folder's files.

They are CRC-32: they detect damage by a disk, a copy or an editor, at about a second per gigabyte,
and do not protect against intent. Files that passed are not read again while their size, times and
inode stay the same. These include the time of change (ctime), which no program can set: a write
that restores the modification time is detected too.
"""

import contextlib
import json
import logging
import zlib
from pathlib import Path

from lightning_module.atomic_files import write_atomically

log = logging.getLogger(__name__)

SUMS = "checksums.json"  # of every other file, by name
CHECKED = "checked.json"  # stat of the files when they last passed

_BLOCK = 2**22
_LARGE = 2**30  # bytes from which reading is logged
# A file that changes twice within one tick of its file system's clock has the same times after the
# second change: the tick is two seconds on the coarsest (FAT), a few milliseconds on most.
_TICK_NS = 2 * 10**9


def write_checksums(folder: Path) -> None:
    """Writes the checksums of all files of the folder."""
    files = sorted(path for path in folder.iterdir() if path.name not in (SUMS, CHECKED))
    looks = {path.name: _look(path) for path in files}
    sums = {path.name: _crc32(path) for path in files}
    write_atomically(folder / SUMS, json.dumps(sums, indent=1).encode())
    write_atomically(folder / CHECKED, json.dumps(looks, indent=1).encode())


def verify(folder: Path) -> None:
    """Reads the files that may have changed since they last passed.

    Raises:
        ValueError: The content of a file has changed, or the checksums are damaged.
        OSError: A file is missing.
    """
    sums = json.loads((folder / SUMS).read_bytes())
    if not isinstance(sums, dict):
        raise ValueError(f"{folder / SUMS} is damaged")
    known = _known(folder)
    looks = {name: _look(folder / name) for name in sums}
    unread = [name for name in sums if known.get(name) != looks[name]]
    size = sum(looks[name][0] for name in unread)
    if size > _LARGE:
        log.info(
            "Verifying %.1f GB of %s, as after every change",
            size / 1e9,
            folder,
        )
    for name in unread:
        if _crc32(folder / name) != sums[name]:
            raise ValueError(f"the content of {name} has changed since it was written")
    if unread:
        with contextlib.suppress(OSError):  # a read-only folder: read every time
            write_atomically(folder / CHECKED, json.dumps(looks, indent=1).encode())


def _look(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _known(folder: Path) -> dict[str, list[int]]:
    """The stat of files that passed, where it is old enough to show later changes."""
    try:
        known = json.loads((folder / CHECKED).read_bytes())
        until = (folder / CHECKED).stat().st_mtime_ns - _TICK_NS
        return {name: look for name, look in known.items() if max(look[1:3]) < until}
    except (OSError, ValueError, TypeError, AttributeError, IndexError):
        return {}


def _crc32(path: Path) -> int:
    block = memoryview(bytearray(_BLOCK))
    crc = 0
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(block):
            crc = zlib.crc32(block[:size], crc)
    return crc
