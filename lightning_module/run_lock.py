"""One process trains a run at a time: `run.lock` in the run directory names it.

The file names the process that holds the run, which touches it every few seconds. Three signs
decide whether a lock is valid, because each is missing on some systems:

- The holder keeps an advisory lock of the system (flock) on the file, which ends with the process.
  Some network file systems have none, or one that other hosts do not see.
- On its own machine a process exists or not; its start time distinguishes it from a later one with
  the same number. Containers that share a directory do not see each other's processes, so a
  machine is identified by its boot and process namespace, not by a host name.
- Touches show that a process of another machine is alive. They are compared by the clock of the
  file system, so clocks of hosts need not agree.

So the lock of a process of this machine is taken over as soon as it has ended, and that of another
machine's process after `STALE` seconds without a touch. A holder that was only suspended finds
another name in the file when it continues, and ends.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from lightning_module.atomic_files import beside
from lightning_module.errors import RunError

# None on Windows.
fcntl = import_module("fcntl") if find_spec("fcntl") else None

log = logging.getLogger(__name__)

LOCK = "run.lock"
HEARTBEAT = 10.0  # seconds between touches
_LOOK_AGAIN = 2.0  # seconds between checks of a waiting process
STALE = 120.0  # seconds without a touch after which the lock is invalid


@dataclass(frozen=True)
class Holder:
    """The process that holds a run.

    Attributes:
        host: Name of its machine, for users.
        machine: Identifies its machine among others of that name.
        pid: Its process id.
        started: Its start time in the system's own count; None if unknown.
        since: When it took the run.
        token: Unique for each holding.
    """

    host: str
    machine: str
    pid: int
    started: int | None
    since: str
    token: str

    @classmethod
    def here(cls) -> Holder:
        """This process, with the current time."""
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        pid = os.getpid()
        return cls(socket.gethostname(), _machine(), pid, _started(pid), since, uuid.uuid4().hex)

    def is_gone(self) -> bool:
        """Whether it is certain that it is a process of this machine that has ended."""
        return self.machine == _machine() and _started(self.pid) != self.started

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host} since {self.since}"


class RunLock:
    """Holds a run directory from `take` to `release`.

    Args:
        run_dir: The directory, which must exist when the lock is taken.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.file = run_dir, run_dir / LOCK
        self._me: Holder | None = None
        self._descriptor = -1
        self._lost: RunError | None = None
        self._ended = threading.Event()
        self._heart: threading.Thread | None = None

    def take(self) -> None:
        """Takes the lock.

        Raises:
            RunError: Another process holds it, or the directory cannot be written to.
        """
        self._me = Holder.here()
        try:
            self._acquire(self._me)
        except OSError as error:
            raise RunError(f"cannot write to {self.run_dir}: {error.strerror}") from error
        self._ended.clear()
        self._heart = threading.Thread(target=self._beat, daemon=True, name=LOCK)
        self._heart.start()

    def check(self) -> None:
        """Raises if another process has taken over the run.

        Raises:
            RunError: The message names it.
        """
        if self._lost is not None:
            raise self._lost

    def release(self) -> None:
        """Releases the lock; does nothing if it is not held."""
        self._ended.set()
        if self._heart is not None:
            self._heart.join()
            self._heart = None
        if self._descriptor < 0:
            return
        if self._lost is None:
            with contextlib.suppress(OSError):
                self.file.unlink()  # while it is locked: a waiting process sees that it is gone
        os.close(self._descriptor)
        self._descriptor = -1

    def _acquire(self, holder: Holder) -> None:
        while True:
            made = True
            try:
                descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:
                made = False
                try:
                    descriptor = os.open(self.file, os.O_RDWR)
                except FileNotFoundError:
                    continue  # released just now
            try:
                free = _flock(descriptor)
                self._refuse_if_held(free, made)
                # Otherwise it was unlinked meanwhile: the next process makes and locks another.
                if _same_file(descriptor, self.file):
                    self._sign(descriptor, holder)
                    return
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _sign(self, descriptor: int, holder: Holder) -> None:
        try:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps(asdict(holder), indent=1).encode())
            os.fsync(descriptor)
        except OSError:
            self.file.unlink()
            raise
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = descriptor

    def _refuse_if_held(self, free: bool | None, made: bool) -> None:
        """Raises RunError if a sign shows that another process holds the file.

        Args:
            free: Whether this process got the system's lock on it; None if there is no such lock.
            made: Whether this process has just created it.
        """
        if made and free is not False:
            return
        holder, silent = read_holder(self.run_dir), _seconds_since_touch(self.file)
        if free is False or (holder is None and not free and silent <= STALE):
            raise self._held_by(holder, silent)
        if holder is None:
            return  # its creator was killed before it wrote its name, or is too late for the lock
        if holder.is_gone() or (free and holder.machine == _machine()):
            log.info("%s was held by %s, which has ended: taken over", self.run_dir, holder)
        elif silent > STALE:
            log.warning(
                "%s was held by %s, last touched %.0f s ago: taken over",
                self.run_dir,
                holder,
                silent,
            )
        else:
            raise self._held_by(holder, silent)

    def _held_by(self, holder: Holder | None, silent: float) -> RunError:
        text = (
            f"{self.run_dir} is held by {holder or 'a process that has just taken it'}, last "
            f"touched {max(0.0, silent):.0f} s ago; one process works there at a time. Wait until "
            "it ends, or stop it"
        )
        if holder is None or holder.machine != _machine():
            text += (
                f". After {STALE:.0f} s without a touch the lock is invalid; if that process "
                f"has certainly ended, delete {self.file}"
            )
        return RunError(text)

    def _beat(self) -> None:
        wait = min(1.0, HEARTBEAT)  # of two that took over a lock at once, one ends soon
        while not self._ended.wait(wait):
            wait = HEARTBEAT
            try:
                holder = read_holder(self.run_dir)
                if holder == self._me:
                    os.utime(self.file)
                elif holder is not None:
                    raise self._held_by(holder, _seconds_since_touch(self.file))
                elif self._me is not None and not self.file.exists():  # deleted by hand
                    self._acquire(self._me)
            except RunError as error:
                self._lost = RunError(f"this process lost the run while it was suspended: {error}")
                return
            except OSError:
                pass  # the file system does not answer: try again later


def wait_until_free(run_dir: Path) -> None:
    """Waits while another process holds the run."""
    lock, logged = RunLock(run_dir), False
    while read_holder(run_dir) is not None:
        try:
            lock.take()
            lock.release()
        except RunError as error:
            if not logged:
                log.info("waiting: %s", error)
            logged = True
            time.sleep(_LOOK_AGAIN)


def read_holder(run_dir: Path) -> Holder | None:
    """The holder of the run by its lock file; None if there is none or it cannot be read."""
    try:
        return Holder(**json.loads((run_dir / LOCK).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _flock(descriptor: int) -> bool | None:
    """Whether this process got the system's lock on the file; None if there is no such lock."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        return None  # ENOLCK, ENOSYS, EOPNOTSUPP: network file systems without locks
    return True


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _seconds_since_touch(file: Path) -> float:
    """Age of a file's modification time by the clock of its own file system."""
    probe = beside(file)
    try:
        probe.touch()
        return probe.stat().st_mtime - file.stat().st_mtime
    except FileNotFoundError:
        return 0.0
    finally:
        probe.unlink(missing_ok=True)


@cache
def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> int | None:
    """The start time of a process of this machine, in the system's own count.

    None if it has ended, or if the time is not available.
    """
    try:
        # The name in parentheses may be anything. After it: state, ..., starttime (man 5 proc).
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
