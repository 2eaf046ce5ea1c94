"""The command `triton-gru-eval`: the loss of a checkpoint on every token of a text."""

if __name__ == "__main__":  # python -m, before the imports below, see commands.py
    from lightning_module import commands

    commands.evaluate()
    raise SystemExit

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from omegaconf import DictConfig

from lightning_module.checkpoints import find_checkpoint, load_predictor
from lightning_module.data.corpora.files import whole_files
from lightning_module.data.datamodule import SentenceDataModule
from lightning_module.data.token_cache import read_split, write_split
from lightning_module.data.tokenizers import Tokenizer
from lightning_module.device import find_device
from lightning_module.errors import CheckpointError, DataError, RunError, SettingsError, UsageError
from lightning_module.lightning_warnings import quiet
from lightning_module.run_directory import resumed
from lightning_module.settings.instantiation import build

FORMATS = ("text", "json")


def evaluate(config: DictConfig) -> dict[str, Any]:
    """Evaluates a checkpoint as its run's validations did: same rows, chunks and precision.

    Args:
        config: composed from `conf/eval.yaml`.

    Returns:
        `checkpoint`, `tokens`, `unknown` (how many of them are `<unk>`), `characters`, and over
        all tokens `loss` (nats per token), `perplexity`, `bits_per_char`, `top1` and `top5`.

    Raises:
        UsageError: a setting is out of range.
        CheckpointError: there is no usable checkpoint.
        RunError: the settings of its run cannot be used.
        DataError: the text cannot be used.
    """
    if config.format not in FORMATS:
        raise UsageError(f"format must be text or json; got {config.format!r}")
    device = find_device(str(config.device))
    checkpoint = find_checkpoint(str(config.checkpoint), str(config.runs))
    model, tokenizer = load_predictor(checkpoint)
    settings, _ = resumed(str(checkpoint), [f"trust=[{','.join(config.trust)}]"])
    data = build("data", settings.data, tokenizer=build("tokenizer", settings.tokenizer))
    with tempfile.TemporaryDirectory(prefix="triton_gru-eval-") as folder:
        if config.data.paths is None:
            _own_text(data, tokenizer, checkpoint)
        else:
            _read_files(data, tokenizer, config.data.paths, Path(folder))
        model.hparams["chars_per_token"] = data.chars_per_token
        trainer = L.Trainer(
            accelerator=device.type,
            devices=1 if device.index is None else [device.index],
            precision=settings.trainer.precision,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=sys.stdout.isatty(),
            callbacks=[RichProgressBar(leave=False)] if sys.stdout.isatty() else [],
        )
        judged = trainer.test(model, data.val_dataloader(), verbose=False)[0]
        tokens = data.val.tokens
        return {
            "checkpoint": str(checkpoint),
            "tokens": tokens.tokens,
            "unknown": tokens.unknown,
            "characters": tokens.characters,
            **{name.removeprefix("test_"): value for name, value in judged.items()},
        }


def _own_text(data: SentenceDataModule, tokenizer: Tokenizer, checkpoint: Path) -> None:
    data.prepare_data()
    data.setup()
    if data.tokenizer.fingerprint != tokenizer.fingerprint:
        raise CheckpointError(
            f"the text that {checkpoint} was trained on has changed, and so would its "
            "tokens. Restore it, or name other text: 'data.paths=[...]'"
        )


def _read_files(data: SentenceDataModule, tokenizer: Tokenizer, paths: Any, folder: Path) -> None:
    data.tokenizer = tokenizer
    about = write_split(folder, "val", whole_files(paths), tokenizer)
    if not about["tokens"]:
        raise DataError("the files of data.paths have no text")
    (folder / "about.json").write_text(json.dumps({"val": about}))
    data.val = data.validation_chunks(read_split(folder, "val", tokenizer.doc_id))


def run(config: DictConfig) -> None:
    """Runs `triton-gru-eval`; raises SystemExit on an error."""
    quiet()
    try:
        found = evaluate(config)
    except (UsageError, SettingsError, DataError, CheckpointError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    if config.format == "json":
        print(json.dumps(found, ensure_ascii=False))
        return
    print(found["checkpoint"])
    unknown = found["unknown"] / found["tokens"]
    print(
        f"{found['characters']:,} characters = {found['tokens']:,} tokens ({unknown:.2%} <unk>)\n"
        f"{found['loss']:.4f} nats per token, perplexity {found['perplexity']:.2f}, "
        f"{found['bits_per_char']:.3f} bits per character, "
        f"next token right {found['top1']:.1%} (top 5: {found['top5']:.1%})"
    )
