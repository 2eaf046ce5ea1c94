"""UTF-8 files of the user's own, read in pieces, so that they may be larger than memory."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from lightning_module.data.corpora.corpus import Apply, Corpus, Document, Part, beginning, digest
from lightning_module.data.corpora.text import (
    boundary,
    is_compressed,
    open_binary,
    read_utf8,
    readable,
)
from lightning_module.data.shards.store import open_store
from lightning_module.errors import DataError

PART = 2**26  # bytes of a file that a process reads by itself


def text_files(paths: str | Iterable[str], val_fraction: float = 0.1) -> Corpus:
    """UTF-8 files, a document each, the last part of the text for validation.

    Args:
        paths: Files, globs (`**` matches folders) and URLs of fsspec, in the order of the text; the
            matches of a glob are sorted, and a file found twice counts once. Empty files found by a
            glob are skipped; an empty file given by name is an error.
        val_fraction: Share of all characters, from the end of the text, for validation, between
            0 and 1. The file in which it begins is divided: its beginning is training text.

    Raises:
        DataError: A file is missing, a folder, unreadable or empty, or a glob has no match; when
            the text is read: it is not UTF-8.
    """
    check_share(val_fraction)
    files = find_files(paths)

    @cache
    def sizes() -> list[int]:
        return [sum(map(len, read_utf8(file.path))) for file in files]

    def documents(validation: bool) -> Iterator[Document]:
        begin = 0
        # As in the usual 90/10 split of one text: the first int(0.9 n) characters train.
        border = int(sum(sizes()) * (1 - val_fraction))
        for file, size in zip(files, sizes(), strict=True):
            here = min(max(border - begin, 0), size)
            begin += size
            if validation and here < size:
                name = f"{file.path} from character {here:,}" if here else str(file.path)
                yield Document(name, _rest(read_utf8(file.path), here))
            elif not validation and here > 0:
                yield Document(str(file.path), beginning(read_utf8(file.path), here))

    def parts(apply: Apply) -> tuple[list[Part], list[Part]]:
        ranges = [part for file in files for part in file.ranges()]
        sizes = apply(_characters, ranges)
        border = int(sum(sizes) * (1 - val_fraction))
        train: list[Part] = []
        val: list[Part] = []
        begin = 0
        begun: dict[int, Path | str] = {}  # the file of the document that each split is in
        for part, size in zip(ranges, sizes, strict=True):
            here = min(max(border - begin, 0), size)
            begin += size
            for split, first, end in ((train, 0, here), (val, here, size)):
                if first < end:
                    continues = begun.get(id(split)) == part.path
                    read = partial(_characters_of, part, first, end, continues)
                    split.append(Part(read, end - first))
                    begun[id(split)] = part.path
        return train, val

    return Corpus(
        name="text_files",
        # Size, time and inode identify the content, so that starting does not read the corpus.
        fingerprint=digest("text_files 1", [file.identity for file in files], val_fraction),
        description=f"{len(files)} text file{'s' * (len(files) > 1)}, "
        f"the last {val_fraction:.3g} of the text for validation",
        train=lambda: documents(validation=False),
        val=lambda: documents(validation=True),
        parts=parts,
    )


def whole_files(paths: str | Iterable[str]) -> Iterator[Document]:
    """UTF-8 files, a document each; see `text_files`, which raises the same errors."""
    for file in find_files(paths):
        yield Document(str(file.path), read_utf8(file.path))


class Range(NamedTuple):
    """A part of a file; its text begins at the `boundary` from `begin` on, and ends likewise.

    Attributes:
        path: Of the file.
        begin: In bytes.
        end: In bytes; None: the end of the file.
        size: Its bytes; of a compressed file, compressed.
    """

    path: Path | str
    begin: int
    end: int | None
    size: int

    def text(self) -> Iterator[str]:
        """Its text, in pieces."""
        if self.begin == 0 and self.end is None:
            return read_utf8(self.path)
        with readable(self.path), open_binary(self.path) as file:
            begin = boundary(file, self.begin)
            end = None if self.end is None else boundary(file, self.end)
        return iter(()) if begin == end else read_utf8(self.path, begin, end)


class File(NamedTuple):
    """A file of the user's.

    Attributes:
        path: A path, or a URL of fsspec.
        size: In bytes.
        identity: What changes with its content, as far as can be known without reading it.
    """

    path: Path | str
    size: int
    identity: tuple[object, ...]

    def ranges(self) -> list[Range]:
        """The file in ranges of `PART` bytes; a compressed one is whole."""
        if is_compressed(self.path):
            return [Range(self.path, 0, None, self.size)]
        ends = [*range(PART, self.size, PART), None]
        return [
            Range(self.path, n * PART, end, min(PART, self.size - n * PART))
            for n, end in enumerate(ends)
        ]


def check_share(val_fraction: float) -> None:
    """Raises DataError unless it is a share of the text for validation."""
    if not isinstance(val_fraction, float) or not 0 < val_fraction < 1:
        raise DataError(f"data.val_fraction must lie between 0 and 1, got {val_fraction}.")


def find_files(paths: str | Iterable[str]) -> list[File]:
    """The files of paths, globs and URLs; see `text_files`, which raises the same errors."""
    given_paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not given_paths:
        raise DataError("data.paths is empty: give files or globs, 'data.paths=[a.txt,b/*.txt]'.")
    found: dict[Path | str, File] = {}
    for given in given_paths:
        for file in _at_url(given) if "://" in str(given) else map(_local, _at_path(given)):
            found[file.path] = file
    return list(found.values())


def _local(path: Path) -> File:
    path, status = path.resolve(), path.stat()
    identity = (path, status.st_size, status.st_mtime_ns, status.st_ino)
    return File(path, status.st_size, identity)


def _at_url(given: str) -> list[File]:
    filesystem, path = open_store(given)
    with readable(given):
        try:
            hits = sorted(filesystem.glob(path)) if glob.has_magic(path) else [path]
            about = [filesystem.info(hit) for hit in hits]
        except FileNotFoundError:
            raise DataError(f"There is no file {given}.") from None
    files = [a for a in about if a["type"] == "file" and (a["size"] or a["size"] is None)]
    if not files:
        raise DataError(f"{given} finds only empty files or folders, or nothing.")
    unsized = [a["name"] for a in files if a["size"] is None]
    if unsized:
        raise DataError(f"The server of {unsized[0]} does not tell its size: download it first.")
    return [
        File(
            url := filesystem.unstrip_protocol(a["name"]),
            a["size"],
            (url, a["size"], a.get("ETag"), a.get("LastModified"), a.get("mtime")),
        )
        for a in files
    ]


def _at_path(given: str) -> list[Path]:
    path = Path(os.path.expanduser(given))  # which leaves ~nobody.txt as it is
    if os.path.isdir(path):
        raise DataError(f"{given} is a folder: give its files, '{path}/**/*.txt'.")
    if os.path.exists(path):
        if not os.path.isfile(path):
            raise DataError(
                f"{given} is a pipe or a device: text is read more than once, so put it into a "
                "file first."
            )
        if not path.stat().st_size:
            raise DataError(f"{given} is empty: leave it out of data.paths.")
        return [path]
    if glob.has_magic(str(path)):
        hits = [Path(hit) for hit in sorted(glob.glob(str(path), recursive=True))]
        files = [hit for hit in hits if hit.is_file() and hit.stat().st_size]
        if not files:
            raise DataError(
                f"The glob {given} finds {'only empty files or folders' if hits else 'nothing'}"
                f" (from {Path.cwd()}). Quote it so that the shell leaves it as it is."
            )
        return files
    several = f" Several are given as data.paths=[{given}]." * ("," in str(given))
    raise DataError(f"There is no file {given} (from {Path.cwd()}).{several}")


def _characters(part: Range) -> int:
    return sum(map(len, part.text()))


def _characters_of(part: Range, first: int, end: int, continues: bool) -> Iterator[Document]:
    text = beginning(_rest(part.text(), first), end - first)
    yield Document(f"{part.path} from byte {part.begin:,}", text, continues)


def _rest(pieces: Iterable[str], characters: int) -> Iterator[str]:
    for piece in pieces:
        if len(piece) > characters:
            yield piece[characters:]
        characters = max(0, characters - len(piece))
