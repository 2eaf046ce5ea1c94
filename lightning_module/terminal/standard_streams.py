"""Standard input, output and error of a command that are closed or on a full disk."""

import errno
import os
import sys
from typing import Any, TextIO

# Errors of a write that can never succeed: the reader has ended, the disk is full or the terminal
# is closed.
UNWRITABLE = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


def open_standard_streams() -> None:
    """Opens the closed ones: a file opened later must not get one of their numbers."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, this one
    # sys.stdin stays None: commands report that there is no input.
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def stop_printing() -> None:
    """Prevents a second failure of the buffered output when Python exits."""
    sys.stdout = None


class LastingOutput:
    """Standard output of a training, which continues if nothing reads its output.

    The first failure is reported on standard error; later output is lost.

    Args:
        stream: the stream to write to.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream: TextIO | None = stream

    def write(self, text: str) -> int:
        """Writes a text, unless an earlier write failed."""
        self._attempt("write", text)
        return len(text)

    def flush(self) -> None:
        """Flushes what was written, unless an earlier write failed."""
        self._attempt("flush")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream or sys.__stdout__, name)

    def _attempt(self, method: str, *arguments: str) -> None:
        if self.stream is None:
            return
        try:
            getattr(self.stream, method)(*arguments)
        except OSError as error:
            self.stream = None
            print(
                f"standard output cannot be written ({error.strerror}); the run continues without "
                "it",
                file=sys.stderr,
            )
