"""Lanes of consecutive text: what the model reads, chunk by chunk.

A document becomes the stream `<doc>` + its tokens. Inputs are the stream without its last token,
targets without its first, so every token of the text is predicted exactly once. Streams are cut
into chunks of `seq_len`; the last chunk of a document is padded with targets that are ignored, so
a document begins where a chunk begins. All chunks in order are divided into `lanes` runs of equal
length (up to one chunk), and item k of the data is chunk k of every lane: a lane that is not
`fresh` goes on where it stopped, so the state of the recurrent core is carried over. Several ranks
take a block of lanes each; which text a lane holds does not depend on them.

Tokens lie in files that are mapped into memory (`token_cache.py`): neither starting nor training
reads more of them than it uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import lightning
import numpy as np
import torch

from lightning_module import ranks
from lightning_module.corpora import Corpus, DataError
from lightning_module.token_cache import NOT_WHOLE, SplitTokens, TokenCache
from lightning_module.tokenizers import Tokenizer, TokenizerSettings

IGNORE = -100  # torch's default ignore_index of cross entropy


class Chunk(NamedTuple):
    """T tokens of B lanes, time first; B are this rank's.

    Attributes:
        inputs: Token ids, int64 [T, B].
        targets: The tokens that follow, int64 [T, B]; `IGNORE` where there is nothing to predict.
        fresh: bool [B]: the lane begins a document, or the pass, with this chunk, so that its
            state is zero; else it goes on from the chunk before.
        tokens: Targets that are not `IGNORE`, in the lanes of all ranks; None: these lanes are all.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    fresh: torch.Tensor
    tokens: int | None = None

    def count(self) -> int:
        """Targets that are not `IGNORE`, in the lanes of all ranks."""
        return int((self.targets != IGNORE).sum()) if self.tokens is None else self.tokens


def _chunks_of_documents(tokens: SplitTokens, seq_len: int) -> np.ndarray:
    return -(-(np.diff(tokens.begins) - 1) // seq_len)


class LaneChunks:
    """Item k is chunk k of every lane (see the module's docstring).

    Lane b holds the chunks from `b * chunks // lanes` up to where lane b + 1 begins. The last item
    has no chunk left for some of the lanes: theirs is empty, its targets all `IGNORE`.

    Args:
        tokens: The split.
        lanes: B, number of lanes.
        seq_len: T, tokens a chunk.
        setting: What the user calls `lanes`, for the error.
        own: Those of the lanes that are this rank's; None: all.

    Raises:
        DataError: There are more lanes than chunks.
    """

    def __init__(
        self,
        tokens: SplitTokens,
        lanes: int,
        seq_len: int,
        setting: str = "lanes",
        own: slice | None = None,
    ):
        self.tokens, self.lanes, self.seq_len = tokens, lanes, seq_len
        self._own = own or slice(None)
        # Chunks before each document, and at last of all.
        counts = _chunks_of_documents(tokens, seq_len)
        self._chunks_before = np.concatenate([[0], np.cumsum(counts)])
        self.chunks = int(self._chunks_before[-1])
        if lanes > self.chunks:
            raise DataError(
                f"The text is too short for {lanes} lanes: it has {tokens.characters:,} characters "
                f"= {tokens.tokens:,} tokens, {self.chunks:,} chunks of seq_len={seq_len}, and "
                f"every lane needs one ({lanes} x {seq_len} = {lanes * seq_len:,} tokens). Set "
                f"{setting} to {self.chunks} or less, or a smaller data.seq_len, or give more "
                "text."
            )
        borders = np.arange(lanes + 1) * self.chunks // lanes
        self._first, self._end = borders[:-1], borders[1:]
        self._steps = np.arange(seq_len + 1)[:, None]

    def __len__(self) -> int:
        return -(-self.chunks // self.lanes)

    def __getitem__(self, k: int) -> Chunk:
        if not 0 <= k < len(self):
            raise IndexError(f"chunk {k} of {len(self)}")
        begins = self.tokens.begins
        chunk = self._first + k
        there = chunk < self._end
        chunk = np.minimum(chunk, self._end - 1)
        document = np.searchsorted(self._chunks_before, chunk, side="right") - 1
        nth = chunk - self._chunks_before[document]
        start = begins[document] + nth * self.seq_len
        # Tokens to predict in each lane's chunk: fewer than seq_len at a document's end.
        length = np.where(there, np.minimum(begins[document + 1] - start - 1, self.seq_len), 0)
        fresh = (nth == 0) | (k == 0) | ~there
        start, fresh = start[self._own], fresh[self._own]
        inside = self._steps <= length[self._own]
        window = np.where(inside, start + self._steps, start)
        ids = torch.from_numpy(self.tokens.stream[window].astype(np.int64))
        valid = torch.from_numpy(inside)
        return Chunk(
            inputs=ids[:-1].where(valid[:-1], self.tokens.doc_id),
            targets=ids[1:].where(valid[1:], IGNORE),
            fresh=torch.from_numpy(fresh),
            tokens=int(length.sum()),
        )


class ChunkLoader:
    """Passes over chunks in order, and remembers where it stands.

    Lightning saves `state_dict` in checkpoints and resumes in the middle of a pass with
    `load_state_dict`. A plain iterable does here: an item is a batch already, and gathering it
    takes a thousandth of a training step, so worker processes would only cost.
    """

    def __init__(self, chunks: LaneChunks, limit: int | float | None = None):
        self.chunks = chunks
        # Lightning's limit_train_batches: a pass that stops there is over, not interrupted.
        if limit is None:
            limit = 1.0
        self._pass_length = min(
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
            self._next = k + 1
            yield self.chunks[k]

    def state_dict(self) -> dict[str, int]:
        """The chunk that comes next, 0 when the pass is over; and of which lanes."""
        next_chunk = 0 if self._next >= self._pass_length else self._next
        return {"next_chunk": next_chunk, "lanes": self.chunks.lanes, "chunks": len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Lets the next iteration begin at the chunk that came next when the state was saved."""
        next_chunk = state["next_chunk"]
        here = (self.chunks.lanes, len(self))
        if (state["lanes"], state["chunks"]) != here:
            raise DataError(
                f"The checkpoint stands before chunk {next_chunk} of {state['chunks']} in "
                f"{state['lanes']} lanes, this data has {here[1]} in {here[0]} lanes: it was saved "
                "with other data, data.lanes or data.seq_len. Set them as they were."
            )
        self._resume_at = self._next = next_chunk


class SentenceDataModule(lightning.LightningDataModule):
    """A corpus in lanes of consecutive text, to train on and to validate with.

    Constructing it reads nothing. `prepare_data` fetches the corpus and makes its tokens, once a
    machine and corpus; `setup` opens them. Bad arguments show in either, as `DataError`.

    Args:
        corpus: A function of `lightning_module.corpora`, or any that returns a `Corpus`.
        tokenizer: What kind of tokenizer to train on the documents that are trained on.
        lanes: B, streams read side by side; the batch size.
        seq_len: T, tokens a chunk, through which gradients flow.
        val_lanes: Lanes of the held-out text. None: as many as `lanes`, or fewer where the text is
            too short for them. Every lane begins without context, so fewer lanes are a little
            kinder to the model: compare runs of equal `val_lanes`.
        max_chars: Use the beginning of the corpus alone, this many characters in all
            (`Corpus.shortened`).
        corpus_arguments: All other arguments go to `corpus`.

    Attributes:
        tokenizer: The `Tokenizer`, after `setup`.
        train: `LaneChunks` to train on, after `setup`.
        val: `LaneChunks` held out, after `setup`.
    """

    tokenizer: Tokenizer
    train: LaneChunks
    val: LaneChunks

    def __init__(
        self,
        corpus: Callable[..., Corpus],
        tokenizer: TokenizerSettings,
        *,
        lanes: int = 64,
        seq_len: int = 128,
        val_lanes: int | None = None,
        max_chars: int | None = None,
        **corpus_arguments: Any,
    ):
        super().__init__()
        self._corpus, self._corpus_arguments = corpus, corpus_arguments
        self._max_chars = max_chars
        self.tokenizer_settings = tokenizer
        self.lanes, self.seq_len, self.val_lanes = lanes, seq_len, val_lanes

    def _cache(self) -> TokenCache:
        corpus = self._corpus(**self._corpus_arguments)
        if self._max_chars is not None:
            corpus = corpus.shortened(self._max_chars)
        return TokenCache(corpus, self.tokenizer_settings)

    def prepare_data(self) -> None:
        """Fetches the corpus and makes its tokens unless they are there already."""
        for name in ("lanes", "seq_len", "val_lanes"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise DataError(f"data.{name} must be at least 1, got {value!r}.")
        self._cache().make()

    def setup(self, stage: str | None = None) -> None:
        """Opens the tokens.

        Raises:
            DataError: The text is too short for the lanes, or they cannot be divided among the
                ranks, or `prepare_data` was not called.
        """
        cache = self._cache()
        try:
            self.tokenizer, train, val = cache.open()
        except NOT_WHOLE as error:
            raise DataError(
                f"There are no whole tokens in {cache.folder} ({error}): prepare_data() makes them."
            ) from error
        world = ranks.size()
        if self.lanes % world:
            fitting = -(-self.lanes // world) * world
            raise DataError(
                f"data.lanes={self.lanes} cannot be divided equally among {world} ranks: set "
                f"data.lanes={fitting}, or trainer.devices (times trainer.num_nodes) to a divisor "
                f"of {self.lanes}."
            )
        own = ranks.share(self.lanes)
        self.train = LaneChunks(train, self.lanes, self.seq_len, "data.lanes", own)
        val_chunks = int(_chunks_of_documents(val, self.seq_len).sum())
        val_lanes = self.val_lanes or min(self.lanes, val_chunks)
        if val_lanes < world:
            raise DataError(
                f"The held-out text makes {val_lanes} lanes, fewer than the {world} ranks: hold "
                "out more text, or set data.val_lanes larger, data.seq_len smaller or "
                "trainer.devices smaller."
            )
        # No gradient comes of these, so that ranks may have unequal numbers of lanes.
        own = ranks.share(val_lanes)
        self.val = LaneChunks(val, val_lanes, self.seq_len, "data.val_lanes", own)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, after `setup`."""
        return self.tokenizer.vocab_size

    @property
    def chars_per_token(self) -> float:
        """Characters of the held-out text a predicted token, after `setup`.

        Nats a token / (chars_per_token * ln 2) are bits a character.
        """
        return self.val.tokens.characters / self.val.tokens.tokens

    def describe(self) -> str:
        """The data in two lines for people, after `setup`."""
        lines = []
        for name, split in (("to train on", self.train), ("held out", self.val)):
            tokens = split.tokens
            useful = tokens.tokens / (len(split) * split.lanes * split.seq_len)
            lines.append(
                f"{tokens.characters:,} characters = {tokens.tokens:,} tokens {name}"
                f" ({tokens.unknown / tokens.tokens:.2%} <unk>) in {split.lanes} lanes,"
                f" {len(split):,} chunks of {split.seq_len} a lane, {useful:.1%} filled"
            )
        return "\n".join(lines)

    def train_dataloader(self) -> ChunkLoader:
        """A pass over the text to train on; resumes in its middle from a checkpoint."""
        limit = self.trainer.limit_train_batches if self.trainer is not None else None
        return ChunkLoader(self.train, limit)

    def val_dataloader(self) -> ChunkLoader:
        """A pass over the held-out text."""
        return ChunkLoader(self.val)
