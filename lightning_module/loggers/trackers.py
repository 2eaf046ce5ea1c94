"""Weights & Biases and MLflow: one run there for a run here, however often it is resumed.

Its id is stored in the run directory: a resumed run continues it. Rows logged after the checkpoint
from which a killed run resumes appear twice there; `metrics.csv`, from which everything else is
made, has them once.
"""

import logging
import os
import secrets
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger, WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment

from lightning_module.atomic_files import write_atomically
from lightning_module.errors import RunError


class WandbTracker(WandbLogger):
    """Lightning's logger for Weights & Biases, which continues the run of an earlier process.

    Args:
        run_dir: folder of its files and of `wandb_run.txt`.
        project: name of the project.
        offline: write files only; no network, no account.

    Raises:
        RunError: the package wandb is not installed.
    """

    def __init__(self, run_dir: str, project: str, offline: bool = False) -> None:
        _need("wandb")
        os.environ.setdefault("WANDB_SILENT", "true")  # its output would disturb the progress bar
        self._file = Path(run_dir, "wandb_run.txt")
        super().__init__(
            name=Path(run_dir).name,
            save_dir=run_dir,
            project=project,
            offline=offline,
            id=_read(self._file) or secrets.token_hex(4),
        )
        self._wandb_init.pop("anonymous", None)  # wandb warns about it

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run of wandb."""
        if self._experiment is None:
            import wandb

            try:
                super().experiment  # noqa: B018 - starts the run
            except wandb.Error as error:
                cause = str(error).splitlines()[0].rstrip(".")
                raise RunError(
                    f"logger=wandb: {cause}. Without an account or a network: "
                    "logger.wandb.offline=true"
                ) from error
            write_atomically(self._file, f"{self._id}\n".encode())
        return self._experiment


class MLflowTracker(MLFlowLogger):
    """Lightning's logger for MLflow, which continues the run of an earlier process.

    Args:
        run_dir: folder of `mlflow_run.txt`.
        experiment: name of the experiment.
        tracking_uri: of the server; None: `MLFLOW_TRACKING_URI`, or a file beside `run_dir`.

    Raises:
        RunError: the package mlflow is not installed.
    """

    def __init__(self, run_dir: str, experiment: str, tracking_uri: str | None = None) -> None:
        _need("mlflow")
        folder = Path(run_dir)
        self._file = folder / "mlflow_run.txt"
        store = f"sqlite:///{folder.parent / 'mlflow.db'}"
        super().__init__(
            experiment_name=experiment,
            run_name=folder.name,
            tracking_uri=tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or store,
            artifact_location=str(folder.parent / "mlflow_artifacts"),
            run_id=_read(self._file),
        )

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """MLflow's client."""
        if not self._initialized:
            logging.getLogger("lightning.pytorch.loggers.mlflow").setLevel(logging.ERROR)
            super().experiment  # noqa: B018 - starts the run
            write_atomically(self._file, f"{self._run_id}\n".encode())
        return self._mlflow_client


def _need(package: str) -> None:
    if find_spec(package) is None:
        raise RunError(
            f"logger={package} needs the package {package}: pip install 'triton-gru[{package}]'"
        )


def _read(file: Path) -> str | None:
    return file.read_text(encoding="utf-8").strip() if file.is_file() else None
