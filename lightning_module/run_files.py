"""The names of the files in a run directory, and its metrics; imports no torch."""

import csv
from pathlib import Path
from typing import Any

from lightning_module.errors import DamagedFile

# A run directory holds CONFIG and CHECKPOINTS/; CHECKPOINTS holds BEST, LAST and the tokenizer they
# were trained with.
CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
BEST = "best.ckpt"
LAST = "last.ckpt"
TOKENIZER = "tokenizer.json"
METRICS = "metrics.csv"
SAMPLES = "samples.txt"
CURVES = "curves.png"
SUMMARY = "summary.json"


def read_metrics(path: Path, up_to_step: float = float("inf")) -> list[dict[str, float]]:
    """The rows of a `metrics.csv`, without the empty cells; none if there is no such file.

    Raises:
        DamagedFile: a cell is not a number, or the file is not a table.
    """
    if not path.is_file():
        return []
    reader = None
    try:
        with path.open(newline="", encoding="utf-8") as file:
            # A process killed while writing leaves a line without an end, a power cut one of NULs.
            lines = [line for line in file if line.endswith("\n") and "\0" not in line]
        reader = csv.DictReader(lines)
        rows = [{k: float(v) for k, v in row.items() if v} for row in reader]
        return [row for row in rows if row["step"] <= up_to_step]
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        where = f"line {reader.line_num}" if reader else "not UTF-8"
        raise DamagedFile(
            f"{path} is damaged ({where}: {error}): repair it, or move it away to resume without "
            "what was logged so far"
        ) from None


def summarize(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Every validation metric at the step with the lowest `val_loss`, and that step.

    Args:
        rows: as `read_metrics` returns them.
    """
    validated = [row for row in rows if "val_loss" in row]
    if not validated:
        return {}
    best = min(validated, key=lambda row: row["val_loss"])
    return {
        **{name: value for name, value in best.items() if name.startswith("val_")},
        # The logger counts steps from 0: the row of step 99 is the state after 100 steps.
        "best_step": int(best["step"]) + 1,
        "last_val_loss": validated[-1]["val_loss"],
    }
