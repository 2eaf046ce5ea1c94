"""The attributes that Lightning's connectors add to a Trainer and its class does not declare."""

from typing import TYPE_CHECKING, cast

import lightning as L

if TYPE_CHECKING:
    from lightning_module.data.datamodule import SentenceDataModule


class DeclaredTrainer(L.Trainer):
    """A Trainer with these attributes declared, for type checkers only.

    Attributes:
        callbacks: all callbacks, in the order in which they are called.
        datamodule: the data module of `fit`.
        log_every_n_steps: steps between two logged rows.
    """

    callbacks: list[L.Callback]
    datamodule: "SentenceDataModule"
    log_every_n_steps: int


def declared(trainer: L.Trainer) -> DeclaredTrainer:
    """The same trainer, as a type with these attributes."""
    return cast(DeclaredTrainer, trainer)
