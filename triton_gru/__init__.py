"""The GRU recurrence as fused Triton kernels, behind the surface of `torch.nn.GRU`."""

from triton_gru.cell import GRUCell
from triton_gru.functional import gru, gru_cell
from triton_gru.kernel_errors import check
from triton_gru.layer import GRU
from triton_gru.preparing import prepare
from triton_gru.replace import replace_gru
from triton_gru.tuning import tune
from triton_gru.version import __version__

__all__ = [
    "GRU",
    "GRUCell",
    "__version__",
    "check",
    "gru",
    "gru_cell",
    "prepare",
    "replace_gru",
    "tune",
]
