"""Reads of a store that fails, hangs or is slow: several at once, repeated, within a time limit."""

from __future__ import annotations

import logging
import math
import queue
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from fsspec import AbstractFileSystem

from lightning_module.credentials import without_credentials
from lightning_module.data.shards.store import open_store
from lightning_module.errors import DataError, StoreError

log = logging.getLogger(__name__)

# Reads at once. With 100 ms each they are 160 blocks, or 40 MB, per second: a model that takes ten
# million tokens per second needs half of that.
THREADS = 16
# Seconds that a run waits for reads that fail again and again. Shorter than `rank_timeout`, after
# which the ranks that wait for this one end without having saved.
PATIENCE = 120.0
# Seconds after which an attempt without an answer is left to itself, and the next one begins.
ATTEMPT = 20.0
# Seconds before the second attempt; twice as many before each further one, up to the last.
PAUSE, LONGEST_PAUSE = 0.1, 5.0
_LOOK = 0.1  # seconds between two looks at a read that is waited for
_IDLE = 60.0  # seconds after which a thread without work ends
# Answers that another attempt does not change.
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
# How object stores, and servers of HTTP, answer a range past the end of a file: it is cut.
_PAST_THE_END = re.compile(r"range (is )?not satisfiable|\b416\b", re.I)
_REMEDY = (
    "Copy the file there again, or remove it and run triton-gru-prepare again, which makes what is "
    "missing"
)


class Damaged(Exception):
    """What was read has another checksum than the index says."""


class Read:
    """A read in progress; `done` is set when it has its `content` or its `error`."""

    def __init__(self, what: str, attempt: Callable[[], Any]):
        self.what, self.attempt = what, attempt
        self.done = threading.Event()
        self.content: Any = None
        self.error: DataError | None = None
        self.begun: float | None = None  # when the present attempt began; None: none runs
        self.number = 0  # of the present attempt
        self.fault = "no answer"  # of the last attempt
        self.damaged = 0  # attempts with another checksum


class Reader:
    """Reads ranges of the files at a URL, in threads.

    Threads and not fsspec's own asynchronous interface, which local files do not have; and daemons,
    unlike those of `ThreadPoolExecutor`, which the end of the process would wait for although the
    store does not answer.

    Args:
        url: Any that fsspec can open.

    Raises:
        DataError: It cannot be opened here.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self.filesystem: AbstractFileSystem
        self.filesystem, self._root = open_store(url)
        self._queue: queue.SimpleQueue[Read] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._running: dict[threading.Thread, Read | None] = {}
        self._warned_at = -math.inf

    def range(self, name: str, begin: int | None = None, end: int | None = None) -> bytes:
        """Bytes of a file, without repetition: for the function of a `Read`."""
        path = f"{self._root.rstrip('/')}/{name}"
        return self.filesystem.cat_file(path, start=begin, end=end)

    def begin(self, what: str, attempt: Callable[[], Any]) -> Read:
        """Begins a read.

        Args:
            what: The file, for messages.
            attempt: Reads; may be called several times, by different threads. Raises `Damaged` if
                the content is not as it should be, which one repetition is for: the transfer may
                have damaged it.
        """
        read = Read(what, attempt)
        with self._lock:
            self._queue.put(read)
            idle = sum(present is None for present in self._running.values())
            if len(self._running) < THREADS and idle < self._queue.qsize():
                self._start_thread()
        return read

    def cancel(self, read: Read) -> None:
        """Lets a read be whose content is no longer needed."""
        read.done.set()

    def contents(self, reads: Sequence[Read], stop: Callable[[], bool] = lambda: False) -> list:
        """Waits for reads and returns their contents; for none longer than `PATIENCE` in all.

        Args:
            reads: The reads.
            stop: Ends the waiting when it becomes true; some contents are None then.

        Raises:
            StoreError: One failed until the time was over.
        """
        # Not by the clock: the process may have been stopped meanwhile.
        left = PATIENCE
        for read in reads:
            while not (read.done.is_set() or stop() or read.done.wait(_LOOK)):
                self._replace_hanging()
                left -= _LOOK
                if left <= 0:
                    self._fail(
                        read, f"cannot be read: {read.fault}, in {PATIENCE:.0f} s of attempts"
                    )
            if read.error is not None:
                raise read.error
        return [read.content for read in reads]

    def read(self, name: str, check: Callable[[bytes], Any]) -> Any:
        """The content of a file, after a check that may raise `Damaged` or convert it."""
        (content,) = self.contents([self.begin(name, lambda: check(self.range(name)))])
        return content

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._work, name="shards", daemon=True)
        self._running[thread] = None
        thread.start()

    def _work(self) -> None:
        me = threading.current_thread()
        while True:
            try:
                read = self._queue.get(timeout=_IDLE)
            except queue.Empty:
                with self._lock:
                    if self._queue.empty():
                        del self._running[me]
                        return
                continue
            with self._lock:
                if read.done.is_set():
                    continue
                self._running[me] = read
                read.number += 1
                number = read.number
                read.begun = time.monotonic()
            self._attempt(read, number)
            with self._lock:
                if me not in self._running:  # left to itself
                    return
                self._running[me] = None

    def _attempt(self, read: Read, number: int) -> None:
        """One attempt; after a failure the read is queued again, after a pause."""
        final: str | None = None
        try:
            content = read.attempt()
        except Damaged as error:
            fault, damaged = str(error), True
        except Exception as error:  # stores raise many kinds
            fault = without_credentials(error)
            damaged = _PAST_THE_END.search(fault) is not None
            if isinstance(error, _FINAL):
                final = f"cannot be read: {fault}"
        else:
            read.content = content
            read.done.set()
            return
        with self._lock:
            if read.number != number or read.done.is_set():
                return  # left to itself: a later attempt runs, or has succeeded
            read.begun = None
            read.fault = fault
            read.damaged += damaged
            if read.damaged > 1:
                final = f"is damaged: {fault}. {_REMEDY}"
        if final:
            self._fail(read, final)
            return
        self._warn(read)
        time.sleep(min(PAUSE * 2 ** min(number - 1, 16), LONGEST_PAUSE))
        self._queue.put(read)

    def _replace_hanging(self) -> None:
        """Begins the next attempt of reads whose present one has no answer."""
        with self._lock:
            for thread, read in list(self._running.items()):
                if read is None or read.begun is None or read.done.is_set():
                    continue
                if time.monotonic() - read.begun > ATTEMPT:
                    read.begun, read.fault = None, f"no answer for {ATTEMPT:.0f} s"
                    read.number += 1
                    del self._running[thread]
                    self._start_thread()
                    self._queue.put(read)

    def _warn(self, read: Read) -> None:
        if time.monotonic() - self._warned_at > PATIENCE:  # once for all reads of an outage
            self._warned_at = time.monotonic()
            log.warning(
                "%s/%s cannot be read (%s): trying again, for %.0f s once it is needed",
                *(self.url, read.what, read.fault, PATIENCE),
            )

    def _fail(self, read: Read, how: str) -> None:
        if not read.done.is_set():
            read.error = StoreError(f"{self.url}/{read.what} {how}")
            read.done.set()
