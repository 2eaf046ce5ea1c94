"""Two tasks that require memory, as next-token prediction: copying and adding.

Both use `SentencePredictor` as text does: the targets are `IGNORE` except where the answer is due.
Without memory a model cannot exceed chance.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_module.data.chunks import IGNORE, Chunk

SYMBOLS = 8  # to copy; the tokens after them are the blank and the mark "now"
COPIED = 3  # symbols per sequence
DIGITS = 10  # to add; a marked digit is the digit + DIGITS


class Task(NamedTuple):
    """A task with one delay per sequence.

    Attributes:
        make: inputs and targets, int64 [T, B], of `delay`, `batch_size` and a generator.
        vocab_size: number of tokens.
        chance: share of right answers without memory.
        shortest: smallest delay that the task allows.
    """

    make: Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]
    vocab_size: int
    chance: float
    shortest: int


def copying(delay: int, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Three random symbols, blanks, a mark: from the mark on, the targets are the symbols in order.

    After Hochreiter and Schmidhuber 1997. A symbol is read `delay` steps before it is due, and
    the sequence is `delay + COPIED` steps long.
    """
    symbols = torch.randint(SYMBOLS, (COPIED, batch_size), generator=generator)
    inputs = torch.full((delay + COPIED, batch_size), SYMBOLS)
    inputs[:COPIED] = symbols
    inputs[delay] = SYMBOLS + 1
    targets = torch.full_like(inputs, IGNORE)
    targets[delay:] = symbols
    return inputs, targets


def adding(delay: int, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A row of `delay` random digits, two of them marked: the target at the end is their sum.

    The adding problem of Hochreiter and Schmidhuber 1997 with digits instead of real numbers,
    so that the answer is one of 19 tokens. The first mark is in the first tenth of the row, the
    second before its middle, so that both are `delay / 2` steps or more before the answer.
    """
    inputs = torch.randint(DIGITS, (delay, batch_size), generator=generator)
    tenth, middle = max(1, delay // 10), max(2, delay // 2)
    marks = torch.stack(
        [
            torch.randint(tenth, (batch_size,), generator=generator),
            torch.randint(tenth, middle, (batch_size,), generator=generator),
        ]
    )
    targets = torch.full_like(inputs, IGNORE)
    targets[-1] = inputs.gather(0, marks).sum(0)
    return inputs.scatter_add(0, marks, torch.full_like(marks, DIGITS)), targets


TASKS = {
    "copy": Task(copying, SYMBOLS + 2, 1 / SYMBOLS, COPIED),
    # The most frequent sum of two digits is 9.
    "adding": Task(adding, 2 * DIGITS, 1 / DIGITS, 3),
}


class Sequences:
    """Batches of a task, each of new sequences: a data loader.

    Args:
        task: one of `TASKS`.
        delay: steps to remember.
        batch_size: B, sequences per batch.
        seed: equal seeds give equal batches.
        batches: number of batches; None for no end.

    Raises:
        ValueError: the delay is too short for the task.
    """

    def __init__(
        self, task: str, delay: int, batch_size: int, seed: int, batches: int | None = None
    ):
        self.task, self.delay, self.batch_size = TASKS[task], delay, batch_size
        self.seed, self.batches = seed, batches
        if delay < self.task.shortest:
            raise ValueError(f"{task} needs a delay of {self.task.shortest} or more; got {delay}")

    def __iter__(self) -> Iterator[Chunk]:
        generator = torch.Generator().manual_seed(self.seed)
        fresh = torch.ones(self.batch_size, dtype=torch.bool)
        made = 0
        while self.batches is None or made < self.batches:
            inputs, targets = self.task.make(self.delay, self.batch_size, generator)
            yield Chunk(inputs, targets, fresh)
            made += 1
