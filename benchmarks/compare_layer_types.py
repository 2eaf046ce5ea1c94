"""The table of docs/lstm.md, from the run directories of one sweep.

    triton-gru-train -m experiment=compare model/layer_type=gru,gru_reset_before,lstm,rnn \
        data=shakespeare,sanguo
    python -m benchmarks.compare_layer_types multirun/<date>

Refuses runs whose parameters or wall times differ by more than `TOLERANCE` within a text, because
the table states that they are equal.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from lightning_module.run_config import from_yaml
from lightning_module.run_files import CONFIG, SAMPLES, SUMMARY

NAMES = {"gru": "GRU", "gru_reset_before": "GRU, `reset_after=False`", "lstm": "LSTM", "rnn": "RNN"}
TEXTS = {"shakespeare": "Shakespeare", "sanguo": "三国演义"}
TOLERANCE = {"parameters": 0.01, "seconds": 0.1}
COLUMNS = (
    "text",
    "layer",
    "units",
    "parameters",
    "nats per character",
    "bits per character",
    "characters/s",
)


def runs(folder: Path) -> list[dict[str, Any]]:
    """The table's values of each run in `folder`, by text and layer type.

    Raises:
        ValueError: there are no finished runs, or their parameters or times are not equal.
    """
    found = []
    for file in folder.glob(f"*/{SUMMARY}"):
        summary = json.loads(file.read_text())
        config = from_yaml((file.parent / CONFIG).read_text("utf-8"))
        last_block = (
            (file.parent / SAMPLES).read_text(encoding="utf-8").strip().split("\n\n== ")[-1]
        )
        prompt, _, sentence = last_block.partition("\n> ")[2].partition("|")
        found.append(
            {
                "text": config.data.corpus._target_.rpartition(".")[2],
                "layer_type": config.model.layer_type.name,
                "units": config.model.hidden_size,
                "seconds": summary["wall_seconds"],
                "prompt": prompt,
                "sentence": sentence.strip(),
            }
            | {
                name: summary[name]
                for name in ("parameters", "val_loss", "val_bits_per_char", "tokens_per_second")
            }
        )
    if not found:
        raise ValueError(f"no finished runs below {folder}; expected */{SUMMARY}")
    texts, types = list(TEXTS), list(NAMES)
    found.sort(key=lambda run: (texts.index(run["text"]), types.index(run["layer_type"])))
    for text in texts:
        for what, tolerance in TOLERANCE.items():
            values = [run[what] for run in found if run["text"] == text]
            if values and max(values) > (1 + tolerance) * min(values):
                raise ValueError(f"{what} of the runs on {text} are not equal: {values}")
    return found


def table(found: list[dict[str, Any]]) -> str:
    """The runs as Markdown, with a sample sentence of each below."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for run in found:
        lines.append(
            f"| {TEXTS[run['text']]} | {NAMES[run['layer_type']]} | {run['units']} "
            f"| {run['parameters']:,} | {run['val_loss']:.3f} | {run['val_bits_per_char']:.3f} "
            f"| {run['tokens_per_second']:,.0f} |"
        )
    lines.append("")
    for run in found:
        sentence = " ".join(run["sentence"].split())
        lines.append(
            f"- {TEXTS[run['text']]}, {NAMES[run['layer_type']]}: {run['prompt']} **{sentence}**"
        )
    return "\n".join(lines)


def main() -> None:
    """Prints the table of a sweep directory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the sweep's directory, below multirun/")
    try:
        print(table(runs(parser.parse_args().folder)))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
