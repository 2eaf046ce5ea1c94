"""UTF-8 files of the user's own, read in pieces, so that they may be larger than memory."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from lightning_module.data.corpora.corpus import Corpus, Document, beginning, digest
from lightning_module.data.corpora.text import read_utf8
from lightning_module.errors import DataError


def text_files(paths: str | Iterable[str], val_fraction: float = 0.1) -> Corpus:
    """UTF-8 files, a document each, the last part of the text for validation.

    Args:
        paths: Files and globs (`**` matches folders), in the order of the text; the matches of a
            glob are sorted, and a file found twice counts once. Empty files found by a glob are
            skipped; an empty file given by name is an error.
        val_fraction: Share of all characters, from the end of the text, for validation, between
            0 and 1. The file in which it begins is divided: its beginning is training text.

    Raises:
        DataError: A file is missing, a folder, unreadable or empty, or a glob has no match; when
            the text is read: it is not UTF-8.
    """
    if not isinstance(val_fraction, float) or not 0 < val_fraction < 1:
        raise DataError(f"data.val_fraction must lie between 0 and 1, got {val_fraction}.")
    files = _find_files([paths] if isinstance(paths, (str, Path)) else list(paths))

    @cache
    def sizes() -> list[int]:
        return [sum(map(len, read_utf8(file))) for file in files]

    def documents(validation: bool) -> Iterator[Document]:
        begin = 0
        # As in the usual 90/10 split of one text: the first int(0.9 n) characters train.
        border = int(sum(sizes()) * (1 - val_fraction))
        for file, size in zip(files, sizes(), strict=True):
            here = min(max(border - begin, 0), size)
            begin += size
            if validation and here < size:
                name = f"{file} from character {here:,}" if here else str(file)
                yield Document(name, _rest(read_utf8(file), here))
            elif not validation and here > 0:
                yield Document(str(file), beginning(read_utf8(file), here))

    # Size, time and inode identify the content, so that starting does not read the corpus.
    stats = [(file, (s := file.stat()).st_size, s.st_mtime_ns, s.st_ino) for file in files]
    return Corpus(
        name="text_files",
        fingerprint=digest("text_files 1", stats, val_fraction),
        description=f"{len(files)} text file{'s' * (len(files) > 1)}, "
        f"the last {val_fraction:.3g} of the text for validation",
        train=lambda: documents(validation=False),
        val=lambda: documents(validation=True),
    )


def whole_files(paths: str | Iterable[str]) -> Iterator[Document]:
    """UTF-8 files, a document each; see `text_files`, which raises the same errors."""
    for file in _find_files([paths] if isinstance(paths, (str, Path)) else list(paths)):
        yield Document(str(file), read_utf8(file))


def _find_files(paths: list[str]) -> list[Path]:
    if not paths:
        raise DataError("data.paths is empty: give files or globs, 'data.paths=[a.txt,b/*.txt]'.")
    found: dict[Path, None] = {}
    for given in paths:
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
            files = [path]
        elif glob.has_magic(str(path)):
            hits = [Path(hit) for hit in sorted(glob.glob(str(path), recursive=True))]
            files = [hit for hit in hits if hit.is_file() and hit.stat().st_size]
            if not files:
                raise DataError(
                    f"The glob {given} finds {'only empty files or folders' if hits else 'nothing'}"
                    f" (from {Path.cwd()}). Quote it so that the shell leaves it as it is."
                )
        else:
            several = f" Several are given as data.paths=[{given}]." * ("," in given)
            raise DataError(f"There is no file {given} (from {Path.cwd()}).{several}")
        found.update((file.resolve(), None) for file in files)
    return list(found)


def _rest(pieces: Iterable[str], characters: int) -> Iterator[str]:
    for piece in pieces:
        if len(piece) > characters:
            yield piece[characters:]
        characters = max(0, characters - len(piece))
