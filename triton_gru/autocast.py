"""Autocast of the device that a tensor is on, which not every kind of device has."""

import torch
from torch import Tensor

# The kinds that torch.amp.is_autocast_available denies, as a list, because Dynamo of torch 2.11
# does not trace that function. torch.is_autocast_enabled raises for them.
WITHOUT_AUTOCAST = frozenset(
    ["meta", "lazy", "vulkan", "opengl", "opencl", "ideep", "mkldnn", "hip", "ve", "fpga"]
)


def autocasts(x: Tensor) -> bool:
    """Whether products of x run in the dtype of autocast."""
    kind = x.device.type
    return kind not in WITHOUT_AUTOCAST and torch.is_autocast_enabled(kind)


def without_autocast(device: torch.device) -> torch.autocast:
    """Where everything has been cast to one dtype already."""
    return torch.autocast("cpu" if device.type in WITHOUT_AUTOCAST else device.type, enabled=False)
