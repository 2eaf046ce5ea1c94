"""What torch is doing while a layer is called: autocast, recording, tracing, transforms, exporting.

Asked here alone, because much of it is private to torch and differs between its versions.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import (
    TransformType,
    is_legacy_batchedtensor,
    peek_interpreter_stack,
)
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import forward_ad

# Transforms of torch.func that an autograd.Function stands in the way of.
PLAIN_TORCH_ONLY = {TransformType.Vmap, TransformType.Jvp}

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


def records(*tensors: Tensor | None) -> bool:
    """Whether autograd will record what is computed from them."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def transformed(cotangent: Tensor | None = None) -> bool:
    """Whether vmap or a forward-mode derivative is at work, torch.func's or torch.autograd's."""
    if torch.compiler.is_compiling():
        return False
    if forward_ad._current_level >= 0:
        return True
    if cotangent is not None and is_legacy_batchedtensor(cotangent):
        return True
    if peek_interpreter_stack() is None:
        return False
    kinds = {transform.key() for transform in retrieve_all_functorch_interpreters()}
    return not kinds.isdisjoint(PLAIN_TORCH_ONLY)


def eager() -> bool:
    """Whether nothing traces, compiles or transforms what is computed: the question of most calls.

    One function of the fewest calls, as a short call of a layer is measured in microseconds.
    """
    return (
        not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
        and peek_interpreter_stack() is None
    )


def plain_floats(tensors: Sequence[Tensor]) -> bool:
    """Whether code that reads their memory computes in float32 what torch's operators would.

    Not under autocast, with a subclass of Tensor that brings its own operators (fake, distributed,
    ExpandedWeights) or in a mode that is to see every operator, as torch's FlopCounterMode.
    """
    return (
        len(tensors) > 0
        and not torch.is_autocast_enabled("cpu")
        and torch._C._len_torch_dispatch_stack() == 0
        and all(
            type(t) in (Tensor, nn.Parameter)
            and t.dtype == torch.float32
            and t.layout == torch.strided
            and t.device.type == "cpu"
            for t in tensors
        )
    )


def for_any_steps(steps: int | torch.SymInt) -> bool:
    """Whether a graph is being made that should hold for other numbers of steps as well.

    torch.compile is to trace once for all. torch.export writes torch's own operators, those of each
    step, unless the steps vary; its strict mode cannot tell.
    """
    if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
        return not isinstance(steps, int)
    return torch.compiler.is_compiling()


def exporting_to_onnx() -> bool:
    """Whether torch.onnx.export is tracing, by way of torch.export, as it does by default."""
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


@functools.cache  # as Triton reads it: once. Reading it again took a tenth of a short call
def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def constant_for_dynamo(function: Callable) -> Callable:
    """torch.compiler.assume_constant_result, without its import of torch._dynamo, half a second."""
    marked: Any = function
    marked._dynamo_marked_constant = True  # all that the decorator does, in torch 2.11 to 2.14
    return function
