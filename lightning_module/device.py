"""The device of the commands that use a trained model."""

import torch

from lightning_module.errors import UsageError


def find_device(name: str) -> torch.device:
    """The device of that name; for "auto" a GPU if there is one, else the CPU.

    Raises:
        UsageError: it cannot be used here.
    """
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"device {name!r} cannot be used here: {str(error).splitlines()[0]}"
        ) from error
    return device
