"""Chunks of tokens for the model: rows of consecutive text, or of sentences.

`StreamChunks`, the continuous stream. A document becomes the stream `<doc>` + its tokens. Inputs
are the stream without its last token, targets without its first, so every token of the text is
predicted exactly once. Streams are cut into chunks of `seq_len`; the last chunk of a document is
padded with targets that are ignored, so a document begins where a chunk begins. All chunks in order
are divided into `batch_size` runs of equal length (up to one chunk), and item k of the data is
chunk k of every row: a row that is not `fresh` continues where it stopped, so the state of the
recurrent layer is carried over.

`PackedChunks`, independent sentences. A line of the text, its line end included, is a sentence: it
starts with `<doc>` and a state of zero, and its line end is the last token predicted in it. The
sentences follow each other without padding; `resets` marks where one begins inside a chunk. A
sentence that the end of a chunk cuts continues in the next chunk.

Each rank reads a block of rows; the text of a row does not depend on the number of ranks.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import torch

from lightning_module.data.token_cache import SplitTokens
from lightning_module.errors import DataError

IGNORE = -100  # torch's default ignore_index of cross entropy


class Chunk(NamedTuple):
    """T tokens of B rows, time first; the rows are those of this rank.

    Attributes:
        inputs: Token ids, int64 [T, B].
        targets: The tokens that follow, int64 [T, B]; `IGNORE` where there is nothing to predict.
        fresh: bool [B]: a document, or the pass, begins with this chunk of the row, so its state
            starts from zero; otherwise it continues from the chunk before.
        tokens: Targets that are not `IGNORE`, in the rows of all ranks; None: only these rows.
        resets: bool [T, B]: a sentence begins with this step, so the state before it is zero;
            None: none begins inside the chunk.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    fresh: torch.Tensor
    tokens: int | None = None
    resets: torch.Tensor | None = None

    def token_count(self) -> int:
        """Targets that are not `IGNORE`, in the rows of all ranks."""
        return int((self.targets != IGNORE).sum()) if self.tokens is None else self.tokens


class Tokens(Protocol):
    """The stream of one split: `SplitTokens`, in files of this machine, or `ShardTokens`.

    Attributes:
        begins: Where each document begins in the stream, and its length, int64
            [documents + 1].
        doc_id: Id of `<doc>`.
        characters: Characters of the text.
        tokens: Tokens to predict: all but `<doc>`.
        unknown: How many of them are `<unk>`.
    """

    begins: np.ndarray
    doc_id: int
    characters: int
    tokens: int
    unknown: int

    def chunks_before(self, seq_len: int) -> np.ndarray:
        """Chunks of `seq_len` tokens before each document, and in all, int64 [documents + 1]."""

    def take(self, indices: np.ndarray, needed: np.ndarray | None = None) -> np.ndarray:
        """The tokens at these indices of the stream, int64; those not `needed` may be any.

        Args:
            indices: int64 [T, B]; those of a row are close together, and ascend.
            needed: bool [T, B], the first ones of each row; None: all are.
        """


class StreamChunks:
    """Item k is chunk k of every row (see the module's docstring).

    Row b holds the chunks from `b * chunks // batch_size` up to where row b + 1 begins. The last
    item has no chunk for some of the rows: theirs is empty, with all targets `IGNORE`.

    Args:
        tokens: The split.
        batch_size: B, number of rows.
        seq_len: T, tokens per chunk.
        setting: The user's name of `batch_size`, for the error.
        own: The rows of this rank; None: all.

    Raises:
        DataError: There are more rows than chunks.
    """

    def __init__(
        self,
        tokens: Tokens,
        batch_size: int,
        seq_len: int,
        setting: str = "batch_size",
        own: slice | None = None,
    ):
        self.tokens, self.batch_size, self.seq_len = tokens, batch_size, seq_len
        self._own = own or slice(None)
        self._chunks_before = tokens.chunks_before(seq_len)
        self.chunks = int(self._chunks_before[-1])
        if batch_size > self.chunks:
            raise DataError(
                f"The text is too short for {batch_size} rows: it has {tokens.characters:,} "
                f"characters = {tokens.tokens:,} tokens, {self.chunks:,} chunks of "
                f"seq_len={seq_len}, and every row needs one ({batch_size} x {seq_len} = "
                f"{batch_size * seq_len:,} tokens). Set {setting} to {self.chunks} or less, or a "
                "smaller data.seq_len, or give more text."
            )
        borders = np.arange(batch_size + 1) * self.chunks // batch_size
        self._first, self._end = borders[:-1], borders[1:]
        self._steps = np.arange(seq_len + 1)[:, None]

    def __len__(self) -> int:
        return -(-self.chunks // self.batch_size)

    def __getitem__(self, k: int) -> Chunk:
        if not 0 <= k < len(self):
            raise IndexError(f"chunk {k} of {len(self)}")
        chunk = self._first + k
        there = chunk < self._end
        start, length, nth = self._find(np.minimum(chunk, self._end - 1))
        length = np.where(there, length, 0)
        fresh = (nth == 0) | (k == 0) | ~there
        start, fresh, there = start[self._own], fresh[self._own], there[self._own]
        inside = (self._steps <= length[self._own]) & there
        window = np.where(inside, start + self._steps, start)
        ids = torch.from_numpy(self.tokens.take(window, inside))
        valid = torch.from_numpy(inside)
        return Chunk(
            inputs=ids[:-1].where(valid[:-1], self.tokens.doc_id),
            targets=ids[1:].where(valid[1:], IGNORE),
            fresh=torch.from_numpy(fresh),
            tokens=int(length.sum()),
        )

    def spans(self, k: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """From where to where this rank's rows read the stream for chunks from `k` to `end`.

        Rows that have no such chunk are left out.
        """
        first = (self._first + k)[self._own]
        last = np.minimum(self._first + end, self._end)[self._own] - 1
        there = first <= last
        start, *_ = self._find(first[there])
        last_start, length, _ = self._find(last[there])
        return start, last_start + length + 1

    def _find(self, chunk: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of chunks: where they start in the stream, tokens to predict, and which of the document.

        There are fewer than `seq_len` at a document's end.
        """
        begins = self.tokens.begins
        document = np.searchsorted(self._chunks_before, chunk, side="right") - 1
        nth = chunk - self._chunks_before[document]
        start = begins[document] + nth * self.seq_len
        return start, np.minimum(begins[document + 1] - start - 1, self.seq_len), nth


class PackedChunks:
    """Item k is chunk k of every row of sentences (see the module's docstring).

    Row b holds the tokens from `b * tokens // batch_size` up to where row b + 1 begins. A row that
    begins within a sentence reads the token before, from a state of zero.

    Args:
        tokens: The split.
        ends_line: bool [vocab_size]: the token is a line end.
        batch_size: B, number of rows.
        seq_len: T, tokens per chunk.
        setting: The user's name of `batch_size`, for the error.
        own: The rows of this rank; None: all.

    Raises:
        DataError: There are more rows than tokens.
    """

    def __init__(
        self,
        tokens: Tokens,
        ends_line: np.ndarray,
        batch_size: int,
        seq_len: int,
        setting: str = "batch_size",
        own: slice | None = None,
    ):
        self.tokens, self.batch_size, self.seq_len = tokens, batch_size, seq_len
        self._ends_line, self._own = ends_line, own or slice(None)
        if batch_size > tokens.tokens:
            raise DataError(
                f"The text has {tokens.tokens:,} tokens, too few for {batch_size} rows. Set "
                f"{setting} to {tokens.tokens} or less, or give more text."
            )
        # Tokens before each document, without <doc>: chunks of one token.
        self._tokens_before = tokens.chunks_before(1)
        borders = np.arange(batch_size + 1) * tokens.tokens // batch_size
        self._first, self._end = borders[:-1], borders[1:]
        self._steps = np.arange(seq_len)[:, None]

    def __len__(self) -> int:
        return -(-int((self._end - self._first).max()) // self.seq_len)

    def __getitem__(self, k: int) -> Chunk:
        if not 0 <= k < len(self):
            raise IndexError(f"chunk {k} of {len(self)}")
        left = self._end - self._first - k * self.seq_len
        first, end = self._first[self._own], self._end[self._own]
        token = first + k * self.seq_len + self._steps
        there = token < end
        index = self._find(np.minimum(token, end - 1))
        current, before = self.tokens.take(index, there), self.tokens.take(index - 1, there)
        begins = sentence_begins(before, current, self.tokens.doc_id, self._ends_line)
        return Chunk(
            inputs=torch.from_numpy(np.where(begins | ~there, self.tokens.doc_id, before)),
            targets=torch.from_numpy(np.where(there, current, IGNORE)),
            fresh=torch.from_numpy(begins[0] | (k == 0) | ~there[0]),
            tokens=int(left.clip(0, self.seq_len).sum()),
            resets=torch.from_numpy(begins & there),
        )

    def spans(self, k: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """As `StreamChunks.spans`."""
        first, row_end = self._first[self._own], self._end[self._own]
        last = np.minimum(first + end * self.seq_len, row_end) - 1
        first = first + k * self.seq_len
        there = first <= last
        return self._find(first[there]) - 1, self._find(last[there]) + 1

    def _find(self, token: np.ndarray) -> np.ndarray:
        """Where tokens, numbered without `<doc>`, are in the stream."""
        return token + np.searchsorted(self._tokens_before, token, side="right")


def sentence_begins(
    before: np.ndarray, current: np.ndarray, doc_id: int, ends_line: np.ndarray
) -> np.ndarray:
    """Whether each token is the first of its line; blank lines belong to the line before."""
    return (before == doc_id) | (ends_line[before] & ~ends_line[current])


def padded_share(
    tokens: SplitTokens, ends_line: np.ndarray, batch_size: int, first: int | None = None
) -> float:
    """Share of useful tokens if batches of `batch_size` lines were padded to their longest.

    Args:
        tokens: The split.
        ends_line: As for `PackedChunks`.
        batch_size: Lines per batch.
        first: Use this many tokens from the beginning; None: all.
    """
    stream = np.asarray(tokens.stream[: first and first + 1])
    before, current = stream[:-1], stream[1:]
    is_text = current != tokens.doc_id
    begins = is_text & sentence_begins(before, current, tokens.doc_id, ends_line)
    lengths = np.bincount(np.cumsum(begins)[is_text] - 1)
    batches = np.split(lengths, np.arange(batch_size, len(lengths), batch_size))
    return lengths.sum() / sum(len(batch) * batch.max() for batch in batches)
