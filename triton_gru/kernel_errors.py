"""What the GPU kernels report to the host: the words they write, and the errors that come of them.

A kernel cannot raise. It writes two words, and the host looks at them when it is called the next
time, or in `check`. They lie in pinned host memory, which a GPU writes to directly: to look at them
is to read memory, without a copy or a wait, while a CUDA graph is captured too; and no pool of a
graph owns them, whenever the first call comes.
"""

import torch
from torch import Tensor


class KernelError(RuntimeError):
    """What a GPU kernel of this package cannot do here, or reported that it did not do."""


class KernelTimeout(KernelError):
    """A program waited for its group longer than any healthy step takes, and gave up."""


class LaunchRefused(KernelError):
    """The device does not hold a launch's programs at once, though it said it has the room."""


_words: dict[torch.device, Tensor] = {}


def error_words(device: torch.device) -> Tensor:
    """The words that kernels on a device write, [2] int32: 1 + the program, and its step."""
    if device not in _words:
        _words[device] = torch.zeros(
            2, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda"
        )
    return _words[device]


def check_errors(device: torch.device) -> None:
    """Raises what an earlier launch on the device has reported by now; every scan calls this first.

    Raises:
        KernelTimeout: A program gave up waiting; y and gradients of that launch hold NaN.
    """
    if device not in _words:
        return
    member, step = _words[device].tolist()
    if member:
        _words[device].zero_()
        raise KernelTimeout(
            f"program {member - 1} of a GRU kernel on {device} timed out waiting for its group at "
            f"step {step}, gave up and left NaN. The programs of a group must all be resident: is "
            "another kernel occupying multiprocessors? TRITON_GRU_SM_BUDGET leaves it some; "
            "backend='torch' does without groups"
        )


def check() -> None:
    """Waits for every GPU that kernels were launched on, and raises what they reported.

    Without it the next call of a layer raises it, which a last call or a replayed CUDA graph has
    not.

    Raises:
        KernelTimeout: A program gave up waiting; y and gradients of that launch hold NaN.

    Example:
        >>> check()  # no kernel has reported anything
    """
    for device in list(_words):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        check_errors(device)
