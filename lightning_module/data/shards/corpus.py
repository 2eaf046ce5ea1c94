"""A corpus that is in shards at a URL."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_module.errors import DataError


@dataclass(frozen=True)
class ShardedCorpus:
    """Where the shards are; the place of a `Corpus` in `SentenceDataModule`."""

    url: str

    def shortened(self, max_chars: int) -> ShardedCorpus:
        """Raises: the documents of shards are not read again to find where characters end."""
        raise DataError(
            f"data.max_chars={max_chars} cannot shorten shards: set it for triton-gru-prepare, or "
            "train on a share of every row with trainer.limit_train_batches."
        )


def shards(url: str) -> ShardedCorpus:
    """A corpus that `triton-gru-prepare` made into tokens, at any URL that fsspec can open."""
    return ShardedCorpus(url)
