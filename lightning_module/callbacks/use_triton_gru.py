"""UseTritonGRU: the callback that gives any LightningModule the GRUs of this project."""

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from triton_gru import GRU, GRUCell, replace_gru
from triton_gru.replace import Replacement


class UseTritonGRU(L.Callback):
    """Replaces every `torch.nn.GRU` and `GRUCell` of a LightningModule by ours, before it runs.

    Parameters, their names and checkpoints stay as they are: a run can resume from a checkpoint
    made without the callback, and vice versa. `triton_gru.replace_gru` documents what is not
    replaced.

    Lightning calls `setup` before the strategy moves, shards or wraps the module, and before it
    creates optimizers. GRUs that the module builds later, in its own `setup` or `configure_model`,
    are replaced when the stage starts; a module that shards a GRU there with `fully_shard` should
    call `replace_gru` itself, before that.

    Args:
        backend: "auto", "triton", "torch" or "reference", see `triton_gru.GRU`.

    Attributes:
        replacements: What was replaced and what was not, with `undo()`, in the order of the
            replacements.

    Example:
        >>> trainer = L.Trainer(callbacks=[UseTritonGRU()], logger=False)
    """

    def __init__(self, backend: str = "auto") -> None:
        self.backend = backend
        self.replacements: list[Replacement] = []
        self._unexplained: list[Replacement] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._swap(pl_module)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start(trainer, pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start(trainer, pl_module)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start(trainer, pl_module)

    def _swap(self, pl_module: L.LightningModule) -> Replacement:
        replacement = replace_gru(pl_module, backend=self.backend)
        if replacement.swapped:
            self.replacements.append(replacement)
            self._unexplained.append(replacement)
        return replacement

    def _start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        replacement = self._swap(pl_module)
        if not any(isinstance(module, (GRU, GRUCell)) for module in pl_module.modules()):
            rank_zero_warn(
                f"UseTritonGRU found nothing to swap in {type(pl_module).__name__}. {replacement}"
            )
        # Only now are the parameters on their device, on which the backend depends.
        with trainer.precision_plugin.forward_context():
            for replacement in self._unexplained:
                rank_zero_info(f"UseTritonGRU: {replacement} {_reasons(replacement)}")
        self._unexplained.clear()


def _reasons(replacement: Replacement) -> str:
    names: dict[str, list[str]] = {}
    for name, reason in replacement.explain().items():
        names.setdefault(reason, []).append(name)
    return " ".join(f"{', '.join(same)}: {reason}" for reason, same in names.items())
