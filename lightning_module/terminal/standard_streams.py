"""Standard input, output and error of a command: closed, gone, or on a disk that is full."""

import errno
import os
import sys
from typing import Any, TextIO

# What a write says when nothing more can be written: the reader has gone, the disk is full or the
# terminal closed.
UNWRITABLE = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


def open_standard_streams() -> None:
    """Opens those that are closed: a file opened later must not get the number of one of them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, this one
    # sys.stdin stays None: that there is none is for the commands to say.
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def stop_printing() -> None:
    """Keeps what is left in the buffer from failing once more when Python exits."""
    sys.stdout = None


class LastingOutput:
    """Standard output of a training, which goes on when nothing reads what it prints.

    The first failure is said on standard error; what is printed after it is lost.

    Args:
        stream: what is written to.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream: TextIO | None = stream

    def write(self, text: str) -> int:
        """Writes a text, while that can be done."""
        self._attempt("write", text)
        return len(text)

    def flush(self) -> None:
        """Flushes what was written, while that can be done."""
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
                f"standard output cannot be written ({error.strerror}); the run goes on without it",
                file=sys.stderr,
            )
