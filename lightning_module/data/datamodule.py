"""A corpus as chunks for training and validation (see `data/chunks.py`).

Tokens are in memory-mapped files (`token_cache.py`): neither starting nor training reads more of
them than it uses.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning
import numpy as np

from lightning_module.data.cache_folder import NOT_WHOLE
from lightning_module.data.chunks import PackedChunks, StreamChunks, Tokens, padded_share
from lightning_module.data.corpora import Corpus
from lightning_module.data.loading import ChunkLoader, ShardLoader
from lightning_module.data.shards.corpus import ShardedCorpus
from lightning_module.data.shards.tables import ShardCache
from lightning_module.data.shards.tokens import ShardTokens
from lightning_module.data.token_cache import SplitTokens, TokenCache
from lightning_module.data.tokenizers import Tokenizer, TokenizerSettings
from lightning_module.distributed import ranks
from lightning_module.errors import DataError

BATCHING = ("stream", "packed")
_SAMPLE = 2**20  # tokens from which the share of padding is estimated: the start reads no more


class SentenceDataModule(lightning.LightningDataModule):
    """A corpus in rows of text, for training and validation.

    The constructor reads nothing. `prepare_data` fetches the corpus and makes its tokens, once per
    machine and corpus; `setup` opens them. Both raise `DataError` for bad arguments.

    Args:
        corpus: A function of `lightning_module.data.corpora`, or any that returns a `Corpus`.
        tokenizer: The kind of tokenizer, trained on the training documents.
        batching: `stream`, consecutive text with the state carried through documents, or `packed`,
            independent lines one after the other.
        batch_size: B, parallel streams.
        seq_len: T, tokens per chunk, through which gradients flow.
        val_batch_size: B of the validation text. None: as `batch_size`, or fewer rows if the text
            is too short. Every row begins without context, so fewer rows give a slightly lower
            loss: compare runs of equal `val_batch_size`.
        max_chars: Use only the beginning of the corpus, this many characters in all
            (`Corpus.shortened`).
        corpus_arguments: All other arguments go to `corpus`.

    Attributes:
        tokenizer: The `Tokenizer`, after `setup`.
        train: `StreamChunks` or `PackedChunks` of the training text, after `setup`.
        val: The same for validation, after `setup`.
        ends_line: Which tokens are line ends, bool [vocab_size], after `setup`; packed only.

    Example:
        >>> from lightning_module.data.corpora import text_files
        >>> characters = TokenizerSettings("char")
        >>> data = SentenceDataModule(text_files, characters, seq_len=32, paths=["my.txt"])
        >>> data.seq_len
        32
    """

    tokenizer: Tokenizer
    train: StreamChunks | PackedChunks
    val: StreamChunks | PackedChunks

    def __init__(
        self,
        corpus: Callable[..., Corpus | ShardedCorpus],
        tokenizer: TokenizerSettings,
        *,
        batching: str = "stream",
        batch_size: int = 64,
        seq_len: int = 128,
        val_batch_size: int | None = None,
        max_chars: int | None = None,
        **corpus_arguments: Any,
    ):
        super().__init__()
        self._corpus, self._corpus_arguments = corpus, corpus_arguments
        self._max_chars = max_chars
        self.tokenizer_settings = tokenizer
        self.batching = batching
        self.batch_size, self.seq_len, self.val_batch_size = batch_size, seq_len, val_batch_size

    def corpus(self) -> Corpus | ShardedCorpus:
        """The corpus.

        Raises:
            DataError: An argument is out of range.
        """
        corpus = self._corpus(**self._corpus_arguments)
        return corpus if self._max_chars is None else corpus.shortened(self._max_chars)

    def _cache(self) -> TokenCache | ShardCache:
        corpus = self.corpus()
        if isinstance(corpus, ShardedCorpus):
            # Packed text is divided by tokens, which are chunks of one.
            seq_len = 1 if self.batching == "packed" else self.seq_len
            return ShardCache(corpus.url, self.tokenizer_settings, seq_len)
        return TokenCache(corpus, self.tokenizer_settings)

    def prepare_data(self) -> None:
        """Fetches the corpus and makes its tokens unless they exist.

        Raises:
            DataError: An argument is out of range, or the corpus cannot be fetched or read.
        """
        if self.batching not in BATCHING:
            raise DataError(
                f"data.batching must be one of {', '.join(BATCHING)}, got {self.batching!r}."
            )
        for name in ("batch_size", "seq_len", "val_batch_size"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise DataError(f"data.{name} must be at least 1, got {value!r}.")
        self._cache().make()

    def setup(self, stage: str | None = None) -> None:
        """Opens the tokens.

        Raises:
            DataError: The text is too short for the rows, or they cannot be divided among the
                ranks, or `prepare_data` was not called.
        """
        cache = self._cache()
        try:
            self.tokenizer, train, val = cache.open()
        except NOT_WHOLE as error:
            raise DataError(
                f"The tokens in {cache.folder} are missing or damaged ({error}): "
                "call prepare_data()."
            ) from error
        world = ranks.size()
        if self.batch_size % world:
            fitting = -(-self.batch_size // world) * world
            raise DataError(
                f"data.batch_size={self.batch_size} cannot be divided equally among {world} ranks: "
                f"set data.batch_size={fitting}, or trainer.devices (times trainer.num_nodes) to a "
                f"divisor of {self.batch_size}."
            )
        self.train = self._chunks(train, self.batch_size, "data.batch_size")
        self.val = self.validation_chunks(val)

    def validation_chunks(self, tokens: Tokens) -> StreamChunks | PackedChunks:
        """Chunks of `tokens` as for validation: this rank's rows of `val_batch_size`.

        Raises:
            DataError: They are too few.
        """
        packed, world = self.batching == "packed", ranks.size()
        most = tokens.tokens // self.seq_len if packed else tokens.chunks_before(self.seq_len)[-1]
        batch_size = self.val_batch_size or max(1, min(self.batch_size, int(most)))
        if batch_size < world:
            raise DataError(
                f"The validation text makes {batch_size} rows, fewer than the {world} ranks: use "
                "more text, or set data.val_batch_size larger, data.seq_len smaller or "
                "trainer.devices smaller."
            )
        # They have no gradient, so ranks may have unequal numbers of rows.
        return self._chunks(tokens, batch_size, "data.val_batch_size")

    def _chunks(self, tokens: Tokens, batch_size: int, setting: str) -> StreamChunks | PackedChunks:
        make: Callable[..., StreamChunks | PackedChunks] = StreamChunks
        if self.batching == "packed":
            self.ends_line = _ends_line(self.tokenizer)
            make = partial(PackedChunks, ends_line=self.ends_line)
        return make(tokens, batch_size=batch_size, seq_len=self.seq_len, setting=setting,
                    own=ranks.share(batch_size))  # fmt: skip

    @property
    def vocab_size(self) -> int:
        """Number of token ids, after `setup`."""
        return self.tokenizer.vocab_size

    @property
    def chars_per_token(self) -> float:
        """Characters of the validation text per predicted token, after `setup`.

        Nats per token / (chars_per_token * ln 2) are bits per character.
        """
        return self.val.tokens.characters / self.val.tokens.tokens

    def state_dict(self) -> dict[str, str]:
        """The fingerprint of the tokenizer: a checkpoint is only valid with it."""
        return {"tokenizer": self.tokenizer.fingerprint}

    def describe(self) -> str:
        """The data in a few lines for users, after `setup`."""
        lines = []
        for name, split in (("to train on", self.train), ("to validate on", self.val)):
            tokens = split.tokens
            useful = tokens.tokens / (len(split) * split.batch_size * split.seq_len)
            lines.append(
                f"{tokens.characters:,} characters = {tokens.tokens:,} tokens {name}"
                f" ({tokens.unknown / tokens.tokens:.2%} <unk>) in {split.batch_size} rows,"
                f" {len(split):,} chunks of {split.seq_len} a row, {useful:.1%} filled"
            )
        # Of shards it would read blocks that no row needs.
        if self.batching == "packed" and isinstance(self.train.tokens, SplitTokens):
            share = padded_share(self.train.tokens, self.ends_line, self.batch_size, _SAMPLE)
            lines.append(
                f"batches of {self.batch_size} lines padded to their longest would be {share:.1%}"
                f" filled (first {min(_SAMPLE, self.train.tokens.tokens):,} tokens)"
            )
        return "\n".join(lines)

    def train_dataloader(self) -> ChunkLoader:
        """A pass over the training text; resumes in its middle from a checkpoint."""
        return self._loader(self.train, "limit_train_batches")

    def val_dataloader(self) -> ChunkLoader:
        """A pass over the validation text."""
        return self._loader(self.val, "limit_val_batches")

    def _loader(self, chunks: StreamChunks | PackedChunks, limit: str) -> ChunkLoader:
        loader = ShardLoader if isinstance(chunks.tokens, ShardTokens) else ChunkLoader
        return loader(chunks, getattr(self.trainer, limit, None))

    def test_dataloader(self) -> ChunkLoader:
        """The same: a corpus has one part for validation."""
        return self.val_dataloader()

    def predict_dataloader(self) -> ChunkLoader:
        """The same: `SentencePredictor` returns the probability of each of its tokens."""
        return self.val_dataloader()


def _ends_line(tokenizer: Tokenizer) -> np.ndarray:
    """Which tokens are line ends, bool [vocab_size]; no token contains one and other text."""
    texts = (tokenizer.decode([id]) for id in range(tokenizer.vocab_size))
    return np.array([text != "" and not text.strip("\n") for text in texts])
