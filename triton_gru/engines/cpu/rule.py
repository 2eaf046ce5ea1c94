"""Where "auto" runs the CPU engine in place of ATen: where it was measured to take less time.

`python -m benchmarks.layer_cpu --grid` measures the shapes that these limits come from, with one
and two threads, and fails if the engine takes more than 0.95 of nn.GRU's time in a shape for which
"auto" runs it. benchmarks/NOTES.md has the figures.
"""

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
# With vectors of AVX2 the gates take a larger share: from 2^21 on up to 1.16.
if torch.backends.cpu.get_cpu_capability() == "AVX2":
    PRODUCT[torch.float32] = 2**19
# With few steps nothing is packed. In a wide layer ATen's step reads its weights slowly for some
# numbers of rows; its backward does not.
UNPACKED_STEPS = 4
UNPACKED_ROWS = (4, 16)

DTYPES = tuple(PRODUCT)


def faster(
    dtype: torch.dtype,
    hidden_size: int,
    steps: int | torch.SymInt,
    batch_size: int | torch.SymInt,
    gradients: bool,
) -> bool:
    """Whether the engine is faster than ATen; `gradients`: whether they are enabled."""
    if steps < STEPS:
        few, many = UNPACKED_ROWS
        return bool(
            dtype == torch.float32
            and not gradients
            and steps <= UNPACKED_STEPS
            and hidden_size >= WIDE
            and few <= batch_size <= many
        )
    product = batch_size * hidden_size**2
    most = PRODUCT[dtype]
    if dtype != torch.float32 and product > most:
        return False
    if gradients and batch_size <= FEW_ROWS:
        return True
    if steps * UNITS_A_STEP < hidden_size:
        return False
    if hidden_size > WIDE and steps * batch_size < ROWS_IF_WIDE:
        return False
    return bool(batch_size <= FEW_ROWS or product <= (2 * most if steps >= LONG else most))


def sequences(dtype: torch.dtype, hidden_size: int) -> str:
    """For which inputs `faster` is true, as the end of a sentence."""
    steps = max(STEPS, -(-hidden_size // UNITS_A_STEP))
    most = PRODUCT[dtype] // max(1, hidden_size) ** 2
    twice = dtype == torch.float32 and 2 * most > FEW_ROWS
    if dtype == torch.float32:
        most = max(FEW_ROWS, most)
    text = f"sequences of at least {steps} steps"
    if hidden_size > WIDE:
        text += f" and {ROWS_IF_WIDE} rows in all"
    if most < 1000:
        text += f", with a batch_size of at most {most}"
        if twice:
            text += f", from {LONG} steps on {2 * PRODUCT[dtype] // hidden_size**2}"
    if steps > STEPS or hidden_size > WIDE:
        text += f"; with gradients from {STEPS} steps on at a batch_size of at most {FEW_ROWS}"
    if dtype == torch.float32 and hidden_size >= WIDE:
        few, many = UNPACKED_ROWS
        text += f"; without gradients up to {UNPACKED_STEPS} steps of {few} to {many} rows too"
    return text
