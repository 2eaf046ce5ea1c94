"""The command `triton-gru-predict`: the likeliest next tokens, and sentences to their end.

With `--serve`, short for `format=web`, as a page that updates during typing, see `serve`.
"""

if __name__ == "__main__":  # python -m, before the imports below, see commands.py
    from lightning_module import commands

    commands.predict()
    raise SystemExit

import io
import json
import sys
from collections.abc import Iterator

from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_module.checkpoints import find_checkpoint, load_predictor
from lightning_module.data.corpora.text import from_argument, read_lines
from lightning_module.data.tokenizers import Tokenizer
from lightning_module.device import find_device
from lightning_module.errors import (
    CheckpointError,
    DataError,
    InspectionError,
    SettingsError,
    UsageError,
)
from lightning_module.generation import NextToken, continue_prompt, next_tokens
from lightning_module.model import SentencePredictor
from lightning_module.serve.server import InspectionServer, serve
from lightning_module.settings.table import SETTINGS


def _prompts(prompt: str | None) -> Iterator[tuple[str, str, DataError | None]]:
    """Prompts, the origin of each, and the error in it or None."""
    if prompt is not None:
        yield from_argument(prompt), "prompt", None
        return
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError('no prompt: give prompt="...", or prompts on standard input, one a line')
    for number, line, error in read_lines(sys.stdin.buffer, "standard input"):
        if line.strip():
            yield line, f"line {number}", error


def _show(console: Console, prompt: str, candidates: list[NextToken], sentences: list[str]) -> None:
    table = Table(box=None, show_header=False, padding=(0, 1))
    for token in candidates:
        bar = "█" * round(30 * token.probability) or "▏"
        table.add_row(escape(repr(token.text)), f"{token.probability:6.1%}", f"[cyan]{bar}[/]")
    console.print(f"[bold]{escape(prompt)}[/]")
    if candidates:
        console.print(table)
    for sentence in sentences:
        console.print(f"[dim]{escape(prompt)}[/]{escape(sentence)}", soft_wrap=True)
        console.print()


def _serve(
    config: DictConfig, model: SentencePredictor, tokenizer: Tokenizer, text: str, checkpoint: str
) -> None:
    SETTINGS["inspect"]["k"].read("k", config.k)
    options = {"checkpoint": checkpoint, "port": config.port, "text": text, "k": config.k}
    try:
        server = InspectionServer(model, tokenizer, **options)
    except OSError as error:
        raise UsageError(
            f"cannot bind port {config.port} ({error.strerror}); port=0 takes one that is free"
        ) from error
    serve(server)


def predict(config: DictConfig, prompt: str | None) -> bool:
    """Answers the prompt, or the lines of standard input; returns whether all could be answered.

    With format=web, serves the page until Ctrl-C.

    Raises:
        UsageError: no prompt, or the device or the port cannot be used.
        SettingsError: the page cannot show so many tokens.
        InspectionError: the model has no gates to show.
        CheckpointError: there is no usable checkpoint.
    """
    checkpoint = find_checkpoint(str(config.checkpoint), str(config.runs))
    model, tokenizer = load_predictor(checkpoint)
    model = model.to(find_device(str(config.device)))
    if config.format == "web":
        _serve(config, model, tokenizer, from_argument(prompt or ""), str(checkpoint))
        return True
    # JSON is UTF-8 (RFC 8259) in every locale; a terminal uses its own encoding.
    as_json = config.format == "json"
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8" if as_json else None, errors="replace")
    console = Console(highlight=False)
    names = ("num_sentences", "max_tokens", "seed", "temperature", "top_p")
    settings = {name: config[name] for name in names}
    all_answered = True
    for text, origin, unreadable in _prompts(prompt):
        try:
            if unreadable is not None:
                raise unreadable
            candidates = next_tokens(model, tokenizer, text, config.k) if config.k else []
            sentences = continue_prompt(model, tokenizer, text, **settings)
        except DataError as error:  # the other prompts can still be answered
            print(f"error: {origin}: {error}", file=sys.stderr)
            all_answered = False
            if config.format == "json":
                print(json.dumps({"prompt": text, "error": str(error)}, ensure_ascii=False))
            continue
        if config.format == "json":
            found = {
                "prompt": text,
                "next": [token._asdict() for token in candidates],
                "continuations": sentences,
            }
            print(json.dumps(found, ensure_ascii=False), flush=True)
        else:
            _show(console, text, candidates, sentences)
    return all_answered


def run(config: DictConfig, prompt: str | None) -> None:
    """Runs `triton-gru-predict`; raises SystemExit on an error."""
    try:
        if not predict(config, prompt):
            raise SystemExit(1)
    except (UsageError, SettingsError, DataError, CheckpointError, InspectionError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
