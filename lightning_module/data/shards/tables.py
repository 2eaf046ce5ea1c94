"""What reading shards needs beside their tokens: read once, kept in files of the cache.

They are mapped, as tokens on this machine are: 250 million documents (a terabyte of text, about)
take 2 GB for each table, of which every process maps the same pages, and only those that its rows
need stay in memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lightning_module.data.cache_folder import CacheFolder, flush
from lightning_module.data.checksums import write_checksums
from lightning_module.data.shards.index import BLOCK, INDEX, SPLITS, TOKENIZER, Index, Shard
from lightning_module.data.shards.reading import Damaged, Read, Reader
from lightning_module.data.shards.tokens import ShardTokens
from lightning_module.data.token_cache import chunk_counts
from lightning_module.data.tokenizers import SHARDS, Tokenizer, TokenizerSettings
from lightning_module.errors import DataError
from lightning_module.terminal.progress_bars import reading
from triton_gru.cache import cache_directory

log = logging.getLogger(__name__)

TABLES_FORMAT = 1  # raise it when the files of the cache change
_SHA256 = 32  # bytes
_AT_ONCE = 2**20  # documents of which chunks are counted at once
_AHEAD = 64  # shards whose files are being read at once


class ShardTables(CacheFolder):
    """Where the documents of a corpus in shards begin, and the checksums of its blocks.

    The checksums of the blocks are read here and not when a shard's turn comes: they are an
    eight-thousandth of the tokens, and a block is then one request, whatever came before.

    Args:
        reader: Reads the files at the URL.

    Raises:
        DataError: There is no index of this version there.
        StoreError: The store does not answer.
    """

    holds = "tables"
    size = "they take 8 bytes per document, twice"

    def __init__(self, reader: Reader):
        self.reader = reader
        content = reader.read(INDEX, bytes)
        self.digest = hashlib.sha256(content).hexdigest()
        self.index = Index.from_json(content, f"{reader.url}/{INDEX}")
        self._itemsize = np.dtype(self.index.dtype).itemsize
        key = hashlib.sha256(f"{TABLES_FORMAT} {self.digest}".encode()).hexdigest()[:16]
        self.folder = cache_directory() / "shards" / key

    def open(self) -> tuple[Tokenizer, ShardTokens, ShardTokens]:
        """As `TokenCache.open`."""
        tokenizer = Tokenizer.load(self.folder / TOKENIZER)
        train, val = (self._split(split, tokenizer.doc_id) for split in SPLITS)
        return tokenizer, train, val

    def _split(self, split: str, doc_id: int) -> ShardTokens:
        shards = self.index.splits[split]
        documents = sum(shard.documents for shard in shards)
        blocks = sum(block_count(shard, self._itemsize) for shard in shards)
        return ShardTokens(
            self.reader,
            shards,
            self._itemsize,
            self.digest,
            begins=mapped(self.folder / f"{split}.begins", np.int64, (documents + 1,)),
            sums=mapped(self.folder / f"{split}.blocks", np.uint8, (blocks, _SHA256)),
            doc_id=doc_id,
        )

    def _announce(self) -> None:
        count = sum(len(shards) for shards in self.index.splits.values())
        log.info("Preparing %s in %d shards at %s", self.index.corpus, count, self.reader.url)

    def _write(self, folder: Path) -> None:
        for split in SPLITS:
            if sum(s.length - s.documents for s in self.index.splits[split]) <= 0:
                raise DataError(f"{self.reader.url}: the {split} split has no text.")
        tokenizer = self.reader.read(TOKENIZER, bytes)
        (folder / TOKENIZER).write_bytes(tokenizer)
        where = f"{self.reader.url}/{TOKENIZER}"
        if Tokenizer.load(folder / TOKENIZER, where).fingerprint != self.index.fingerprint:
            raise DataError(f"{where} is another tokenizer than that of {INDEX}: make them again.")
        shards = [shard for split in SPLITS for shard in self.index.splits[split]]
        documents = sum(shard.documents for shard in shards)
        with reading("Reading where documents begin", documents, log, unit="documents") as advance:
            for split in SPLITS:
                self._write_split(folder, split, advance)
        write_checksums(folder)

    def _write_split(self, folder: Path, split: str, advance: Callable[[int], None]) -> None:
        shards = self.index.splits[split]
        offset = 0
        with (
            open(folder / f"{split}.begins", "wb") as begins,
            open(folder / f"{split}.blocks", "wb") as blocks,
        ):
            for shard, (documents, sums) in zip(shards, self._files(shards), strict=True):
                self._check(shard, documents, first=offset == 0)
                begins.write((documents + offset).tobytes())
                blocks.write(sums)
                offset += shard.length
                advance(shard.documents)
            begins.write(np.array([offset], np.int64).tobytes())
            for file in (begins, blocks):
                flush(file)

    def _files(self, shards: Sequence[Shard]) -> Iterator[tuple[np.ndarray, bytes]]:
        """The begins and the checksums of each shard, several shards being read at once."""
        rest = iter(shards)
        begun: deque[tuple[Read, Read]] = deque()
        while True:
            begun.extend(
                (
                    self._begin(shard, "begins", 8 * shard.documents),
                    self._begin(shard, "blocks", _SHA256 * block_count(shard, self._itemsize)),
                )
                for shard in islice(rest, _AHEAD - len(begun))
            )
            if not begun:
                return
            begins, blocks = self.reader.contents(begun.popleft())
            yield np.frombuffer(begins, "<i8").astype(np.int64), blocks

    def _begin(self, shard: Shard, kind: str, size: int) -> Read:
        name = f"{shard.name}.{kind}"
        return self.reader.begin(name, partial(self._whole, name, size, shard.sha256[kind]))

    def _whole(self, name: str, size: int, sha256: str) -> bytes:
        content = self.reader.range(name) if size else b""
        check_content(content, size, sha256)
        return content

    def _check(self, shard: Shard, begins: np.ndarray, first: bool) -> None:
        """Checksums do not show an index that was put together from shards of another order."""
        fits = len(begins) > 0 and begins[0] == 0 if first else True
        if len(begins):
            fits = fits and begins[0] >= 0 and begins[-1] < shard.length
        if not fits or (np.diff(begins) <= 0).any():
            raise DataError(
                f"{self.reader.url}/{shard.name}.begins does not fit {INDEX}: make the shards "
                "again with triton-gru-prepare."
            )


class ChunkTables(CacheFolder):
    """Chunks before each document, which `StreamChunks` searches, for one length of chunks.

    Args:
        tables: The corpus; made.
        seq_len: Tokens per chunk.
    """

    holds = "tables"
    size = "they take 8 bytes per document, twice"

    def __init__(self, tables: ShardTables, seq_len: int):
        self.tables, self.seq_len = tables, seq_len
        self.folder = tables.folder.with_name(f"{tables.folder.name}-{seq_len}")

    def open(self) -> tuple[np.ndarray, np.ndarray]:
        """Those of the training and of the validation text."""
        train, val = (
            mapped(self.folder / f"{split}.chunks", np.int64, self._begins(split).shape)
            for split in SPLITS
        )
        return train, val

    def _begins(self, split: str) -> np.ndarray:
        documents = sum(shard.documents for shard in self.tables.index.splits[split])
        return mapped(self.tables.folder / f"{split}.begins", np.int64, (documents + 1,))

    def _announce(self) -> None:
        log.info("Counting the chunks of %d tokens", self.seq_len)

    def _write(self, folder: Path) -> None:
        for split in SPLITS:
            begins, before = self._begins(split), 0
            with open(folder / f"{split}.chunks", "wb") as file:
                for first in range(0, len(begins) - 1, _AT_ONCE):
                    counts = chunk_counts(begins[first : first + _AT_ONCE + 1], self.seq_len)
                    chunks = before + np.cumsum(counts)
                    file.write(np.concatenate([[before], chunks[:-1]]).tobytes())
                    before = int(chunks[-1])
                file.write(np.array([before], np.int64).tobytes())
                flush(file)
        write_checksums(folder)


class ShardCache:
    """The tokens of a corpus in shards, for one batching; it has the methods of `TokenCache`.

    Args:
        url: Of the shards.
        settings: Of the tokenizer: its kind is `shards`, or what the shards were made with.
        seq_len: Tokens per chunk.

    Raises:
        DataError: The shards are not there, or were made with another tokenizer.
    """

    def __init__(self, url: str, settings: TokenizerSettings, seq_len: int):
        self._tables = ShardTables(Reader(url))
        self._chunks = ChunkTables(self._tables, seq_len)
        self.folder = self._tables.folder
        made = self._tables.index.tokenizer
        if settings.kind != SHARDS and settings != made:
            raise DataError(
                f"{url} holds tokens of tokenizer={made.kind} "
                f"(tokenizer.vocab_size={json.dumps(made.vocab_size)}), which cannot be made "
                f"into those of tokenizer={settings.kind} "
                f"(tokenizer.vocab_size={json.dumps(settings.vocab_size)}): set tokenizer=shards."
            )

    def make(self) -> None:
        """Reads what is needed beside the tokens, unless it is on this machine.

        Raises:
            DataError: It is damaged or empty, or the disk is full.
        """
        self._tables.make()
        self._chunks.make()

    def open(self) -> tuple[Tokenizer, ShardTokens, ShardTokens]:
        """The tokenizer, the training tokens, the validation tokens.

        Raises:
            NOT_WHOLE: `make` was not called, or its files are damaged.
        """
        tokenizer, train, val = self._tables.open()
        for tokens, chunks in zip((train, val), self._chunks.open(), strict=True):
            tokens.chunks[self._chunks.seq_len] = chunks
        return tokenizer, train, val


def block_count(shard: Shard, itemsize: int) -> int:
    """Blocks of a shard; the last one is shorter."""
    return -(-shard.length * itemsize // BLOCK)


def check_content(content: bytes, size: int, sha256: str) -> None:
    """Raises `Damaged` if bytes are not those that were written."""
    if len(content) != size:
        raise Damaged(f"{len(content):,} bytes were read where {size:,} were written")
    if hashlib.sha256(content).hexdigest() != sha256:
        raise Damaged("its checksum is another one than that of the index")


def mapped(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """An array of a file.

    Raises:
        NOT_WHOLE: The file is missing, or of another size.
    """
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if path.stat().st_size != size:
        raise ValueError(f"{path} has {path.stat().st_size} bytes in place of {size}")
    return np.memmap(path, dtype, mode="r", shape=shape)
