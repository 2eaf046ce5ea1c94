"""Before the first step on a GPU: the kernels measured for the shapes of this run."""

import logging
from typing import Any

import torch

from lightning_module.callbacks.reports import RunReport
from lightning_module.data.datamodule import SentenceDataModule
from lightning_module.distributed import ranks
from triton_gru import GRU, prepare
from triton_gru.verdicts.shapes import Verdict

log = logging.getLogger(__name__)


def measure_kernels(
    layer: torch.nn.Module, input_size: int, data: SentenceDataModule, trainer: Any
) -> None:
    """Measures the layer's shape classes in training and validation unless verdicts are stored.

    All ranks call it, see `triton_gru.prepare`. On a CPU, and for layers other than a GRU with
    backend="auto", nothing is measured. The verdicts go into the run's report.

    Args:
        layer: the recurrent layer.
        input_size: features of its input.
        data: set up; its batches are those of the run.
        trainer: the `L.Trainer`: its device, its precision and its report.
    """
    device = trainer.strategy.root_device
    if device.type != "cuda" or not isinstance(layer, GRU) or layer.backend != "auto":
        return
    found: dict[str, Verdict] = {}
    for chunks in (data.train, data.val):
        rows = ranks.share(chunks.batch_size)
        # Under the autocast, or the default dtype, that the steps run under.
        with trainer.precision_plugin.forward_context():
            x = torch.empty(data.seq_len, rows.stop - rows.start, input_size, device=device)
            found.update(prepare(layer, x))
            if chunks is data.train and ranks.rank() == 0:
                log.info(layer.explain(x))
    for callback in trainer.callbacks:
        if isinstance(callback, RunReport):
            callback.verdicts = {name: verdict.record() for name, verdict in found.items()}
