"""The command `triton-gru-predict`: the likeliest next tokens, and sentences to their end."""

import json
import sys
from collections.abc import Iterator

import hydra
import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_module.checkpoints import CheckpointError, find_checkpoint, load_predictor
from lightning_module.corpora import DataError
from lightning_module.generation import NextToken, continue_prompt, next_tokens
from lightning_module.overrides import quote_arguments
from lightning_module.train import CONFIGS

FORMATS = ("text", "json")


class UsageError(ValueError):
    """A setting outside its range; the message says which and what is allowed."""


def _check(config: DictConfig) -> None:
    if config.format not in FORMATS:
        raise UsageError(f"format must be text or json; got {config.format!r}")
    for name, least, most in (
        ("k", 0, None),
        ("num_sentences", 0, None),
        ("max_tokens", 1, None),
        ("temperature", 0, None),
        ("top_p", 0, 1),
    ):
        value = config[name]
        if (
            not isinstance(value, int | float)
            or value < least
            or (most is not None and value > most)
        ):
            above = f"from {least} to {most}" if most is not None else f"of at least {least}"
            raise UsageError(f"{name} must be a number {above}; got {value!r}")


def _prompts(config: DictConfig) -> Iterator[str]:
    if config.prompt is not None:
        yield str(config.prompt)
        return
    if sys.stdin.isatty():
        raise UsageError('no prompt: give prompt="...", or prompts on standard input, one a line')
    for line in sys.stdin:
        if line.strip():
            yield line.rstrip("\r\n")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"device {name!r} cannot be used here: {str(error).splitlines()[0]}"
        ) from error
    return device


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


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="predict")
def _task(config: DictConfig) -> None:
    try:
        _check(config)
        model, tokenizer = load_predictor(find_checkpoint(config.checkpoint, config.runs))
        model = model.to(_device(config.device))
        console = Console(highlight=False)
        for prompt in _prompts(config):
            candidates = next_tokens(model, tokenizer, prompt, config.k) if config.k else []
            sentences = (
                continue_prompt(
                    model,
                    tokenizer,
                    prompt,
                    num_sentences=config.num_sentences,
                    temperature=config.temperature,
                    top_p=config.top_p,
                    max_tokens=config.max_tokens,
                    seed=config.seed,
                )
                if config.num_sentences
                else []
            )
            if config.format == "json":
                found = {
                    "prompt": prompt,
                    "next": [t._asdict() for t in candidates],
                    "continuations": sentences,
                }
                print(json.dumps(found, ensure_ascii=False), flush=True)
            else:
                _show(console, prompt, candidates, sentences)
    except (UsageError, DataError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def main() -> None:
    """Entry point of `triton-gru-predict`."""
    quote_arguments()
    _task()


if __name__ == "__main__":
    main()
