"""Writes the stream of documents as shards (see `index.py`), at a URL."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
from fsspec import AbstractFileSystem

from lightning_module.data.corpora import Document
from lightning_module.data.shards.index import BLOCK, FILES, Shard
from lightning_module.data.token_cache import encoded
from lightning_module.data.tokenizers import Tokenizer

SHARD = 2**28  # bytes of the tokens of a shard


def dtype_of(tokenizer: Tokenizer) -> np.dtype:
    """The type of its tokens in files, little-endian."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")


def write_shards(
    filesystem: AbstractFileSystem,
    folder: str,
    name: str,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    advance: Callable[[int, int], None] = lambda characters, tokens: None,
    size: int = SHARD,
) -> list[Shard]:
    """Writes documents as shards of `size` bytes, the last one shorter.

    Little of them is in memory at any time: a block, and what the file system buffers (5 to 50 MB
    of a multipart upload).

    Args:
        filesystem: Where to write.
        folder: The folder there.
        name: Of the shards; a number is added.
        documents: The documents; the first may continue that of an earlier shard.
        tokenizer: Encodes them.
        advance: Called with how many characters were read and tokens written since the last call.
        size: Bytes of a shard, a multiple of `BLOCK`.

    Returns:
        The shards that have tokens.

    Raises:
        OSError: The files cannot be written.
    """
    dtype = dtype_of(tokenizer)
    shards: list[Shard] = []
    writer: _Writer | None = None
    characters = 0

    def count(read: int) -> None:
        nonlocal characters
        characters += read
        advance(read, 0)

    try:
        for ids, begin in encoded(documents, tokenizer, count):
            unknown, tokens = ids == tokenizer.unk_id, ids.astype(dtype)
            first = 0
            while first < len(ids):
                if writer is None:
                    writer = _Writer(filesystem, folder, f"{name}-{len(shards):03}")
                if begin and first == 0:
                    writer.begins.append(writer.length)
                end = first + size // dtype.itemsize - writer.length
                writer.write(tokens[first:end], int(unknown[first:end].sum()))
                first = min(end, len(ids))
                if writer.length == size // dtype.itemsize:
                    shards.append(writer.close(characters))
                    writer, characters = None, 0
            advance(0, len(ids))
        if writer is not None:
            shards.append(writer.close(characters))
        elif shards:  # characters are counted after their tokens
            shards[-1] = replace(shards[-1], characters=shards[-1].characters + characters)
    except BaseException:
        if writer is not None:
            writer.discard()
        raise
    return shards


class _Writer:
    """One shard.

    Attributes:
        length: Tokens written.
        begins: Where documents begin.
    """

    def __init__(self, filesystem: AbstractFileSystem, folder: str, name: str):
        self._filesystem, self._path, self._name = filesystem, f"{folder}/{name}", name
        self._file: Any = filesystem.open(f"{self._path}.tokens", "wb")
        self._sha256, self._blocks, self._block = hashlib.sha256(), bytearray(), b""
        self.length, self.unknown = 0, 0
        self.begins: list[int] = []

    def write(self, tokens: np.ndarray, unknown: int) -> None:
        content = tokens.tobytes()
        self._file.write(content)
        self._sha256.update(content)
        self._block += content
        while len(self._block) >= BLOCK:
            self._blocks += hashlib.sha256(self._block[:BLOCK]).digest()
            self._block = self._block[BLOCK:]
        self.length += len(tokens)
        self.unknown += unknown

    def close(self, characters: int) -> Shard:
        self._file.close()
        if self._block:
            self._blocks += hashlib.sha256(self._block).digest()
        begins = np.array(self.begins, "<i8").tobytes()
        self._filesystem.pipe_file(f"{self._path}.begins", begins)
        self._filesystem.pipe_file(f"{self._path}.blocks", bytes(self._blocks))
        digests = (self._sha256, hashlib.sha256(begins), hashlib.sha256(self._blocks))
        return Shard(
            name=self._name,
            length=self.length,
            documents=len(self.begins),
            characters=characters,
            unknown=self.unknown,
            sha256=dict(zip(FILES, (digest.hexdigest() for digest in digests), strict=True)),
        )

    def discard(self) -> None:
        with suppress(Exception):  # the error that led here is the one to report
            self._file.discard()
        with suppress(Exception):
            self._file.close()
