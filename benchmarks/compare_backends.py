"""Backends of the GRU in a complete training: tokens per second, and loss against wall time.

    triton-gru-train -m experiment=char_best model/layer_type=gru trainer.precision=bf16-mixed \
        trainer.max_steps=2000 trainer.max_time=null model.layer_type.backend=torch,triton \
        seed=1,2,3
    python -m benchmarks.compare_backends multirun/<date> --out FOLDER

Writes training.json and training.png to FOLDER and prints a table. Backends round differently, so
their losses may differ like those of two seeds. They count as equal within noise if the mean over
seeds differs from the first backend's by at most the difference of two seeds of that one. Exits
with 1 otherwise.
"""

import argparse
import json
import math
import statistics
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lightning_module.run_config import from_yaml
from lightning_module.run_files import CONFIG, METRICS, SUMMARY, read_metrics

FIRST = "torch"  # the backend to compare the others with
COLOURS = {"torch": "tab:gray", "triton": "tab:blue", "reference": "tab:orange"}


def runs(folder: Path) -> list[dict[str, Any]]:
    """Backend, seed, speed, last loss and loss curve of each finished run in `folder`.

    Raises:
        ValueError: there are not two backends with the same two or more seeds, or the runs differ
            in more than these, or a loss is not finite.
    """
    found, settings = [], None
    for file in sorted(folder.glob(f"*/{SUMMARY}")):
        summary, run_dir = json.loads(file.read_text()), file.parent
        config = OmegaConf.to_container(from_yaml((run_dir / CONFIG).read_text("utf-8")))
        run = {"backend": config["model"]["layer_type"].pop("backend"), "seed": config.pop("seed")}
        rest = json.dumps(config, sort_keys=True).replace(config["run_dir"], "")
        if settings not in (None, rest):
            raise ValueError(f"{run_dir} differs from the runs before it in more than the backend")
        if not math.isfinite(summary["last_val_loss"]):
            raise ValueError(f"{run_dir} ended with a loss of {summary['last_val_loss']}")
        settings = rest
        tokens = config["data"]["batch_size"] * config["data"]["seq_len"]
        tokens *= config["trainer"]["accumulate_grad_batches"]
        found.append(
            run
            | {name: summary[name] for name in ("device", "versions", "steps", "last_val_loss")}
            | {"tokens_per_second": summary["tokens_per_second"]}
            | {"curve": curve(read_metrics(run_dir / METRICS), tokens)}
        )
    found.sort(key=lambda run: (run["backend"] != FIRST, run["backend"], run["seed"]))
    seeds: dict[str, list[int]] = {}
    for run in found:
        seeds.setdefault(run["backend"], []).append(run["seed"])
    if len(seeds) < 2 or len({tuple(of_one) for of_one in seeds.values()}) > 1:
        raise ValueError(f"{folder} must hold two backends with the same seeds, finished: {seeds}")
    if len({run["seed"] for run in found}) < 2:
        raise ValueError(f"at least two seeds say what noise is, finished in {folder}: {seeds}")
    return found


def curve(rows: list[dict[str, float]], tokens: int) -> list[tuple[float, float]]:
    """Seconds of training and the validation loss at that time.

    Args:
        rows: as `read_metrics` returns them.
        tokens: per step.
    """
    seconds, step, points = 0.0, -1, []
    for row in rows:
        if "tokens_per_second" in row:
            seconds += (row["step"] - step) * tokens / row["tokens_per_second"]
            step = row["step"]
        if "val_loss" in row:
            points.append((seconds, row["val_loss"]))
    return points


def compared(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per backend: runs, median tokens per second, mean and noise of the last loss."""
    table = []
    for backend in dict.fromkeys(run["backend"] for run in found):
        of_it = [run for run in found if run["backend"] == backend]
        losses = [run["last_val_loss"] for run in of_it]
        table.append(
            {
                "backend": backend,
                "runs": len(of_it),
                "tokens_per_second": statistics.median(r["tokens_per_second"] for r in of_it),
                "loss": statistics.mean(losses),
                "noise": max(abs(a - b) for a, b in combinations(losses, 2)),
            }
        )
    return table


def within_noise(table: list[dict[str, Any]]) -> bool:
    """Whether every backend's loss equals the first one's within the noise of seeds."""
    first = table[0]
    return all(abs(row["loss"] - first["loss"]) <= first["noise"] for row in table)


def text_table(table: list[dict[str, Any]]) -> str:
    """The table in Markdown, with the verdict on the losses."""
    lines = [
        "| backend | runs | tokens/s | ratio | validation loss | between seeds |",
        "|---|---|---|---|---|---|",
    ]
    first = table[0]
    for row in table:
        ratio = row["tokens_per_second"] / first["tokens_per_second"]
        lines.append(
            f"| {row['backend']} | {row['runs']} | {row['tokens_per_second']:,.0f} | {ratio:.2f} | "
            f"{row['loss']:.4f} | {row['noise']:.4f} |"
        )
    verdict = "the same" if within_noise(table) else "NOT the same"
    return "\n".join([*lines, "", f"Losses: {verdict} within noise ({first['noise']:.4f})."])


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Draws validation loss against seconds of training into a PNG, one line per run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    labelled = set()
    for run in found:
        backend = run["backend"]
        label = None if backend in labelled else backend
        labelled.add(backend)
        colour = COLOURS.get(backend)
        axes.plot(*zip(*run["curve"], strict=True), "o-", color=colour, label=label, markersize=3)
    axes.set_xlabel(f"seconds of training, {found[0]['device']}")
    axes.set_ylabel("validation loss, nats per token")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, title="one line per seed")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="of the sweep")
    parser.add_argument("--out", type=Path, required=True, help="where JSON and PNG go")
    arguments = parser.parse_args()
    try:
        found = runs(arguments.folder)
    except ValueError as error:
        sys.exit(f"error: {error}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "training.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(found, arguments.out / "training.png")
    table = compared(found)
    print(text_table(table))
    if not within_noise(table):
        sys.exit(1)


if __name__ == "__main__":
    main()
