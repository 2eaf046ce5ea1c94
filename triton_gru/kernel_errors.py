"""Error reports of the GPU kernels: the words that they write, and the errors raised from them.

A kernel cannot raise. It writes two words, which the host checks at its next call or in `check`.
They are in pinned host memory, to which a GPU writes directly: a check is a read of host memory,
without a copy or a synchronization, and works while a CUDA graph is captured; and they belong to
no graph's memory pool, even if the first call is captured.
"""

import warnings

import torch
from torch import Tensor

from triton_gru.torch_modes import constant_for_dynamo


class KernelError(RuntimeError):
    """A GPU kernel of this package cannot run here, or reported an error."""


class KernelTimeout(KernelError):
    """A program timed out waiting for its group."""


class LaunchRefused(KernelError):
    """The device refused a cooperative launch that its number of multiprocessors allows."""


_words: dict[torch.device, Tensor] = {}
_refused: dict[torch.device, str] = {}


def error_words(device: torch.device) -> Tensor:
    """The error words of a device, [2] int32: 1 + the program that timed out, and its step."""
    if device not in _words:
        _words[device] = torch.zeros(
            2, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda"
        )
    return _words[device]


def check_errors(device: torch.device) -> None:
    """Raises what earlier launches on the device have reported so far; every scan calls this first.

    Raises:
        KernelTimeout: A program timed out; y and gradients of that launch are NaN.
    """
    if device not in _words:
        return
    member, step = _words[device].tolist()
    if member:
        _words[device].zero_()
        raise KernelTimeout(
            f"program {member - 1} of a GRU kernel on {device} timed out waiting for its group at "
            f"step {step}, and its results are NaN. The programs of a group must all be resident: "
            "does another kernel occupy multiprocessors? TRITON_GRU_SM_BUDGET leaves some to it; "
            "backend='torch' needs no groups"
        )


def give_up(device: torch.device, error: LaunchRefused) -> None:
    """Warns once that "auto" runs no kernels on a device from here on, which refused a launch."""
    if device not in _refused:
        _refused[device] = str(error)
        warnings.warn(
            f'backend="auto" runs no Triton kernel from here on: {error}',
            RuntimeWarning,
            stacklevel=2,
        )


@constant_for_dynamo
def launch_refusal(device: torch.device) -> str | None:
    """Why "auto" gave up the kernels on a device, or None."""
    return _refused.get(device)


def check() -> None:
    """Waits for every GPU on which kernels were launched, and raises what they reported.

    The next call of a layer raises it too: `check` is for the last call and for CUDA graphs.

    Raises:
        KernelTimeout: A program timed out; y and gradients of that launch are NaN.

    Example:
        >>> check()  # no kernel has reported an error
    """
    for device in list(_words):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        check_errors(device)
