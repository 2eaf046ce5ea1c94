"""How far two computations of the same thing may lie apart, by dtype: stated here, once.

Equal bits (torch.equal) may be asked for only where the same operation runs twice on the same
shapes and strides, with the same number of threads: a repetition, a resumed run, another
interleaving; and of what is copied or drawn and not computed. Two ways to one result (a layer and
its cell, a step and a sequence, a padded and a packed row) take their sums in another order on
another CPU, even where they agree to the bit on this one: `make cpus` shows it.
"""

import torch
from torch import Tensor

from triton_gru.verdicts.tolerances import SINGLE
from triton_gru.verdicts.tolerances import TOLERANCE as TOLERANCE_OF_CHECK

# States lie within -1 and 1, the tests' gradients within about 100. float64 and float32 leave room
# for thousands of roundings, which a wrong term exceeds by orders of magnitude; 16-bit dtypes round
# the state itself at every step and leave room for about ten.
TOLERANCE = {
    torch.float64: {"rtol": 1e-11, "atol": 1e-12},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.float16: {"rtol": 1e-2, "atol": 1e-2},
    torch.bfloat16: {"rtol": 8e-2, "atol": 8e-2},
}


def assert_close(actual, expected, *, dtype: torch.dtype | None = None, **options) -> None:
    """Compares tensors or sequences of them within the tolerance of dtype, by default their own.

    Options are of torch.testing.assert_close.
    """
    first = actual if isinstance(actual, Tensor) else actual[0]
    torch.testing.assert_close(actual, expected, **TOLERANCE[dtype or first.dtype], **options)


# Compiled kernels in the machine of tests/ptx, by precision: largest error as a share of the
# largest value of the exact result. 16-bit: a third of what the interpreter's tests allow; the
# largest error seen is a third of that again. float32: the error of ex2.approx and div.full too.
# Without a sum, at hidden_size 1, no roundings cancel: twice as much there.
PTX_TOLERANCE = {"bf16": 1e-2, "fp16": 1.3e-3, "tf32": 1.3e-3, "ieee": 5e-6}


def ptx_tolerance(precision: str, hidden_size: int) -> float:
    return PTX_TOLERANCE[precision] * (2 if hidden_size == 1 else 1)


# Kernels in Triton's interpreter.
# Largest error as a share of the largest value of the exact result. For float32 a few units in the
# last place of sums over H <= 130 terms and T <= 5 steps; 16-bit results are rounded at every step
# (2^-9 and 2^-12 of a value), and the gradients are sums over T * B such terms; tf32 keeps 10 bits.
INTERPRETER_TOLERANCE = {
    torch.float32: 5e-6,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
    "tf32": 4e-3,
}

# Kernels on a GPU: those of the check that users run, which come with the package.
GPU_TOLERANCE, GPU_SINGLE = TOLERANCE_OF_CHECK, SINGLE

# Whole models with GRU in place of nn.GRU: as a share of the largest element, in float64. They are
# some ten layers deep.
MODEL_TOLERANCE = 1e-10
