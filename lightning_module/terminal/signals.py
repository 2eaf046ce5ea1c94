"""Ctrl-C and SIGTERM: the exception that they raise and the exit code."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)

Handler = Callable[[int, FrameType | None], None]


class Interrupted(BaseException):
    """SIGINT or SIGTERM ends the process now.

    Not a KeyboardInterrupt, for which Lightning ends the process with exit code 1; and not an
    Exception, so that code that handles errors does not catch it.

    Attributes:
        signal: the signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number


def exit_code(number: int) -> int:
    """The exit code of a process that a signal ended, by the shells' convention."""
    return 128 + number


def interrupt(number: int, frame: FrameType | None) -> None:
    """A signal handler that raises `Interrupted`."""
    raise Interrupted(number)


@contextmanager
def without_ctrl_c() -> Iterator[None]:
    """Processes started in this context never receive SIGINT; this one does afterwards."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def handled_by(handler: Handler) -> Iterator[None]:
    """`handler` handles SIGINT and SIGTERM within this context.

    An ignored signal stays ignored (a shell ignores SIGINT for background processes), and a handler
    of other software stays too (submitit has its own use of SIGTERM). Outside of the main thread,
    where Python sets no handlers, nothing changes.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            present = signal.getsignal(number)
            replaceable = present in (signal.SIG_DFL, signal.default_int_handler)
            if replaceable or getattr(present, "__module__", "").startswith("lightning_module."):
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for signum, present in before.items():
            signal.signal(signum, present)
