"""`metrics.csv`: the metrics of a run, complete even if the run is killed."""

import csv
import io
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment

from lightning_module.atomic_files import write_atomically
from lightning_module.run_files import METRICS


class MetricsLogger(CSVLogger):
    """Lightning's CSV logger for a file that a resumed run continues.

    Lightning's own logger deletes the file first, and truncates it before it writes a new column: a
    process killed meanwhile loses all earlier rows.
    """

    @property
    @rank_zero_experiment
    def experiment(self) -> "_Writer":
        """The writer of the file."""
        writer = self._experiment
        if not isinstance(writer, _Writer):
            writer = self._experiment = _Writer(Path(self.log_dir, METRICS))
        return writer


class _Writer(ExperimentWriter):
    """Appends rows; a new column, which changes the header, replaces the file atomically."""

    def __init__(self, file: Path) -> None:
        # Without Lightning's constructor, which deletes the file.
        self.file = file
        self.metrics: list[dict[str, Any]] = []  # not yet written
        self._columns: list[str] = []
        file.parent.mkdir(parents=True, exist_ok=True)

    def log_metrics(self, metrics_dict: dict[str, float], step: int | None = None) -> None:
        self.metrics.append({**metrics_dict, "step": len(self.metrics) if step is None else step})

    def save(self) -> None:
        if {name for row in self.metrics for name in row} <= set(self._columns):
            if self.metrics:
                with self.file.open("a", newline="", encoding="utf-8") as file:
                    csv.DictWriter(file, self._columns).writerows(self.metrics)
        else:
            earlier = []
            if self.file.is_file():
                with self.file.open(newline="", encoding="utf-8") as file:
                    earlier = list(csv.DictReader(file))
            self.keep([*earlier, *self.metrics])
        self.metrics = []

    def keep(self, rows: list[dict[str, Any]]) -> None:
        """Replaces the content of the file by these rows."""
        self._columns = sorted({name for row in rows for name in row})
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns)
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.file, text.getvalue().encode())
