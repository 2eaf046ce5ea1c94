"""The folder `unfinished/` beside shards that are being made: who makes which, and what is done.

    plan.json      a digest of the text and the settings, written before anything else
    run.lock       of the process that prepares them, on a file system of this machine
    worker_N.json  how much worker N has read and written
    NAME.json      the record of a task: its shards

It is removed when `index.json` is written.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from lightning_module.data.shards import index
from lightning_module.data.shards.index import Shard
from lightning_module.errors import DataError
from lightning_module.run_lock import RunLock

UNFINISHED = "unfinished"
_PLAN = "plan.json"


@contextlib.contextmanager
def owned(filesystem: AbstractFileSystem, folder: str, out: str, source: str) -> Iterator[None]:
    """Marks a folder as that of these shards, before anything else is written there.

    Args:
        filesystem: Where the folder is.
        folder: The folder.
        out: Its URL, for errors.
        source: Digest of text and settings.

    Raises:
        DataError: It has files of the user's, or a part of other shards.
        RunError: Another process of a machine that shares this file system prepares shards there.
    """
    unfinished = f"{folder}/{UNFINISHED}"
    names = {Path(path).name for path in _paths(filesystem, folder)}
    begun = {Path(path).name for path in _paths(filesystem, unfinished)}
    if _PLAN not in begun and (found := sorted(n for n in names if not n.startswith("."))):
        raise DataError(f"out={out} has other files ({', '.join(found[:3])}): set a new folder.")
    other = False
    if _PLAN in begun:
        # It is cut if the process was killed while it wrote it, before anything else.
        with contextlib.suppress(ValueError):
            other = json.loads(filesystem.cat_file(f"{unfinished}/{_PLAN}"))["source"] != source
    if other and any(map(_is_record, begun)):
        raise DataError(
            f"out={out} has a part of the shards of other text or of other settings: set another "
            "out, or delete that folder."
        )
    filesystem.makedirs(unfinished, exist_ok=True)
    lock = RunLock(Path(unfinished)) if isinstance(filesystem, LocalFileSystem) else None
    if lock is not None:
        lock.take()
    try:
        if other and index.TOKENIZER in names:
            filesystem.rm_file(f"{folder}/{index.TOKENIZER}")
        filesystem.pipe_file(f"{unfinished}/{_PLAN}", json.dumps({"source": source}).encode())
        yield
    finally:
        if lock is not None:
            lock.release()


def record(
    filesystem: AbstractFileSystem, folder: str, source: str, task: str, shards: list[Shard]
) -> None:
    """Writes that a task is done."""
    content = {"source": source, "shards": [asdict(shard) for shard in shards]}
    filesystem.pipe_file(f"{folder}/{UNFINISHED}/{task}.json", json.dumps(content).encode())


def recorded(filesystem: AbstractFileSystem, folder: str, source: str) -> dict[str, list[Shard]]:
    """The shards of each task that is done."""
    made = {}
    for path, content in _files(filesystem, folder, _is_record).items():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # of a worker that was killed
            found = json.loads(content)
            if found["source"] == source:
                made[Path(path).stem] = [Shard(**shard) for shard in found["shards"]]
    return made


def report(
    filesystem: AbstractFileSystem, folder: str, worker: int, characters: int, tokens: int
) -> None:
    """Writes how many characters a worker has read, and tokens written."""
    content = json.dumps([characters, tokens]).encode()
    filesystem.pipe_file(f"{folder}/{UNFINISHED}/worker_{worker}.json", content)


def reported(filesystem: AbstractFileSystem, folder: str) -> tuple[int, int]:
    """Characters and tokens of all workers."""
    read = written = 0
    for content in _files(filesystem, folder, _is_report).values():
        with contextlib.suppress(ValueError):  # it is being written
            characters, tokens = json.loads(content)
            read, written = read + characters, written + tokens
    return read, written


def forget_reports(filesystem: AbstractFileSystem, folder: str) -> None:
    """Removes those of an earlier round."""
    for path in _files(filesystem, folder, _is_report):
        filesystem.rm_file(path)


def _is_record(name: str) -> bool:
    return name.startswith(tuple(f"{split}-" for split in index.SPLITS))


def _is_report(name: str) -> bool:
    return name.startswith("worker_")


def _files(
    filesystem: AbstractFileSystem, folder: str, wanted: Callable[[str], bool]
) -> dict[str, bytes]:
    """The contents of the files in `unfinished/` with such names."""
    paths = _paths(filesystem, f"{folder}/{UNFINISHED}")
    paths = [path for path in paths if wanted(Path(path).name)]
    # Several at once; `cat` would too, but takes brackets in the name of a folder for a glob.
    contents = filesystem.cat_ranges(paths, None, None, on_error="return") if paths else []
    return {p: c for p, c in zip(paths, contents, strict=True) if isinstance(c, bytes)}


def _paths(filesystem: AbstractFileSystem, folder: str) -> list[str]:
    """What is in a folder, if there is one."""
    filesystem.invalidate_cache()
    try:
        paths = filesystem.ls(folder, detail=False)
    except FileNotFoundError:
        return []
    return [path for path in paths if path.rstrip("/") != folder]  # some stores list it too
