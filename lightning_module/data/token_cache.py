"""Tokens in memory-mapped files: made once per corpus and tokenizer, then opened."""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_module.data.cache_folder import CacheFolder, flush
from lightning_module.data.checksums import write_checksums
from lightning_module.data.corpora import Corpus, Document
from lightning_module.data.tokenizers import Tokenizer, TokenizerSettings
from lightning_module.errors import DataError
from lightning_module.terminal.progress_bars import reading
from triton_gru.cache import cache_directory

log = logging.getLogger(__name__)

CACHE_FORMAT = 3  # raise it when the files, or the tokens of the same settings, change

# Pages that a process has read of a mapped file count as its memory until it releases them, as it
# does after this many bytes. The system caches the file's pages as long as memory is free.
_HELD = 2**26


@dataclass
class SplitTokens:
    """The streams of one split, one after the other.

    Attributes:
        stream: Token ids [tokens + documents], mapped from a file; each document begins with
            `<doc>`.
        begins: Where each document begins in `stream`, and its length, int64
            [documents + 1].
        doc_id: Id of `<doc>`.
        characters: Characters of the text.
        tokens: Tokens to predict: all but `<doc>`.
        unknown: How many of them are `<unk>`.
    """

    stream: np.ndarray
    begins: np.ndarray
    doc_id: int
    characters: int
    tokens: int
    unknown: int

    def __post_init__(self) -> None:
        self._read = 0

    def chunks_before(self, seq_len: int) -> np.ndarray:
        """Chunks of `seq_len` tokens before each document, and in all, int64 [documents + 1]."""
        return np.concatenate([[0], np.cumsum(chunk_counts(self.begins, seq_len))])

    def take(self, indices: np.ndarray, needed: np.ndarray | None = None) -> np.ndarray:
        """The tokens at these indices of `stream`, int64; those not `needed` may be any."""
        self._read += indices.size * self.stream.itemsize
        if self._read >= _HELD and isinstance(self.stream, np.memmap):
            self._read = 0
            if hasattr(mmap, "MADV_DONTNEED"):  # not on all systems
                mapped: Any = self.stream
                mapped._mmap.madvise(mmap.MADV_DONTNEED)
        return self.stream[indices].astype(np.int64)


def chunk_counts(begins: np.ndarray, seq_len: int) -> np.ndarray:
    """Chunks of each document: its tokens without `<doc>`, the last chunk filled up."""
    return -(-(np.diff(begins) - 1) // seq_len)


def write_split(
    folder: Path,
    split: str,
    documents: Iterator[Document],
    tokenizer: Tokenizer,
    advance: Callable[[int], None] = lambda characters: None,
) -> dict[str, Any]:
    """Writes the tokens of documents to `folder`, with only a part of them in memory.

    Args:
        folder: Folder of the files.
        split: Prefix of their names.
        documents: The documents.
        tokenizer: Encodes them.
        advance: Called with the number of characters of each piece that was written.

    Returns:
        Sizes and counts for `read_split`.
    """
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    begins, written, characters, unknown = [0], 0, 0, 0

    def count(read: int) -> None:
        nonlocal characters
        characters += read
        advance(read)

    with open(folder / f"{split}.tokens", "wb") as file:
        for ids, begin in encoded(documents, tokenizer, count):
            if begin and written:
                begins.append(written)
            file.write(ids.astype(dtype).tobytes())
            written += len(ids)
            if tokenizer.unk_id is not None:
                unknown += int((ids == tokenizer.unk_id).sum())
        if written:
            begins.append(written)
        flush(file)
    with open(folder / f"{split}.begins", "wb") as file:
        file.write(np.array(begins, np.int64).tobytes())
        flush(file)
    return {
        "dtype": dtype.name,
        "length": written,
        "documents": len(begins) - 1,
        "characters": characters,
        "tokens": written - (len(begins) - 1),
        "unknown": unknown,
    }


def encoded(
    documents: Iterable[Document], tokenizer: Tokenizer, count: Callable[[int], None]
) -> Iterator[tuple[np.ndarray, bool]]:
    """The stream of documents, int64 arrays; the bool: a document, its `<doc>`, begins with it.

    Args:
        documents: The documents; those without text are left out.
        tokenizer: Encodes them.
        count: Called with the number of characters of each piece that is read.
    """
    for document in documents:
        begin = not document.continues

        def counted(pieces: Iterable[str] = document.pieces()) -> Iterator[str]:
            for piece in pieces:
                yield piece
                count(len(piece))

        for ids in tokenizer.encode_corpus(counted()):
            yield (np.concatenate([[tokenizer.doc_id], ids]) if begin else ids), begin
            begin = False


def read_split(folder: Path, split: str, doc_id: int) -> SplitTokens:
    """Maps the files that `write_split` wrote.

    Raises:
        NOT_WHOLE: They are missing or incomplete.
    """
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))[split]
    arrays = {}
    for name, dtype, length in (
        ("tokens", about["dtype"], about["length"]),
        ("begins", "int64", about["documents"] + 1),
    ):
        path = folder / f"{split}.{name}"
        size = length * np.dtype(dtype).itemsize
        if path.stat().st_size != size:
            raise ValueError(f"{path} has {path.stat().st_size} bytes in place of {size}")
        # An empty file cannot be mapped.
        arrays[name] = np.memmap(path, dtype, mode="r") if length else np.empty(0, dtype)
    return SplitTokens(
        stream=arrays["tokens"],
        begins=arrays["begins"],
        doc_id=doc_id,
        characters=about["characters"],
        tokens=about["tokens"],
        unknown=about["unknown"],
    )


class TokenCache(CacheFolder):
    """A folder with the tokens of a corpus; its digest is of the text and the tokenizer's settings.

    Args:
        corpus: The text.
        settings: Of its tokenizer.
    """

    holds = "tokens"
    size = "a corpus takes 2 bytes per token, 4 with more than 65,536 kinds"

    def __init__(self, corpus: Corpus, settings: TokenizerSettings):
        self.corpus, self.settings = corpus, settings
        key = json.dumps([CACHE_FORMAT, corpus.fingerprint, asdict(settings)])
        digest = hashlib.sha256(key.encode()).hexdigest()[:16]
        self.folder = cache_directory() / "tokens" / f"{corpus.name}-{settings.kind}-{digest}"

    def open(self) -> tuple[Tokenizer, SplitTokens, SplitTokens]:
        """The tokenizer, the training tokens, the validation tokens.

        Raises:
            NOT_WHOLE: The folder is missing or incomplete.
        """
        tokenizer = Tokenizer.load(self.folder / "tokenizer.json")
        train, val = (read_split(self.folder, s, tokenizer.doc_id) for s in ("train", "val"))
        return tokenizer, train, val

    def make(self) -> None:
        """Makes the folder unless it exists and is complete.

        Raises:
            DataError: The corpus or the settings cannot be used, or the disk is full.
        """
        self.settings.check()
        super().make()

    def _announce(self) -> None:
        log.info("Preparing %s for tokenizer=%s", self.corpus.description, self.settings.kind)

    def _write(self, folder: Path) -> None:
        characters = 0

        def texts(advance: Callable[[int], None]) -> Iterator[str]:
            nonlocal characters
            for document in self.corpus.train():
                for piece in document.pieces():
                    yield piece
                    characters += len(piece)
                    advance(len(piece))

        with reading("Finding the tokens of the training text", None, log) as advance:
            tokenizer = Tokenizer.train(self.settings, texts(advance))
        tokenizer.save(folder / "tokenizer.json")
        about: dict[str, Any] = {"corpus": self.corpus.description, **asdict(self.settings)}
        for split, documents, what, total in (
            ("train", self.corpus.train, "training", characters),
            ("val", self.corpus.val, "validation", None),
        ):
            with reading(f"Tokenising the {what} text", total, log) as advance:
                about[split] = write_split(folder, split, documents(), tokenizer, advance)
            if not about[split]["tokens"]:
                raise DataError(f"{self.corpus.description}: the {split} split has no text.")
        with open(folder / "about.json", "w", encoding="utf-8") as file:
            json.dump(about, file, indent=1, ensure_ascii=False)
            flush(file)
        write_checksums(folder)
