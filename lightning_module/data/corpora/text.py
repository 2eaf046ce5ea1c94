r"""Input text, decoded alike from files, from standard input and from the command line.

UTF-8, with or without a byte order mark; `\r\n` and `\r` are line ends and become `\n`; a NUL,
which UTF-8 allows, indicates another encoding and is refused. Characters are not normalised:
composed and decomposed letters (NFC, NFD) are different training text and different prompts.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from lightning_module.credentials import without_credentials
from lightning_module.errors import DataError

_MARK = "\ufeff"
# UTF-32 first: its byte order mark begins with UTF-16's.
_WIDE = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_utf8(
    path: Path | str,
    begin: int = 0,
    end: int | None = None,
    *,
    size: int = 2**20,
    longest: int = 2**24,
) -> Iterator[str]:
    r"""The text of a file, without a byte order mark, its line ends turned to `\n`, in pieces.

    Args:
        path: The file, or its URL.
        begin: Where to begin, a `boundary`.
        end: Where to end, in bytes; None: the end of the file.
        size: Characters per piece, about; it ends as those of `Document` do.
        longest: A line, with the newlines after it, is cut after so many characters, even within a
            token.

    Raises:
        DataError: The file cannot be read, or is not UTF-8 (the message has the byte and offset).
    """
    text = ""
    encoding = "utf-8" if begin else "utf-8-sig"
    with readable(path):
        try:
            with (
                open_binary(path) as binary,
                io.TextIOWrapper(
                    io.BufferedReader(_Bytes(binary, begin, end), 2**16), encoding, newline=None
                ) as file,
            ):
                while block := file.read(size):
                    if "\0" in block:
                        raise DataError(_fault_in(path))
                    text += block
                    # At the same characters wherever `begin` and the blocks are.
                    while len(text) > longest and not _PIECE_END.search(text, 0, longest + 1):
                        yield text[:longest]
                        text = text[longest:]
                    # The last newline that is not at the very end, which more newlines may follow.
                    last = text.rstrip("\n").rfind("\n") + 1
                    if last:
                        yield text[:last]
                        text = text[last:]
        except UnicodeDecodeError as error:
            raise DataError(_fault_in(path)) from error
    if text:
        yield text


_PIECE_END = re.compile("\n(?=[^\n])")


@contextmanager
def readable(path: Path | str) -> Iterator[None]:
    """Turns the errors of reading a file into a line with its name.

    Raises:
        DataError: A disk, a store or a library that decompresses or decodes raised an error.
    """
    try:
        yield
    except Exception as error:
        from lightning_module.data.shards.store import is_of_store

        if not is_of_store(error) and not isinstance(error, EOFError):  # EOFError: of gzip, bz2
            raise
        fault = error.strerror if isinstance(error, OSError) else None
        fault = fault or without_credentials(error)
        raise DataError(f"Cannot read {path}: {fault.rstrip('.')}.") from error


def open_binary(path: Path | str) -> BinaryIO:
    """Opens a file, or a URL with fsspec; decompresses it if its name ends so."""
    if isinstance(path, Path) and not is_compressed(path):
        return open(path, "rb")
    import fsspec

    try:
        return fsspec.open(str(path), "rb", compression="infer").open()
    except ValueError as error:  # no library for this compression
        raise DataError(f"Cannot read {path}: {error}.") from error


def is_compressed(path: Path | str) -> bool:
    """Whether the file is compressed, by its name; such a file is read from its beginning alone."""
    return str(path).endswith((".gz", ".bz2", ".xz", ".zst"))


def boundary(file: BinaryIO, offset: int) -> int:
    """The first byte from `offset` on before which a line, and with it a token, ends.

    The line end is one that no line end follows; at the end of the file there is one. 0 is one.
    """
    if offset == 0:
        return 0
    file.seek(offset - 1)
    before, position = b"", offset - 1
    while block := file.read(2**16):
        found = _LINE_BEGIN.search(before + block)
        if found:
            return position - len(before) + found.end()
        before, position = block[-1:], position + len(block)
    return position


_LINE_BEGIN = re.compile(rb"[\r\n](?=[^\r\n])")


class _Bytes(io.RawIOBase):
    """The bytes of a file from `begin` to `end`."""

    def __init__(self, file: BinaryIO, begin: int, end: int | None):
        self._file, self._left = file, None if end is None else end - begin
        if begin:
            file.seek(begin)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        most = len(buffer) if self._left is None else min(len(buffer), self._left)
        content = self._file.read(most)
        buffer[: len(content)] = content
        if self._left is not None:
            self._left -= len(content)
        return len(content)


def read_lines(file: BinaryIO, name: str) -> Iterator[tuple[int, str, DataError | None]]:
    """The lines of a file as they arrive: number, text, and the error in it or None.

    In a line with an error, U+FFFD replaces what cannot be decoded.

    Raises:
        DataError: No line can be decoded: the file is UTF-16 or UTF-32.
    """
    number = 0
    for raw in file:
        if number == 0:
            if wide := _wide(raw):
                raise DataError(
                    f"{name} is {wide}, not UTF-8. Convert it: iconv -f {wide} -t UTF-8"
                )
            raw = raw.removeprefix(codecs.BOM_UTF8)
        for line in raw.removesuffix(b"\n").removesuffix(b"\r").split(b"\r"):
            number += 1
            error = None
            try:
                line.decode()
            except UnicodeDecodeError as wrong:
                error = DataError(
                    f"not UTF-8: byte 0x{line[wrong.start]:02x} is byte {wrong.start + 1} of it"
                )
            if b"\0" in line:
                error = error or DataError(f"not UTF-8: byte NUL is byte {line.index(0) + 1} of it")
            yield number, line.decode(errors="replace"), error


def from_argument(text: str) -> str:
    """A text from the command line.

    Raises:
        DataError: It is not UTF-8.
    """
    for place, character in enumerate(text):
        if "\udc80" <= character <= "\udcff":  # Python's form of a byte that is not UTF-8
            raise DataError(f"not UTF-8: byte 0x{ord(character) - 0xDC00:02x} at character {place}")
    return text.removeprefix(_MARK).replace("\r\n", "\n").replace("\r", "\n")


def _wide(begin: bytes) -> str | None:
    return next((name for mark, name in _WIDE.items() if begin.startswith(mark)), None)


def _fault_in(path: Path | str) -> str:
    """The first byte that is not text, and its position."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    begin, lines, content = 0, 1, b""
    with open_binary(path) as file:
        wide = _wide(file.read(4))
        file.seek(0)
        if wide:
            return (
                f"{path} is {wide}, not UTF-8. Convert it: "
                f"iconv -f {wide} -t UTF-8 {path} > {path}.utf8"
            )
        while True:
            waiting = decoder.getstate()[0]  # the beginning of a character
            begin += len(content) - len(waiting)
            block = file.read(2**20)
            content = waiting + block
            place, fault = content.find(0), "NUL"
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                if place < 0 or error.start < place:
                    place, fault = error.start, f"0x{content[error.start]:02x}"
            if place >= 0:
                line = lines + content.count(b"\n", 0, place)
                return (
                    f"{path} is not UTF-8: byte {fault} at offset {begin + place} (line {line}). "
                    f"Convert it, for example: "
                    f"iconv -f {'UTF-16LE' if fault == 'NUL' else 'ISO-8859-1'} -t UTF-8 {path} > "
                    f"{path}.utf8"
                )
            if not block:
                return f"{path} changed while it was read."
            lines += content.count(b"\n")
