"""`metrics.csv`: what a run logs, kept whatever ends the run and when."""

import csv
import io
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment

from lightning_module.atomic_files import write_atomically


class MetricsLogger(CSVLogger):
    """Lightning's CSV logger for a file that is gone on with.

    Lightning's own begins by deleting the file, and writes it anew with every new column: a process
    killed meanwhile loses what was logged in all the hours before.
    """

    @property
    @rank_zero_experiment
    def experiment(self) -> "_Writer":
        """What writes the file."""
        if self._experiment is None:
            self._experiment = _Writer(self.log_dir)
        return self._experiment


class _Writer(ExperimentWriter):
    def keep(self, rows: list[dict[str, Any]]) -> None:
        """Begins with these rows in place of what the file holds."""
        self.metrics_keys = sorted({name for row in rows for name in row})
        self._write(rows)

    def _check_log_dir_exists(self) -> None:
        pass  # nothing is deleted

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        with open(self.metrics_file_path, newline="", encoding="utf-8") as file:
            self._write(list(csv.DictReader(file)))

    def _write(self, rows: list[dict[str, Any]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.metrics_keys)
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(Path(self.metrics_file_path), text.getvalue().encode())
