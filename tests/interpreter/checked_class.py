"""What `triton_gru.class_check` is on a GPU, in the interpreter: the process of a check.

`python -m tests.interpreter.checked_class KIND REQUEST`. The clock is a stub.
"""

import ctypes
import sys
from functools import partial

from tests.interpreter import harness
from triton_gru import class_check
from triton_gru.kernels import forward

SECONDS = {"triton": 1e-3, "reference": 3e-3, "torch": 2e-3}


def stub_clock(call) -> float:
    """Seconds by the backend of the module that the call is of, the same for each of its steps."""
    module, x = call.args[:2]
    return SECONDS[getattr(module, "backend", "torch")] * len(x)


def main(kind: str, request: str) -> None:
    harness.install()
    class_check.STEPS = 4
    if kind == "crashes":
        forward.scan_forward = lambda *a, **k: ctypes.string_at(0)
    if kind == "no_kernel":
        from triton_gru.kernels import trial

        trial._store_one = None
    class_check.main(request, partial(class_check.checked, timer=stub_clock))


if __name__ == "__main__":
    main(*sys.argv[1:])
