"""From text to chunks of tokens: corpora, tokenizers, the token cache, the data module."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "SentenceDataModule":  # this package was its module; lazily, as it imports torch
        from lightning_module.data.datamodule import SentenceDataModule

        return SentenceDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
