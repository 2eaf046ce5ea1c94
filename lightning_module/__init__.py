"""Train and sample sentence prediction models with Lightning and Hydra."""

from typing import TYPE_CHECKING, Any

from lightning_module.former_modules import find_former_modules

if TYPE_CHECKING:
    from lightning_module.callbacks.use_triton_gru import UseTritonGRU
    from lightning_module.data.datamodule import SentenceDataModule
    from lightning_module.model import SentencePredictor

__all__ = ["SentenceDataModule", "SentencePredictor", "UseTritonGRU"]

_MODULES = {
    "SentenceDataModule": "data.datamodule",
    "SentencePredictor": "model",
    "UseTritonGRU": "callbacks.use_triton_gru",
}

find_former_modules()


def __getattr__(name: str) -> Any:
    # Imported on first use: they import torch, and the commands read their arguments before that
    # (see commands.py).
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
