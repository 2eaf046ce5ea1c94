"""The command `triton-gru-inspect`: what a trained GRU keeps and forgets while it reads a text."""

import os
import sys
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from lightning_module.checkpoints import find_checkpoint, load_predictor
from lightning_module.data.corpora.text import from_argument, read_lines
from lightning_module.device import find_device
from lightning_module.errors import CheckpointError, DataError, InspectionError, UsageError
from lightning_module.inspect.figure import draw_inspection
from lightning_module.inspect.inspection import Inspection, inspect_text
from lightning_module.inspect.page import page, page_data


def _text(text: str | None) -> str:
    if text is not None:
        return from_argument(text)
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError('no text: give text="...", or a text on standard input')
    lines = []
    for number, line, error in read_lines(sys.stdin.buffer, "standard input"):
        if error is not None:
            raise DataError(f"line {number}: {error}")
        lines.append(line)
    return "\n".join(lines).rstrip("\n")


def _save(inspection: Inspection, path: Path) -> None:
    """Writes the data of the pictures, in full precision."""
    cost = [np.nan if bits is None else bits for bits in inspection.surprise]
    np.savez_compressed(
        path,
        tokens=np.array(inspection.tokens),
        r=inspection.r.numpy(),
        z=inspection.z.numpy(),
        n=inspection.n.numpy(),
        h=inspection.h.numpy(),
        memory=inspection.memory.numpy(),
        surprise=np.array(cost),
    )


def inspect(config: DictConfig, text: str | None) -> None:
    """Reads the text, writes the picture, the page and the numbers, and prints a summary.

    Raises:
        UsageError: no text, or the device or the output cannot be used.
        CheckpointError: there is no usable checkpoint.
        InspectionError: the model has no such layer or no gates, or the text is too long.
        DataError: the text contains characters that are not in the vocabulary.
    """
    checkpoint = find_checkpoint(str(config.checkpoint), str(config.runs))
    model, tokenizer = load_predictor(checkpoint)
    model = model.to(find_device(str(config.device)))
    text = _text(text)
    found = inspect_text(model, tokenizer, text, layer=config.layer, k=config.k)

    output = os.path.expanduser(config.output)
    png, html, npz = (Path(f"{output}.{kind}") for kind in ("png", "html", "npz"))
    # One line, for any length and content of the text.
    short = " ".join(text.split())
    title = f"How a GRU reads “{short if len(short) <= 60 else short[:59] + '…'}”"
    try:
        png.parent.mkdir(parents=True, exist_ok=True)
        draw_inspection(found, png, title)
        whole, _ = page({"inspection": page_data(found, str(checkpoint))}, title)
        html.write_text(whole, encoding="utf-8")
        _save(found, npz)
    except OSError as error:
        raise UsageError(f"could not write {config.output}: {error.strerror or error}") from error

    costs = [cost for cost in found.surprise if cost is not None]
    if costs:
        print(
            f"{len(found.tokens)} tokens, {sum(costs) / len(costs):.2f} bits per token on average"
        )
    for t in found.forgets_most:
        token, before = found.tokens[t], "".join(found.tokens[:t])[-12:]
        print(f"forgets {found.forgotten[t]:.0%} of its memory at {token!r} after {before!r}")
    print(f"Picture, page and numbers: {png}, {html}, {npz}")


def run(config: DictConfig, text: str | None) -> None:
    """Runs `triton-gru-inspect`; raises SystemExit on an error."""
    try:
        inspect(config, text)
    except (UsageError, DataError, CheckpointError, InspectionError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
