"""Where "auto" runs the CPU engine in place of ATen: where it was measured to take less time.

benchmarks/NOTES.md has the figures. `python -m benchmarks.layer_cpu --grid` measures float32 again
with one and two threads, and names the shapes for which "auto" runs the engine and the engine takes
more than 0.95 of nn.GRU's time.
"""

import functools
from typing import NamedTuple

import torch

# The engine packs the weights at each call, H^2 numbers that as many products use as there are
# steps, in the backward too. With few rows ATen's backward is the slower part by far: it pays with
# gradients even if the forward alone does not.
STEPS = 16
UNITS_A_STEP = 16  # hidden_size for each step, at most
FEW_ROWS = 8
# In a layer above WIDE the products with few rows wait for memory in either, and rows in all (steps
# times batch size) have to pay for the packing.
WIDE = 512
ROWS_IF_WIDE = 512
# Where a step's product is large, batch_size H^2, with more than a few rows, MKL's own is as fast
# on Intel CPUs, and in bfloat16, which the engine computes in float32, much faster. Twice the size
# in float32 from LONG steps on: at 16 steps H 256, B 128 took .87 to 1.04, from 32 on .75 to .95.
PRODUCT = {torch.float32: 2**22, torch.bfloat16: 2**19}
LONG = 32
# With vectors of AVX2 the gates take a larger share: products of 2^19 and 2^20 took up to .88, of
# 2^21 up to 1.15, with MKL on its Intel path.
if torch.backends.cpu.get_cpu_capability() == "AVX2":
    PRODUCT[torch.float32] = 2**19
# With few steps nothing is packed. In a wide layer ATen's step reads its weights slowly for some
# numbers of rows; its backward does not.
UNPACKED_STEPS = 4
UNPACKED_ROWS = (4, 16)

DTYPES = tuple(PRODUCT)


class Range(NamedTuple):
    """Inputs of steps and batch sizes between two numbers, and of at least `rows` in all."""

    steps: tuple[int, int | None]
    batch_size: tuple[int, int]
    rows: int = 0

    def __str__(self) -> str:
        text = "{0} to {1} steps" if self.steps[1] else "at least {0} steps"
        text = text.format(*self.steps)
        if self.rows:
            text += f" and {self.rows} rows in all"
        low, high = self.batch_size
        return text + f" with a batch_size {f'of {low} to' if low else 'up to'} {high}"


@functools.lru_cache
def ranges(dtype: torch.dtype, hidden_size: int, gradients: bool) -> list[Range]:
    """Where the engine is faster than ATen; `gradients`: whether they are enabled."""
    few = FEW_ROWS if dtype == torch.float32 else 0
    product = PRODUCT[dtype]
    large = max(few, product // max(1, hidden_size) ** 2)
    steps = max(STEPS, -(-hidden_size // UNITS_A_STEP))
    rows = ROWS_IF_WIDE if hidden_size > WIDE else 0
    found = [Range((steps, None), (0, large), rows)]
    if dtype == torch.float32:
        larger = max(few, 2 * product // max(1, hidden_size) ** 2)
        longer = Range((max(steps, LONG), None), (0, larger), rows)
        found = [longer] if steps >= LONG else [*found, longer]
    if gradients and (steps > STEPS or rows):
        found.append(Range((STEPS, None), (0, min(FEW_ROWS, large))))
    if not gradients and dtype == torch.float32 and hidden_size >= WIDE:
        found.append(Range((1, UNPACKED_STEPS), UNPACKED_ROWS))
    return [r for r in found if r.batch_size[1]]


def faster(
    dtype: torch.dtype,
    hidden_size: int,
    steps: int | torch.SymInt,
    batch_size: int | torch.SymInt,
    gradients: bool,
) -> bool:
    """Whether one of the `ranges` has this input."""
    return any(
        least <= steps
        and (most is None or steps <= most)
        and low <= batch_size <= high
        and rows <= steps * batch_size
        for (least, most), (low, high), rows in ranges(dtype, hidden_size, gradients)
    )


def sentence(dtype: torch.dtype, hidden_size: int) -> str:
    """The `ranges` in words."""
    with_gradients, without = (
        ", or ".join(map(str, ranges(dtype, hidden_size, gradients))) or "no input"
        for gradients in (True, False)
    )
    if with_gradients == without:
        return without
    return f"{with_gradients} (without gradients: {without})"
