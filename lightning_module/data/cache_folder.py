"""A folder in the cache: made once and atomically, checked at every start."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import IO, Any

from filelock import FileLock

from lightning_module.atomic_files import NO_ROOM, beside
from lightning_module.data.checksums import verify
from lightning_module.errors import DataError

log = logging.getLogger(__name__)

NOT_WHOLE = (OSError, ValueError, KeyError, TypeError)  # errors of opening a damaged folder

# Errors of a disk that cannot be written to.
_NO_ROOM = (*NO_ROOM, errno.ENOTDIR, errno.EEXIST)


class CacheFolder(ABC):
    """A folder whose name contains a digest of all that its content depends on.

    It is written under another name and renamed when complete, so concurrent runs do not disturb
    each other, and what a kill or a full disk leaves is never used. Checksums detect changes of its
    bytes (`data/checksums.py`).

    Attributes:
        folder: The folder.
        holds: What it holds, for messages.
        size: The space that it takes, for the message of a full disk.
    """

    folder: Path
    holds: str
    size: str

    @abstractmethod
    def open(self) -> Any:
        """The content.

        Raises:
            NOT_WHOLE: The folder is missing or incomplete.
        """

    @abstractmethod
    def _write(self, folder: Path) -> None:
        """Writes the content to a folder, with `write_checksums` at the end."""

    @abstractmethod
    def _announce(self) -> None:
        """Logs what will be made."""

    def make(self) -> None:
        """Makes the folder unless it exists and is complete.

        Raises:
            DataError: It cannot be made from what was given, or the disk is full.
        """
        if self._is_whole():
            return
        started = time.monotonic()
        self._announce()
        parent = self.folder.parent
        try:
            parent.mkdir(parents=True, exist_ok=True)
            self._sweep()
            new = beside(self.folder)
            new.mkdir()
            try:
                self._write(new)
                self._replace_with(new)
            finally:
                shutil.rmtree(new, ignore_errors=True)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            raise DataError(
                f"Cannot write the {self.holds} to {parent}: {error.strerror}. No partial files "
                "were left there. Free some space, or set TRITON_GRU_CACHE to a folder elsewhere "
                f"({self.size})."
            ) from error
        took = time.monotonic() - started
        log.info("%s are in %s (%.1f s)", self.holds.capitalize(), self.folder, took)

    def _is_whole(self) -> bool:
        if not self.folder.exists():
            return False
        try:
            verify(self.folder)
            self.open()
        except NOT_WHOLE as error:
            log.warning(
                "The %s in %s are damaged (%s): making them again", self.holds, self.folder, error
            )
            return False
        return True

    def _replace_with(self, new: Path) -> None:
        try:
            os.rename(new, self.folder)  # fails if a folder exists that is not empty
            return
        except OSError:
            pass
        # One process at a time checks and replaces: between a check that finds a damaged folder and
        # the rename, another run may have replaced it, and its complete folder would be moved away.
        with FileLock(self.folder.parent.with_suffix(".lock")):
            if self._is_whole():  # another run has replaced it
                return
            damaged = new.with_name(new.name + "-damaged")
            with contextlib.suppress(FileNotFoundError):
                os.rename(self.folder, damaged)
            shutil.rmtree(damaged, ignore_errors=True)
            try:
                os.rename(new, self.folder)
            except OSError:  # a run that found no folder made one between the two
                if not self._is_whole():
                    raise

    def _sweep(self) -> None:
        """Removes the temporary folders of runs that were killed a day ago or earlier."""
        for left in self.folder.parent.glob(".*"):
            if left.is_dir() and time.time() - left.stat().st_mtime > 86_400:
                shutil.rmtree(left, ignore_errors=True)


def flush(file: IO[Any]) -> None:
    """Puts a file on the disk.

    Before the folder gets its final name, so that even after a power cut a folder of that name is
    complete.
    """
    file.flush()
    os.fsync(file.fileno())
