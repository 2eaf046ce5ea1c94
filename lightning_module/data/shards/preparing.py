"""Makes the shards of a corpus in many processes (see `index.py` for the files).

The corpus divides itself into parts (`Corpus.parts`), and parts are grouped into tasks of about a
shard each: neither depends on the number of processes, so the shards do not. A worker makes the
shards of one task after the other, and after each one writes the task's record to `unfinished/`.
Whatever ends a worker, or this process, the next round or run makes the tasks without a record.
`index.json` is written when all have one.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

from fsspec import AbstractFileSystem

from lightning_module.credentials import without_credentials
from lightning_module.data.corpora import Corpus, Document
from lightning_module.data.corpora.corpus import Part, beginning, digest
from lightning_module.data.shards import index
from lightning_module.data.shards.executors import Executor, Job
from lightning_module.data.shards.index import Index
from lightning_module.data.shards.store import is_of_store, open_store
from lightning_module.data.shards.unfinished import (
    UNFINISHED,
    forget_reports,
    owned,
    record,
    recorded,
    report,
    reported,
)
from lightning_module.data.shards.writing import SHARD, dtype_of, write_shards
from lightning_module.data.tokenizers import Tokenizer, TokenizerSettings
from lightning_module.errors import DataError
from lightning_module.terminal.progress_bars import reading

log = logging.getLogger(__name__)

_REPORT_EVERY = 2.0  # seconds between two reports of a worker
_SAMPLE = 2**20  # characters from which the size of the tokens is estimated


class Task(NamedTuple):
    """Consecutive parts of a split that one worker makes into shards.

    Attributes:
        name: Of the shards, which get a number each.
        parts: Of the corpus.
    """

    name: str
    parts: list[Part]

    def size(self) -> int:
        """Characters, about; of unknown parts none."""
        return sum(part.size or 0 for part in self.parts)


def prepare(
    corpus: Corpus,
    settings: TokenizerSettings,
    out: str,
    executor: Executor,
    tokenizer_chars: int = 10**9,
    size: int = SHARD,
) -> Index:
    """Makes the shards of a corpus, or those that an earlier call did not make.

    Args:
        corpus: The text.
        settings: Of the tokenizer, which is trained on training text in this process.
        out: A URL of fsspec, of a folder that is empty or has a part of these shards.
        executor: Starts the workers.
        tokenizer_chars: At most so many characters train the tokenizer, the same share of the
            beginning of each part.
        size: Bytes of a shard.

    Returns:
        What is in `index.json`.

    Raises:
        DataError: The text or the settings cannot be used, `out` has other files or cannot be
            written, or workers die again and again.
        RunError: Another process prepares shards in `out`.
    """
    settings.check()
    filesystem, folder = open_store(out)
    source = digest("shards 1", corpus.fingerprint, asdict(settings), tokenizer_chars, size)
    try:
        present = _present(filesystem, folder, out, source)
        if present is not None:
            log.info("The shards in %s are complete", out)
            if filesystem.exists(f"{folder}/{UNFINISHED}"):  # of a run killed at its very end
                filesystem.rm(f"{folder}/{UNFINISHED}", recursive=True)
            return present
        with owned(filesystem, folder, out, source):
            return _make(
                filesystem, folder, out, source, corpus, settings, executor, tokenizer_chars, size
            )
    except Exception as error:
        if not is_of_store(error):
            raise
        raise _cannot_write(f"to {out}", error) from error
    finally:
        executor.stop()


def _cannot_write(where: str, error: Exception) -> DataError:
    return DataError(
        f"Cannot write {where}: {without_credentials(error)}. What is there is kept: the same "
        "command makes the rest."
    )


def _present(filesystem: AbstractFileSystem, folder: str, out: str, source: str) -> Index | None:
    path = f"{folder}/{index.INDEX}"
    try:
        exists = filesystem.exists(path)
    except Exception as error:  # the first access: settings of the store that it cannot use
        raise DataError(f"{out} cannot be read: {without_credentials(error)}") from error
    if not exists:
        return None
    present = Index.from_json(filesystem.cat_file(path), f"{out}/{index.INDEX}")
    if present.source != source:
        raise DataError(
            f"out={out} has shards of other text or of other settings ({present.corpus}, tokenizer "
            f"{present.tokenizer.kind}): set another out, or delete that folder."
        )
    return present


def _make(
    filesystem: AbstractFileSystem,
    folder: str,
    out: str,
    source: str,
    corpus: Corpus,
    settings: TokenizerSettings,
    executor: Executor,
    tokenizer_chars: int,
    size: int,
) -> Index:
    log.info("Preparing %s in %s", corpus.description, out)
    train, val = corpus.divided(partial(_apply, executor, out))
    for split, parts in zip(index.SPLITS, (train, val), strict=True):
        if not parts:
            raise _no_text(corpus, split)
    tokenizer = _tokenizer(filesystem, folder, settings, train, tokenizer_chars)
    tasks = _tasks("train", train, tokenizer, size) + _tasks("val", val, tokenizer, size)
    made = recorded(filesystem, folder, source)
    while missing := [task for task in tasks if task.name not in made]:
        if made:
            log.info("%d of %d tasks are done", len(tasks) - len(missing), len(tasks))
        failed = _round(filesystem, folder, source, tokenizer, missing, executor, size)
        now = recorded(filesystem, folder, source)
        if len(now) == len(made):
            raise _no_progress("having made any shard", failed, out)
        if failed is not None:
            log.warning("A worker ended early (%s: %s)", type(failed).__name__, failed)
        made = now
    whole = Index(
        corpus=corpus.description,
        tokenizer=settings,
        fingerprint=tokenizer.fingerprint,
        dtype=dtype_of(tokenizer).name,
        splits={
            split: [
                shard
                for task in tasks
                if task.name.startswith(f"{split}-")
                for shard in made[task.name]
            ]
            for split in index.SPLITS
        },
        source=source,
    )
    for split, shards in whole.splits.items():
        if not shards:
            raise _no_text(corpus, split)
    filesystem.pipe_file(f"{folder}/{UNFINISHED}/{index.INDEX}", whole.to_json())
    filesystem.mv(f"{folder}/{UNFINISHED}/{index.INDEX}", f"{folder}/{index.INDEX}")
    filesystem.rm(f"{folder}/{UNFINISHED}", recursive=True)
    return whole


def _no_text(corpus: Corpus, split: str) -> DataError:
    return DataError(f"{corpus.description}: the {split} split has no text.")


def _no_progress(what: str, failed: BaseException | None, out: str) -> DataError:
    return DataError(
        f"The workers ended without {what} ({type(failed).__name__}: {failed}). If they were "
        f"killed, memory may be short: set fewer workers. What is in {out} is kept: the same "
        "command makes the rest."
    )


def _apply(
    executor: Executor, out: str, function: Callable[[Any], Any], items: Sequence[Any]
) -> list[Any]:
    """Applies a function to items in the workers; to those of a killed one again."""
    if len(items) < 2:
        return [function(item) for item in items]
    results: dict[int, Any] = {}
    while missing := [n for n in range(len(items)) if n not in results]:
        workers = min(executor.workers, len(missing))
        shares = [missing[w::workers] for w in range(workers)]
        jobs = [executor.start(_each, function, [items[n] for n in share]) for share in shares]
        while not all(job.done() for job in jobs):
            time.sleep(0.05)
        failed = None
        for share, job in zip(shares, jobs, strict=True):
            failed = job.exception() or failed
            if isinstance(failed, DataError):
                raise failed
            if job.exception() is None:
                results.update(zip(share, job.result(), strict=True))
        if len(missing) == len(items) - len(results):
            raise _no_progress("having read the text", failed, out)
    return [results[n] for n in range(len(items))]


def _each(function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    return [function(item) for item in items]


def _tokenizer(
    filesystem: AbstractFileSystem,
    folder: str,
    settings: TokenizerSettings,
    train: list[Part],
    most: int,
) -> Tokenizer:
    """The tokenizer; that of an earlier run, if there is one."""
    path = f"{folder}/{index.TOKENIZER}"
    with contextlib.suppress(FileNotFoundError, ValueError):  # of a process that was killed
        return Tokenizer.from_json(filesystem.cat_file(path), path)
    with reading("Finding the tokens of the training text", None, log) as advance:
        tokenizer = Tokenizer.train(settings, _text(train, most, advance))
    filesystem.pipe_file(path, tokenizer.to_json())
    return tokenizer


def _text(parts: list[Part], most: int, advance: Callable[[int], None]) -> Iterator[str]:
    """Text to train the tokenizer on: all, or about `most` characters, a share of each part.

    Sizes may be too small, of compressed files: there is no shorter share when `most` suffices.
    """
    total = sum(part.size or 0 for part in parts)
    for part in parts:
        of_all = 1 / len(parts) if part.size is None else part.size / max(1, total)
        share = math.ceil(most * of_all)
        for document in part.read():
            for piece in beginning(document.pieces(), share):
                yield piece
                advance(len(piece))
                share -= len(piece)
            if share <= 0:
                break


def _tasks(split: str, parts: list[Part], tokenizer: Tokenizer, size: int) -> list[Task]:
    """Groups parts to about `size` bytes of tokens; one whose size is unknown is alone."""
    per_character = _bytes_per_character(parts, tokenizer)
    groups: list[list[Part]] = []
    last = 0.0  # bytes of the last group
    for part in parts:
        expected = float("inf") if part.size is None else part.size * per_character
        if not groups or last + expected > size:
            groups.append([])
            last = 0.0
        groups[-1].append(part)
        last += expected
    return [Task(f"{split}-{n:05}", group) for n, group in enumerate(groups)]


def _bytes_per_character(parts: list[Part], tokenizer: Tokenizer) -> float:
    sample = "".join(_text(parts[:1], _SAMPLE, lambda _: None))
    tokens = sum(map(len, tokenizer.encode_corpus([sample])))
    return dtype_of(tokenizer).itemsize * tokens / max(1, len(sample))


def _round(
    filesystem: AbstractFileSystem,
    folder: str,
    source: str,
    tokenizer: Tokenizer,
    tasks: list[Task],
    executor: Executor,
    size: int,
) -> BaseException | None:
    """Starts a worker for each share of the tasks, and waits for their ends.

    Returns:
        How one of them ended early; None if none did.

    Raises:
        DataError: One of them raised it.
    """
    url = filesystem.unstrip_protocol(folder)
    content = tokenizer.to_json()
    workers = min(executor.workers, len(tasks))
    begun = time.monotonic()
    tokens = characters = 0
    total = sum(task.size() for task in tasks) if all(t.size() for t in tasks) else None

    def detail() -> str:
        seconds = time.monotonic() - begun
        text = f", {tokens / seconds:,.0f} tokens/s"
        if total and 0 < characters < total:
            left = round(seconds * (total - characters) / characters)
            text += f", {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        return text

    forget_reports(filesystem, folder)
    jobs: list[Job] = [
        executor.start(work, url, source, content, tasks[w::workers], size, w)
        for w in range(workers)
    ]
    what = f"Tokenising in {workers} worker{'s' * (workers > 1)}"
    with reading(what, total, log, detail) as advance:
        looked = 0.0
        while True:
            running = [job for job in jobs if not job.done()]
            for job in jobs:
                if job not in running and isinstance(error := job.exception(), DataError):
                    raise error
            if time.monotonic() - looked > _REPORT_EVERY or not running:
                looked = time.monotonic()
                read, tokens = reported(filesystem, folder)
                advance(max(0, read - characters))
                characters = max(read, characters)
            if not running:
                break
            time.sleep(0.1)
    return next((error for job in jobs if (error := job.exception()) is not None), None)


def work(
    url: str, source: str, tokenizer_json: bytes, tasks: list[Task], size: int, number: int
) -> None:
    """What a worker does: the shards of each task, then its record.

    Args:
        url: As `out`.
        source: Digest of text and settings.
        tokenizer_json: `Tokenizer.to_json`.
        tasks: Its tasks.
        size: Bytes of a shard.
        number: Of the worker.

    Raises:
        DataError: The text cannot be read, or `url` not be written.
    """
    # A core each: otherwise every worker's tokenizer uses all of them.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    filesystem, folder = open_store(url)
    tokenizer = Tokenizer.from_json(tokenizer_json, url)
    read = written = 0
    last = 0.0  # when it reported

    def advance(characters: int, tokens: int) -> None:
        nonlocal read, written, last
        read, written = read + characters, written + tokens
        if time.monotonic() - last > _REPORT_EVERY:
            last = time.monotonic()
            report(filesystem, folder, number, read, written)

    for task in tasks:
        try:
            shards = write_shards(
                filesystem, folder, task.name, _documents(task), tokenizer, advance, size
            )
            record(filesystem, folder, source, task.name, shards)
            report(filesystem, folder, number, read, written)
        except Exception as error:
            if not is_of_store(error):
                raise
            # Not the error itself, whose class this process may not be able to read.
            raise _cannot_write(f"the shards {task.name} to {url}", error) from None


def _documents(task: Task) -> Iterator[Document]:
    for part in task.parts:
        yield from part.read()
