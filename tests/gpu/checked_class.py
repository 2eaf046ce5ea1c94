"""The process of a check with kernels that are broken on purpose.

`python -m tests.gpu.checked_class KIND REQUEST`: what `triton_gru.class_check` is, but for
`scan_forward`, which is wrong, spins for ever, writes where it may not or takes its time.
"""

import sys
import time

import triton
import triton.language as tl

from triton_gru import class_check
from triton_gru.kernels import forward

scan_forward = forward.scan_forward


@triton.jit
def spin(flag):
    while tl.load(flag, volatile=True) != 0:
        pass


@triton.jit
def write_far_away(pointer):
    tl.store(pointer + (1 << 40), 1.0)


def wrong(gates_x, *others, **options):
    return scan_forward(gates_x * 1.1, *others, **options)


def stuck(gates_x, *others, **options):
    spin[(1,)](gates_x.new_ones(1))
    return scan_forward(gates_x, *others, **options)


def faulty(gates_x, *others, **options):
    write_far_away[(1,)](gates_x.float())
    return scan_forward(gates_x, *others, **options)


def slow(gates_x, *others, **options):
    time.sleep(1e-4 * len(gates_x))
    return scan_forward(gates_x, *others, **options)


if __name__ == "__main__":
    forward.scan_forward = globals()[sys.argv[1]]
    class_check.main(sys.argv[2])
