"""Progress bars, and one for reading a text."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

EVERY_SECONDS = 5.0  # between two lines if there is no terminal


def progress_bars(console: Console, transient: bool = False) -> Progress:
    """Bars with percentage and description, one line each; with `transient`, removed at the end.

    A bar with an unknown total moves to and fro.
    """
    percentage = TextColumn("{task.percentage:>3.0f}%")
    return Progress(
        BarColumn(),
        percentage,
        TextColumn("{task.description}", markup=False),
        console=console,
        transient=transient,
    )


@contextmanager
def reading(
    what: str,
    total: int | None,
    log: logging.Logger,
    detail: Callable[[], str] = lambda: "",
    unit: str = "characters",
) -> Iterator[Callable[[int], None]]:
    """Shows how much of a text was read: a bar in a terminal, else a line every few seconds.

    Args:
        what: description of the work.
        total: how much it is; None: unknown.
        log: prints the lines; if it is silenced there is no bar either.
        detail: what to show after the number of `unit`.
        unit: what is counted.

    Yields:
        A function to be called with the number of characters (`unit`) of each piece read.
    """
    console = Console(file=sys.stdout, highlight=False)
    read, next_line = 0, time.monotonic() + EVERY_SECONDS

    def description() -> str:
        return f"{what}: {read:,} {unit}{detail()}"

    if console.is_terminal and log.isEnabledFor(logging.INFO):
        with progress_bars(console, transient=True) as bars:
            bar = bars.add_task(description(), total=total)

            def advance_bar(more: int) -> None:
                nonlocal read
                read += more
                bars.update(bar, completed=read, description=description())

            yield advance_bar
        return

    def advance_lines(more: int) -> None:
        nonlocal read, next_line
        read += more
        if time.monotonic() > next_line:
            next_line = time.monotonic() + EVERY_SECONDS
            log.info("%s%s", description(), f" ({read / total:.0%})" if total else "")

    yield advance_lines
