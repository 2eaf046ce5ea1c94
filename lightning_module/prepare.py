"""The command `triton-gru-prepare`: a corpus tokenised into shards at a URL."""

if __name__ == "__main__":  # python -m, before the imports below, see commands.py
    from lightning_module import commands

    commands.prepare()
    raise SystemExit

import logging
import os
import sys

from omegaconf import DictConfig

from lightning_module.data.corpora import Corpus
from lightning_module.data.shards.index import Index
from lightning_module.data.shards.preparing import prepare
from lightning_module.data.shards.store import open_store
from lightning_module.errors import DataError, RunError, SettingsError, UsageError
from lightning_module.settings.instantiation import build

log = logging.getLogger(__name__)


def run(config: DictConfig) -> None:
    """Runs `triton-gru-prepare`; raises SystemExit on an error.

    Args:
        config: composed from `conf/prepare.yaml`.
    """
    try:
        filesystem, _ = open_store(config.out)
        if "memory" in filesystem.protocol:
            raise DataError("out=memory:// is the memory of one process: set another URL.")
        data = build("data", config.data, tokenizer=build("tokenizer", config.tokenizer))
        corpus = data.corpus()
        if not isinstance(corpus, Corpus):
            raise DataError("data=shards is made already: choose the text that is to be tokenised.")
        made = prepare(
            corpus,
            data.tokenizer_settings,
            os.path.expanduser(config.out),
            build("executor", config.executor),
            config.tokenizer_chars,
        )
    except (UsageError, SettingsError, DataError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    _show(made, config.out)


def _show(made: Index, out: str) -> None:
    for split, shards in made.splits.items():
        documents = sum(shard.documents for shard in shards)
        tokens = sum(shard.length for shard in shards) - documents
        unknown = sum(shard.unknown for shard in shards) / tokens
        print(
            f"{split}: {sum(shard.characters for shard in shards):,} characters = {tokens:,} "
            f"tokens ({unknown:.2%} <unk>) of {documents:,} document{'s' * (documents > 1)} in "
            f"{len(shards):,} shard{'s' * (len(shards) > 1)}"
        )
    print(f"Train on them: triton-gru-train data=shards data.url={out}")
