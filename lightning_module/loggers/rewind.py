"""Removal of what a run logged after its checkpoint, which the resumed run logs again.

So metrics.csv, TensorBoard's files and samples.txt are those of one run, however it was
interrupted. Their content up to the checkpoint stays, byte for byte if it is complete.
"""

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_module.atomic_files import write_atomically
from lightning_module.loggers.metrics_csv import MetricsLogger
from lightning_module.run_files import METRICS, SAMPLES, read_metrics

UNLOGGED = "unlogged"  # in a checkpoint: see unlogged_row


def unlogged_row(trainer: L.Trainer) -> dict[str, float]:
    """The row that Lightning will log for the current step after its callbacks.

    A checkpoint that a callback saves after a step is on disk before the metrics of the step: if
    the process is killed in between, metrics.csv lacks the row of the checkpoint's last step.

    Returns:
        A row of metrics.csv; empty if nothing is pending.
    """
    loop, connector = trainer.fit_loop.epoch_loop, trainer._logger_connector
    progress = loop.batch_progress.current
    waits = progress.completed < progress.ready and not trainer.fit_loop._should_accumulate()
    if not waits or not connector.should_update_logs:
        return {}
    row = {name: float(value) for name, value in connector.metrics["log"].items()}
    return {"epoch": trainer.current_epoch, **row, "step": loop._batches_that_stepped}


def rewind(run_dir: Path, trainer: L.Trainer, steps: int, row: dict[str, float]) -> None:
    """Removes what a run logged after `steps` steps, and adds the pending row of the last one.

    Args:
        run_dir: the run directory.
        trainer: the trainer with the loggers that continue.
        steps: of the checkpoint. A logger counts from 0: its step 99 is the state after 100 steps.
        row: of the checkpoint, see `unlogged_row`.
    """
    for logger in trainer.loggers:
        if isinstance(logger, MetricsLogger):
            rows = read_metrics(run_dir / METRICS, up_to_step=steps - 1)
            if row:
                rows = [r for r in rows if r["step"] != row["step"] or not row.keys() <= r.keys()]
                rows.append(row)
            logger.experiment.keep([r | {"step": int(r["step"])} for r in rows])
        elif isinstance(logger, TensorBoardLogger):
            for file in Path(logger.log_dir).glob("*tfevents*"):
                _cut_events(file, steps, row)
            if row:
                values = {name: value for name, value in row.items() if name != "step"}
                logger.log_metrics(values, int(row["step"]))
    _cut_samples(run_dir / SAMPLES, steps)


def _cut_samples(file: Path, steps: int) -> None:
    if not file.is_file():
        return
    content = file.read_bytes()
    for heading in re.finditer(rb"^== step (\d+), .*$", content, re.MULTILINE):
        if int(heading[1]) > steps:
            write_atomically(file, content[: heading.start()])
            return


def _cut_events(file: Path, steps: int, row: dict[str, float]) -> None:
    """Keeps the events of the first steps in one of TensorBoard's files."""
    from tensorboard.compat.proto.event_pb2 import Event

    content = file.read_bytes()

    def is_kept(event: Any) -> bool:
        if not event.HasField("summary"):
            return True
        repeated = bool(row) and event.step == row["step"]
        if repeated and any(value.tag in row for value in event.summary.value):
            return False
        return event.step < steps

    kept = b"".join(r for r, data in _records(content) if is_kept(Event.FromString(data)))
    if kept != content:
        write_atomically(file, kept)


def _records(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The data of the complete records of a TFRecord file; an incomplete last one is skipped.

    A record: its length (8 bytes), a checksum (4), its data, a checksum (4).
    """
    begin = 0
    while begin + 12 <= len(content):
        end = begin + 12 + struct.unpack_from("<Q", content, begin)[0] + 4
        if end > len(content):
            return
        yield content[begin:end], content[begin + 12 : end - 4]
        begin = end
