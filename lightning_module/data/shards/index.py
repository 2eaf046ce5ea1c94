"""The format of a corpus in shards: what `triton-gru-prepare` writes, and `data=shards` reads.

    index.json        what this module reads and writes; the last file written
    tokenizer.json    of `Tokenizer.save`
    NAME.tokens       the stream of a shard, little-endian: `<doc>` and tokens, document by document
    NAME.begins       int64 [documents]: where in the shard each document begins
    NAME.blocks       sha256 of each block of `BLOCK` bytes of NAME.tokens, 32 bytes each

The stream of a split is that of its shards, in the order of the index. A document may continue in
the next shard, which then begins without `<doc>`: a text file of 10 GB is one document, which
several processes tokenise.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from lightning_module.data.tokenizers import TokenizerSettings
from lightning_module.errors import DataError

INDEX = "index.json"
TOKENIZER = "tokenizer.json"
SPLITS = ("train", "val")
FILES = ("tokens", "begins", "blocks")  # of a shard, each named NAME.FILE
BLOCK = 2**18  # bytes that are read, and checked, at once
FORMAT = 1  # raise it when the files change


@dataclass(frozen=True)
class Shard:
    """A consecutive part of the stream of a split.

    Attributes:
        name: Of its files, without the ending.
        length: Tokens, `<doc>` included.
        documents: How many documents begin in it.
        characters: Of its text.
        unknown: How many of its tokens are `<unk>`.
        sha256: Of each of its `FILES`, in hexadecimal.
    """

    name: str
    length: int
    documents: int
    characters: int
    unknown: int
    sha256: dict[str, str]


@dataclass(frozen=True)
class Index:
    """The parts of a corpus in shards.

    Attributes:
        corpus: A line about the text, for users.
        tokenizer: The settings of its tokenizer.
        fingerprint: `Tokenizer.fingerprint` of it.
        dtype: Of the tokens, `uint16` or `uint32`.
        splits: The shards of each of `SPLITS`, in order.
        source: A digest of the text and the settings that they were made from.
    """

    corpus: str
    tokenizer: TokenizerSettings
    fingerprint: str
    dtype: str
    splits: dict[str, Sequence[Shard]]
    source: str = ""

    def to_json(self) -> bytes:
        """The content of `index.json`; equal for equal indices."""
        return json.dumps(
            {"format": FORMAT, **asdict(self)}, indent=1, ensure_ascii=False, sort_keys=True
        ).encode()

    @classmethod
    def from_json(cls, content: bytes, where: str) -> Index:
        """The index that `to_json` wrote.

        Args:
            content: Of the file.
            where: Its URL, for the error.

        Raises:
            DataError: It is of another format, or damaged.
        """
        try:
            read = json.loads(content)
            if read["format"] != FORMAT:
                raise DataError(
                    f"{where} has format {read['format']!r}, this version reads {FORMAT}: use the "
                    "version of triton-gru that wrote it, or make the shards again."
                )
            index = cls(
                corpus=str(read["corpus"]),
                tokenizer=TokenizerSettings(**read["tokenizer"]),
                fingerprint=str(read["fingerprint"]),
                dtype=np.dtype(read["dtype"]).name,
                splits={s: [Shard(**shard) for shard in read["splits"][s]] for s in SPLITS},
                source=str(read["source"]),
            )
            for shards in index.splits.values():
                for shard in shards:
                    if set(shard.sha256) != set(FILES):
                        raise ValueError(f"{shard.name} has checksums of {sorted(shard.sha256)}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"{where} is not an index of shards, or damaged ({type(error).__name__}: {error}): "
                "make the shards again with triton-gru-prepare."
            ) from error
        return index
