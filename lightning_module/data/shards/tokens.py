"""The stream of a split in shards: blocks are read from the store when rows come near them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np

from lightning_module.data.shards.index import BLOCK, Shard
from lightning_module.data.shards.reading import Damaged, Read, Reader


class ShardTokens:
    """Serves where `SplitTokens` does; see `chunks.Tokens` for the methods.

    A block is held while the last `read_ahead` or `take` named it, and no longer: what is in memory
    is bounded by the number of rows, and no block is held twice, or read again while a row needs
    it. With random access by position a resumed run needs no state beside the position.

    Args:
        reader: Reads the files.
        shards: Of the split, in order.
        itemsize: Bytes per token.
        digest: Of the index.
        begins: Where each document begins in the stream of the split, and its length.
        sums: The sha256 of each block of the shards, uint8 [blocks, 32].
        doc_id: Id of `<doc>`.

    Attributes:
        ahead: How many tokens of a row are worth reading ahead: half a block. Then a row needs the
            next block after (at 128 tokens per chunk) 512 steps, and 1.5 blocks are in memory.
        chunks: Tables of `chunks_before`, by `seq_len`.
        reads: How many blocks were asked for.
    """

    def __init__(
        self,
        reader: Reader,
        shards: Sequence[Shard],
        itemsize: int,
        digest: str,
        *,
        begins: np.ndarray,
        sums: np.ndarray,
        doc_id: int,
    ):
        self.digest, self.begins, self.doc_id = digest, begins, doc_id
        self.characters = sum(shard.characters for shard in shards)
        self.unknown = sum(shard.unknown for shard in shards)
        self.tokens = sum(shard.length - shard.documents for shard in shards)
        self.chunks: dict[int, np.ndarray] = {}
        self.reads = 0
        self._reader, self._shards, self._sums = reader, shards, sums
        self._dtype = np.dtype(f"<u{itemsize}")
        self._block = BLOCK // itemsize  # tokens
        self.ahead = self._block // 2
        # Of each shard: where it ends in the stream, and the number of its first block.
        lengths = np.array([shard.length for shard in shards], np.int64)
        self._ends = np.cumsum(lengths)
        self._begins = self._ends - lengths
        counts = -(-lengths // self._block)
        self._first_block = np.cumsum(counts) - counts
        self._held: dict[int, Read] = {}
        self._named: set[int] = set()  # by the last `read_ahead`

    def chunks_before(self, seq_len: int) -> np.ndarray:
        """See `Tokens`."""
        return self.chunks[seq_len]

    def read_ahead(self, first: np.ndarray, end: np.ndarray) -> None:
        """See `Tokens`."""
        blocks = self._blocks(first, end - 1)
        self._named = set(blocks)
        self._begin(blocks)
        self._forget(self._named)

    def is_read(self) -> bool:
        """Whether all that the last `read_ahead` named is in memory."""
        return all(read.done.is_set() and not read.error for read in self._held.values())

    def wait(
        self, first: np.ndarray, end: np.ndarray, stop: Callable[[], bool] = lambda: False
    ) -> None:
        """Waits until `take` can return these tokens of each row, or `stop` becomes true.

        Raises:
            StoreError: They cannot be read.
        """
        blocks = self._blocks(first, end - 1)
        self._named |= set(blocks)
        self._begin(blocks)
        self._reader.contents([self._held[block] for block in blocks], stop)

    def take(self, indices: np.ndarray, needed: np.ndarray | None = None) -> np.ndarray:
        """See `Tokens`.

        Raises:
            StoreError: They cannot be read.
        """
        rows = indices.shape[1]
        counts = np.full(rows, len(indices)) if needed is None else needed.sum(0)
        some = np.flatnonzero(counts)
        counts = counts[some]
        begins, ends = indices[0, some], indices[counts - 1, some] + 1
        first, last = self._number(begins), self._number(ends - 1)
        blocks = _ordered(first, last)
        self._begin(blocks)
        contents = self._reader.contents([self._held[block] for block in blocks])
        held = dict(zip(blocks, contents, strict=True))
        taken = np.full((rows, len(indices)), self.doc_id, np.int64)
        of_rows = (some, counts, begins, ends, first, last)
        for row, count, begin, end, block, final in zip(
            *map(np.ndarray.tolist, of_rows), strict=True
        ):
            if block == final and end - begin == count:  # nearly all
                at, content = held[block]
                taken[row, :count] = content[begin - at : end - at]
                continue
            wanted, done = indices[:count, row], 0
            for number in range(block, final + 1):
                at, content = held[number]
                stop = int(np.searchsorted(wanted, at + len(content)))
                taken[row, done:stop] = content[wanted[done:stop] - at]
                done = stop
        if len(self._held) > len(blocks):
            self._forget(self._named.union(blocks))
        return np.ascontiguousarray(taken.T)

    def _number(self, position: np.ndarray) -> np.ndarray:
        """The numbers of the blocks of positions in the stream."""
        shard = np.searchsorted(self._ends, position, side="right")
        return self._first_block[shard] + (position - self._begins[shard]) // self._block

    def _blocks(self, first: np.ndarray, last: np.ndarray) -> list[int]:
        return _ordered(self._number(first), self._number(last))

    def _begin(self, blocks: Iterable[int]) -> None:
        for number in blocks:
            if number in self._held and self._held[number].error is None:
                continue
            shard = int(np.searchsorted(self._first_block, number, side="right")) - 1
            offset = (number - int(self._first_block[shard])) * self._block
            read = partial(self._read, number, shard, offset)
            self._held[number] = self._reader.begin(f"{self._shards[shard].name}.tokens", read)
            self.reads += 1

    def _read(self, number: int, shard: int, offset: int) -> tuple[int, np.ndarray]:
        """Where a block begins in the stream, and its tokens."""
        itemsize = self._dtype.itemsize
        end = min(offset + self._block, self._shards[shard].length)
        name = f"{self._shards[shard].name}.tokens"
        content = self._reader.range(name, offset * itemsize, end * itemsize)
        size = (end - offset) * itemsize
        where = f"bytes {offset * itemsize:,} to {end * itemsize:,}"
        if len(content) != size:
            raise Damaged(f"{where} came as {len(content):,} bytes")
        if hashlib.sha256(content).digest() != self._sums[number].tobytes():
            raise Damaged(f"{where} have another checksum than was written")
        return int(self._begins[shard]) + offset, np.frombuffer(content, self._dtype)

    def _forget(self, needed: set[int]) -> None:
        for number in self._held.keys() - needed:
            self._reader.cancel(self._held.pop(number))


def _ordered(first: np.ndarray, last: np.ndarray) -> list[int]:
    """Ranges of numbers as a list without repetition, those that are needed first at its head."""
    most = int((last - first).max(initial=0)) + 1
    if most == 1:
        return list(dict.fromkeys(first.tolist()))
    numbers = first[:, None] + np.arange(most)
    return list(dict.fromkeys(numbers.T[(numbers <= last[:, None]).T].tolist()))
