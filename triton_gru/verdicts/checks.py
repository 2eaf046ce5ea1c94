"""Measures several classes one after the other, and shows the progress."""

import contextlib
import importlib.util
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from triton_gru.verdicts import measuring, store
from triton_gru.verdicts.environment import environment
from triton_gru.verdicts.measuring import DEADLINE, Outcome
from triton_gru.verdicts.shapes import ShapeClass

Measure = Callable[[ShapeClass, torch.device], Outcome]


def measured(
    shapes: Sequence[ShapeClass], device: torch.device, measure: Measure | None = None
) -> list[tuple[ShapeClass, Outcome]]:
    """Measures each class and stores it at once, so that an interrupted check keeps the others."""
    measure = measure or measuring.measure
    found = []
    for shape in progress(shapes):
        outcome = measure(shape, device)
        if outcome.verdicts:
            verdicts = {shape.key(m == "training"): v for m, v in outcome.verdicts.items()}
            store.remember(environment(device), verdicts)
        found.append((shape, outcome))
    return found


def progress(shapes: Sequence[ShapeClass]) -> Iterator[ShapeClass]:
    """Yields the classes; shows each on stderr with the remaining time before it is measured.

    As a bar if rich is installed and stderr is a terminal, else as lines.
    """
    if not shapes:
        return
    begun = time.monotonic()
    bar = sys.stderr.isatty() and importlib.util.find_spec("rich") is not None
    with _bar(len(shapes)) if bar else contextlib.nullcontext(_line) as show:
        for done, shape in enumerate(shapes):
            left = time_left(done, len(shapes), time.monotonic() - begun)
            show(done, f"{done + 1}/{len(shapes)} {shape.describe()}, {left}")
            yield shape
        show(len(shapes), "")


def time_left(done: int, of: int, seconds: float) -> str:
    """The remaining time by the classes done so far; before the first one, the maximum."""
    left = (of - done) * (seconds / done if done else DEADLINE)
    about = f"{left / 60:.0f} min" if left >= 90 else f"{left:.0f} s"
    return f"{'about' if done else 'at most'} {about} left"


def _line(done: int, text: str) -> None:
    if text:
        print(f"checking the Triton kernels: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Callable[[int, str], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

    columns: Iterable = (
        SpinnerColumn(),
        TextColumn("checking the Triton kernels"),
        BarColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("", total=total)
        yield lambda done, text: shown.update(task, completed=done, description=text)
