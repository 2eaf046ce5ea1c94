"""Stored verdicts: a JSON file per device in the user's cache, and files that are only read.

A file is {environment: {class: verdict}}. Later ones of this list override earlier ones: files of
the package, the file that TRITON_GRU_VERDICTS names, the user's own, verdicts that this process
measured or adopted. A file that cannot be read or written causes one warning, and no error.
"""

import contextlib
import functools
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from triton_gru.cache import cache_directory, write_atomically
from triton_gru.verdicts.shapes import Verdict

log = logging.getLogger(__name__)

# Seconds for which to wait for a process that writes the same file; it takes milliseconds.
PATIENCE = 10.0

_here: dict[str, dict[str, Verdict]] = {}  # found by this process, or adopted from rank 0
_warned: set[Path] = set()


def known(environment: str) -> dict[str, Verdict]:
    """The verdicts of a device and versions by class, from all sources."""
    found = {}
    for path in (*_shipped(), *_additional(), _own(environment)):
        found.update(_valid(path).get(environment, {}))
    return {**found, **_here.get(environment, {})}


def adopt(environment: str, verdicts: dict[str, Verdict]) -> None:
    """Uses verdicts in this process, over those of files, and writes nothing."""
    _here.setdefault(environment, {}).update(verdicts)


def remember(environment: str, verdicts: dict[str, Verdict]) -> None:
    """Uses verdicts in this process and adds them to the user's file, if it can be written."""
    adopt(environment, verdicts)
    path = _own(environment)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            records = _raw(path)  # another process may have added some
            of_environment = records.get(environment)
            if not isinstance(of_environment, dict):
                of_environment = records[environment] = {}
            of_environment.update({key: v.record() for key, v in verdicts.items()})
            write_atomically(path, json.dumps(records, indent=1).encode())
    except OSError as error:
        _warn(path, f"cannot be written ({error}); what was measured holds for this process alone")
    _valid.cache_clear()


def _own(environment: str) -> Path:
    device = environment.partition(" | ")[0].partition(" of ")[0]
    name = re.sub(r"[^a-z0-9_]+", "-", device.lower())
    return cache_directory() / "verdicts" / f"{name}.json"


def _additional() -> tuple[Path, ...]:
    named = os.environ.get("TRITON_GRU_VERDICTS")
    return (Path(named).expanduser(),) if named else ()


@functools.cache
def _shipped() -> tuple[Path, ...]:
    return tuple(sorted(Path(__file__).parent.glob("*.json")))


def _raw(path: Path) -> dict[str, Any]:
    """The content of a file; empty if it is not one of ours."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if path in _additional():
            _warn(path, "is not there; TRITON_GRU_VERDICTS names it")
        return {}
    except (OSError, ValueError, RecursionError) as error:
        _warn(path, f"cannot be read ({error}); its verdicts are left out")
        return {}
    if not isinstance(found, dict):
        _warn(path, "holds no verdicts")
        return {}
    return found


@functools.lru_cache
def _valid(path: Path) -> dict[str, dict[str, Verdict]]:
    """The verdicts in a file. Read once a process: a call must not wait for a disk."""
    found: dict[str, dict[str, Verdict]] = {}
    strange = 0
    for environment, records in _raw(path).items():
        if not isinstance(records, dict):
            strange += 1
            continue
        for key, record in records.items():
            try:
                found.setdefault(environment, {})[key] = Verdict.read(record)
            except ValueError:
                strange += 1
    if strange:
        _warn(path, f"has {strange} entries that are no verdicts; they are left out")
    return found


def _warn(path: Path, what: str) -> None:
    if path not in _warned:
        _warned.add(path)
        log.warning("%s %s", path, what)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Admits one process at a time if there are locks; without, the last of two writers wins.

    Raises:
        OSError: The file system has no locks, or another process held this lock for too long.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    with open(path.with_suffix(".lock"), "a") as file:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.01)
        yield
