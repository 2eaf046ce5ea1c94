"""Passes over chunks, in order, which resume in their middle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from lightning_module.data.chunks import Chunk, PackedChunks, StreamChunks
from lightning_module.data.shards.tokens import ShardTokens
from lightning_module.errors import DataError, StoreError


class ChunkLoader:
    """Iterates over chunks in order, and saves its position.

    Lightning saves `state_dict` in checkpoints and resumes in the middle of a pass with
    `load_state_dict`. A plain iterable suffices: an item is already a batch, and gathering it takes
    a thousandth of a training step, so worker processes would only add overhead.
    """

    def __init__(self, chunks: StreamChunks | PackedChunks, limit: int | float | None = None):
        self.chunks = chunks
        # Lightning's limit_train_batches: a pass that stops there is finished, not interrupted.
        if limit is None:
            limit = 1.0
        self.pass_length = min(
            len(chunks), int(limit * len(chunks)) if isinstance(limit, float) else limit
        )
        self._next = 0
        self._resume_at = 0

    def __len__(self) -> int:
        return len(self.chunks)

    def __iter__(self) -> Iterator[Chunk]:
        first, self._resume_at = self._resume_at, 0
        self._next = first
        return self._iterate(first)

    def _iterate(self, first: int) -> Iterator[Chunk]:
        for k in range(first, len(self)):
            chunk = self.chunks[k]
            self._next = k + 1
            yield chunk

    def state_dict(self) -> dict[str, Any]:
        """The next chunk, 0 at the end of a pass; and the shape of the data."""
        next_chunk = 0 if self._next >= self.pass_length else self._next
        return {"next_chunk": next_chunk, "batch_size": self.chunks.batch_size, "chunks": len(self)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Starts the next iteration at the chunk that was next when the state was saved."""
        next_chunk = state["next_chunk"]
        here = (self.chunks.batch_size, len(self))
        # Checkpoints of earlier versions call the rows of a batch lanes.
        rows = state["batch_size"] if "batch_size" in state else state["lanes"]
        if (rows, state["chunks"]) != here:
            raise DataError(
                f"The checkpoint is before chunk {next_chunk} of {state['chunks']} in "
                f"{rows} rows, this data has {here[1]} in {here[0]} rows: it was saved "
                "with other data, data.batch_size or data.seq_len. Restore these settings."
            )
        self._resume_at = self._next = next_chunk


class ShardLoader(ChunkLoader):
    """Over chunks whose tokens are in shards: it has those of the next chunks read meanwhile.

    Attributes:
        ends_early: End the pass where a store fails, with the error in `failure`, in place of
            raising it. Several ranks can then save before they end; see `StopWhenStoreFails`.
        failure: The error.
    """

    def __init__(self, chunks: StreamChunks | PackedChunks, limit: int | float | None = None):
        super().__init__(chunks, limit)
        assert isinstance(chunks.tokens, ShardTokens)
        self.tokens = chunks.tokens
        self.ends_early = False
        self.failure: StoreError | None = None
        self._distance = max(1, self.tokens.ahead // chunks.seq_len)
        self._named = self._read = 0  # up to which chunk tokens are asked for, and certainly read

    def _iterate(self, first: int) -> Iterator[Chunk]:
        self._named = self._read = 0
        every = max(1, self._distance // 8)  # finding what to ask for takes as long as a chunk
        passed = super()._iterate(first)
        while True:
            if self._named < min(self._next + 1 + self._distance, self.pass_length):
                self._named = min(self._next + 1 + self._distance + every, self.pass_length)
                self.tokens.read_ahead(*self.chunks.spans(self._next, self._named))
            try:
                chunk = next(passed)
            except StopIteration:
                return
            except StoreError as error:
                if not self.ends_early:
                    raise
                self.failure = error
                return
            yield chunk

    def wait_for(self, count: int, stop: Callable[[], bool] = lambda: False) -> None:
        """Waits until the tokens of the next chunks are in memory, or `stop` becomes true.

        Args:
            count: Chunks; after the last of a pass those of the next one.
            stop: Called now and then.

        Raises:
            StoreError: They cannot be read.
        """
        again = self._next >= self.pass_length
        first = 0 if again else self._next
        end = min(first + count, self.pass_length)
        if not again and end <= self._read:
            return
        if not again and end <= self._named and self.tokens.is_read():
            self._read = self._named
        else:
            self.tokens.wait(*self.chunks.spans(first, end), stop)

    def state_dict(self) -> dict[str, Any]:
        """As of `ChunkLoader`, and the digest of the index of the shards."""
        return {**super().state_dict(), "shards": self.tokens.digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As of `ChunkLoader`."""
        if state.get("shards") != self.tokens.digest:
            raise DataError(
                "The checkpoint was saved with other shards than those that are at data.url now: "
                "set data.url to where those of the run are."
            )
        super().load_state_dict(state)
