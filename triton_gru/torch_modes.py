"""The state of torch during a call: autocast, grad mode, tracing, torch.func transforms, export.

All these queries are in this module, as many use torch's private API, which changes with versions.
"""

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

# Transforms of torch.func that cannot pass an autograd.Function.
PLAIN_TORCH_ONLY = {TransformType.Vmap, TransformType.Jvp}

# Device types for which torch.amp.is_autocast_available is False, as a list, because Dynamo of
# torch 2.11 does not trace that function. torch.is_autocast_enabled raises for them.
WITHOUT_AUTOCAST = frozenset(
    ["meta", "lazy", "vulkan", "opengl", "opencl", "ideep", "mkldnn", "hip", "ve", "fpga"]
)


def autocasts(x: Tensor) -> bool:
    """Whether products of x run in the dtype of autocast."""
    kind = x.device.type
    return kind not in WITHOUT_AUTOCAST and torch.is_autocast_enabled(kind)


def without_autocast(device: torch.device) -> torch.autocast:
    """A context without autocast, for tensors that already have one dtype."""
    return torch.autocast("cpu" if device.type in WITHOUT_AUTOCAST else device.type, enabled=False)


def records(*tensors: Tensor | None) -> bool:
    """Whether autograd will record operations on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def transformed(cotangent: Tensor | None = None) -> bool:
    """Whether vmap or a forward-mode derivative is active, torch.func's or torch.autograd's."""
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
    """Whether nothing traces, compiles or transforms the call, as in most calls.

    One function with few calls inside, as a short call of a layer takes microseconds.
    """
    return (
        not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
        and peek_interpreter_stack() is None
    )


def plain(tensors: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether code that reads the memory of these tensors computes what torch's operators would.

    Not under autocast, nor if they are not `readable`.
    """
    return len(tensors) > 0 and not torch.is_autocast_enabled("cpu") and readable(tensors, dtype)


def readable(tensors: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether the memory of these tensors may be read in place of calling torch's operators.

    Not with a subclass of Tensor that has its own operators (fake, distributed, ExpandedWeights) or
    in a mode that observes every operator, such as torch's FlopCounterMode.
    """
    return torch._C._len_torch_dispatch_stack() == 0 and all(
        type(t) in (Tensor, nn.Parameter)
        and t.dtype == dtype
        and t.layout == torch.strided
        and t.device.type == "cpu"
        for t in tensors
    )


def for_any_steps(steps: int | torch.SymInt) -> bool:
    """Whether the graph being made must hold for other numbers of steps too.

    torch.compile traces once for all of them. torch.export writes torch's own operators, those of
    each step, unless the number of steps is dynamic; its strict mode does not show whether it is.
    """
    if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
        return not isinstance(steps, int)
    return torch.compiler.is_compiling()


def exporting_to_onnx() -> bool:
    """Whether torch.onnx.export is tracing by torch.export, its default."""
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def constant_for_dynamo(function: Callable) -> Callable:
    """torch.compiler.assume_constant_result without importing torch._dynamo, which takes 0.5 s."""
    marked: Any = function
    marked._dynamo_marked_constant = True  # all that the decorator does, in torch 2.11 to 2.14
    return function


@constant_for_dynamo
def inside_functional_grad() -> bool:
    """Whether torch.func.grad (or functionalize) is active, also while a graph is recorded.

    torch.compile cannot record an operator with a registered derivative there.
    """
    if peek_interpreter_stack() is None:
        return False
    kinds = {transform.key() for transform in retrieve_all_functorch_interpreters()}
    return not kinds.isdisjoint({TransformType.Grad, TransformType.Functionalize})


_interpreting: bool | None = None


@constant_for_dynamo
def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, on a CPU.

    Read once, as Triton does: reading it again took a tenth of a short call. Not with
    functools.cache, of which torch.compile would warn every user.
    """
    global _interpreting
    if _interpreting is None:
        _interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    return _interpreting
