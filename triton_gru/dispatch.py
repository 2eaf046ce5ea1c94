"""Which engine computes a layer, and why: `choose_backend`, and `explain` in a sentence."""

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from triton_gru.engines.cpu import rule
from triton_gru.kernel_errors import launch_refusal
from triton_gru.plan.plan import Problem
from triton_gru.plan.tuned import planned
from triton_gru.torch_modes import (
    autocasts,
    constant_for_dynamo,
    eager,
    exporting_to_onnx,
    for_any_steps,
    inside_functional_grad,
    interpreting,
    plain,
    readable,
    transformed,
)
from triton_gru.verdicts import calls

BACKENDS = ("auto", "triton", "cpu", "torch", "reference")

CHECKED = (TypeError, ValueError, RuntimeError)  # what a call refuses its arguments with

# What regularises each step from within: no kernel, ours or torch's, takes it.
INSIDE_A_STEP = {
    "recurrent_dropout": "recurrent_dropout masks the state that enters each step's product",
    "zoneout": "zoneout holds elements of the state from step to step",
    "layer_norm": "layer_norm normalises the gates of each step over all units",
}


class Choice(NamedTuple):
    """A backend's name and, as a sentence, why it runs."""

    backend: str
    reason: str


def check_backend(backend: str, reset_after: bool) -> None:
    """Refuses what no input could make run.

    Raises:
        TypeError: reset_after is no bool.
        ValueError: The backend is unknown, or cannot compute the variant on any device.
    """
    if not isinstance(reset_after, bool):
        raise TypeError(f"reset_after should be of type bool, got: {type(reset_after).__name__}")
    if backend not in BACKENDS:
        raise ValueError(
            f"backend should be one of {', '.join(map(repr, BACKENDS))}, got: {backend!r}"
        )
    if backend == "torch" and not reset_after:
        raise ValueError(
            "backend='torch' computes reset_after=True only, as ATen and cuDNN have no other GRU; "
            "use backend='auto', 'triton' or 'reference' with reset_after=False"
        )


def choose_backend(
    backend: str,
    *,
    reset_after: bool,
    device: torch.device,
    dtype: torch.dtype,
    hidden_size: int,
    directions: int = 1,
    resets: bool = False,
    steps: int | torch.SymInt | None = None,
    batch_size: int | torch.SymInt = 1,
    regularised: Sequence[str] = (),
    tensors: Sequence[Tensor] = (),
    holds: bool = True,
) -> Choice:
    """The backend that computes a layer, and why.

    Args:
        backend: What was asked for.
        reset_after: The variant.
        device: Of the input.
        dtype: What is computed in.
        hidden_size: H.
        directions: D.
        resets: Whether sequences begin inside rows.
        steps: T, or None where it is not known or does not matter, as in a cell.
        batch_size: B.
        regularised: What of INSIDE_A_STEP is at work.
        tensors: Input, state and parameters.
        holds: Whether this is a call: then what "auto" decides from a verdict holds from now on.

    Raises:
        ValueError: As `check_backend`.
        RuntimeError: The backend asked for by name cannot run here, or what traces cannot record
            the layer; the message says why.
    """
    check_backend(backend, reset_after)
    layer = (backend, reset_after, device, dtype, hidden_size, directions, resets)
    on_cpu = device.type == "cpu" and not interpreting()
    if on_cpu and backend != "cpu" and not regularised and eager():
        choice = _choose_on_cpu(*layer)
        # Looked at first, as a short call takes microseconds.
        may = steps is not None and (steps >= rule.STEPS or hidden_size >= rule.WIDE)
        if backend == "auto" and (may or choice.backend == "reference"):
            return _cpu_engine_if_faster(choice, dtype, hidden_size, steps, batch_size, tensors)
        return choice
    tracing = torch.jit.is_tracing()
    if regularised:
        if tracing:
            raise RuntimeError(
                f"torch.jit.trace, and torch.onnx.export with dynamo=False, cannot record "
                f"{regularised[0]}: it acts step by step, and the graph would hold the number of "
                "steps of the example and be wrong for any other. Use torch.export.export, which "
                "checks that number, or torch.onnx.export with dynamo=True"
            )
        why = f"{INSIDE_A_STEP[regularised[0]]}, which only the equations in plain torch do"
        if backend in ("torch", "triton", "cpu"):
            raise RuntimeError(f"backend={backend!r} cannot run: {why}. Use backend='auto'")
        return Choice("reference", why)
    if exporting_to_onnx():
        return Choice("onnx", "torch.onnx.export is tracing, and ONNX has an operator")
    if tracing and torch.onnx.is_in_onnx_export():
        if not reset_after or resets:
            what = "resets" if resets else "reset_after=False"
            raise RuntimeError(
                f"torch.onnx.export with dynamo=False has no operator for {what}; "
                + (
                    "nor has ONNX: give each sequence its own row, with lengths, and export with "
                    "dynamo=True, the default"
                    if resets
                    else "export with dynamo=True, the default"
                )
            )
        return Choice("torch", "torch.onnx.export with dynamo=False knows torch's own GRU only")
    if backend in ("auto", "triton") and transformed():
        return Choice("reference", "vmap and forward-mode derivatives take plain torch")
    if backend == "cpu":
        return _cpu_engine(device, dtype, tensors)
    any_steps = device.type == "cpu" and steps is not None and for_any_steps(steps)
    choice = _choose(*layer, any_steps)
    if backend == "auto" and choice.backend == "reference" and on_cpu and (any_steps or tracing):
        return _cpu_operator(choice, dtype)
    if backend != "auto" or choice.backend != "triton":
        return choice
    torch_obstacle = _torch_obstacle(reset_after, resets, False)
    refused = launch_refusal(device)
    if refused is not None:
        return _without_kernels(refused, torch_obstacle, device, dtype, hidden_size)
    if not _needs_verdict(device):
        return choice
    faster, why = calls.faster(
        layer[1:6], steps, batch_size, tensors, torch_can=torch_obstacle is None, holds=holds
    )
    if faster:
        return Choice("triton", why)
    return _without_kernels(why, torch_obstacle, device, dtype, hidden_size)


def _choose(
    backend: str,
    reset_after: bool,
    device: torch.device,
    dtype: torch.dtype,
    hidden_size: int,
    directions: int,
    resets: bool,
    any_steps: bool = False,
) -> Choice:
    """`choose_backend` where nothing traces, transforms or regularises the layer."""
    torch_obstacle = _torch_obstacle(reset_after, resets, any_steps)
    if backend == "torch" and resets:
        raise RuntimeError(f"backend='torch' cannot run: {torch_obstacle}. Use backend='auto'")
    if backend in ("torch", "reference"):
        return Choice(backend, "it was asked for by name")
    obstacle = _triton_obstacle(device, dtype, hidden_size, reset_after, directions)
    if backend == "triton":
        if obstacle:
            raise RuntimeError(
                f"backend='triton' cannot run: {obstacle}. "
                "Use backend='auto' to take the best that can"
            )
        return Choice("triton", "it was asked for by name")
    if obstacle is None:
        return Choice(
            "triton", f"its kernels take {dtype} at hidden_size={hidden_size} on {device}"
        )
    return _without_kernels(obstacle, torch_obstacle, device, dtype, hidden_size)


def _without_kernels(
    obstacle: str,
    torch_obstacle: str | None,
    device: torch.device,
    dtype: torch.dtype,
    hidden_size: int,
) -> Choice:
    """What "auto" takes where it does not take the kernels."""
    if torch_obstacle is None:
        library = "cuDNN" if device.type == "cuda" else "ATen"
        reason = f"{obstacle}, and torch's own GRU ({library}) computes reset_after=True"
        if device.type == "cpu" and dtype in rule.DTYPES:
            reason += f"; the CPU engine takes {rule.sentence(dtype, hidden_size)}"
        return Choice("torch", reason)
    return Choice("reference", f"{obstacle}, and {torch_obstacle}")


def _cpu_engine_if_faster(
    otherwise: Choice,
    dtype: torch.dtype,
    hidden_size: int,
    steps: int | torch.SymInt | None,
    batch_size: int | torch.SymInt,
    tensors: Sequence[Tensor],
) -> Choice:
    """The CPU engine for "auto", where it can run and takes less time than the other choice."""
    if otherwise.backend == "triton" or dtype not in rule.DTYPES:
        return otherwise
    if otherwise.backend == "torch" and (
        steps is None
        or not rule.faster(dtype, hidden_size, steps, batch_size, torch.is_grad_enabled())
    ):
        return otherwise
    if not plain(tensors, dtype):
        return otherwise
    obstacle = _library_obstacle()
    if obstacle:
        return Choice(otherwise.backend, f"{otherwise.reason}, but {obstacle}")
    slower = "plain torch, and torch has no kernel for this layer"
    if otherwise.backend == "torch":
        slower = f"torch's own GRU (ATen) for {rule.sentence(dtype, hidden_size)}"
    return Choice("cpu", f"the tensors are on a CPU, where its C code is faster than {slower}")


def _cpu_operator(otherwise: Choice, dtype: torch.dtype) -> Choice:
    """The CPU engine in a graph that would hold the equations, for any number of steps."""
    if dtype != torch.float32 or torch.is_autocast_enabled("cpu") or inside_functional_grad():
        return otherwise
    obstacle = _library_obstacle()
    if obstacle:
        return Choice(otherwise.backend, f"{otherwise.reason}, but {obstacle}")
    return Choice(
        "cpu", f"in a graph its C code is one operator for any steps ({otherwise.reason})"
    )


@constant_for_dynamo
def _library_obstacle() -> str | None:
    from triton_gru.engines.cpu import library

    return library.obstacle()


def _cpu_engine(device: torch.device, dtype: torch.dtype, tensors: Sequence[Tensor]) -> Choice:
    """The choice for backend="cpu"."""
    if transformed() or inside_functional_grad():
        return Choice("reference", "torch.func's transforms take plain torch")
    obstacle = None
    if device.type != "cpu":
        obstacle = f"the CPU engine computes on a CPU and the tensors are on {device}"
    elif dtype not in rule.DTYPES:
        obstacle = f"the CPU engine takes torch.float32 and torch.bfloat16, not {dtype}"
    elif eager() and tensors and not readable(tensors, dtype):
        obstacle = (
            f"the CPU engine reads memory: of dense tensors of {dtype} on a CPU, of no subclass, "
            "and in no mode that sees each operator"
        )
    else:
        obstacle = _library_obstacle()
    if obstacle:
        raise RuntimeError(
            f"backend='cpu' cannot run: {obstacle}. Use backend='auto' to take the best that can"
        )
    return Choice("cpu", "it was asked for by name")


# On a CPU nothing else decides, and to decide again took a tenth of a short call.
_choose_on_cpu = functools.lru_cache(_choose)


def _torch_obstacle(reset_after: bool, resets: bool, any_steps: bool) -> str | None:
    """Why "auto" does not take torch's own GRU, as the end of a sentence."""
    if not reset_after:
        return "torch has no kernel for reset_after=False"
    if resets:
        return "torch's own GRU cannot reset its state inside a row"
    if any_steps:
        return "a graph of ATen's holds one number of steps"
    return None


# Constant for Dynamo, which need not trace how a plan is made: none of it depends on the sizes of a
# batch, as more rows are more groups, in further launches if need be.
@constant_for_dynamo
def _triton_obstacle(
    device: torch.device, dtype: torch.dtype, hidden_size: int, reset_after: bool, directions: int
) -> str | None:
    if device.type != "cuda" and not interpreting():
        return f"the Triton kernels need a CUDA GPU and the tensors are on {device}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'triton-gru[triton]')"
    from triton_gru.plan import selection

    return selection.obstacle(
        device=device,
        dtype=dtype,
        batch_size=1,
        hidden_size=hidden_size,
        reset_after=reset_after,
        directions=directions,
    )


def _needs_verdict(device: torch.device) -> bool:
    """Whether "auto" takes the kernels only where they were measured faster."""
    return device.type == "cuda"  # the interpreter is for looking at the kernels


def explain_plan(
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int,
    hidden_size: int,
    reset_after: bool,
    directions: int,
) -> str:
    """How the kernels will compute a layer that they can compute, in a sentence."""
    from triton_gru.plan import selection

    problem = Problem(
        batch_size,
        hidden_size,
        selection.DTYPES[dtype],
        reset_after,
        directions=directions,
        tensor_cores=selection.matrix_precision(dtype) != "ieee",
    )
    return planned(problem, selection.device_limits(device)).describe()


def compute_dtype(x: Tensor, hx: Tensor) -> torch.dtype:
    """The dtype that nn.GRU's output has, in which the recurrence therefore runs.

    Under autocast cuDNN takes and returns autocast's dtype, while ATen on a CPU multiplies in it
    and keeps state and output in the dtype of hx.
    """
    if x.is_cuda and autocasts(x) and x.dtype != torch.float64:
        return torch.get_autocast_dtype("cuda")
    return hx.dtype


def refusal(error: Exception) -> str:
    """That a call would raise this error."""
    return f"No backend will run. {str(error).removesuffix('.')}."


def explain(module: nn.Module, x: Tensor, batch_size: int, **asked: Any) -> str:
    """Which backend a GRU or GRUCell will run, and why.

    Args:
        module: The GRU or GRUCell.
        x: What its input is like.
        batch_size: B.
        asked: What `choose_backend` takes besides the layer.
    """
    dtype = compute_dtype(x, x)
    backend: Any = module.backend
    layer: dict[str, Any] = {
        "hidden_size": module.hidden_size,
        "reset_after": module.reset_after,
        "directions": 2 if getattr(module, "bidirectional", False) else 1,
    }
    try:
        choice = choose_backend(
            backend,
            device=x.device,
            dtype=dtype,
            batch_size=batch_size,
            tensors=(x, *module.parameters()),
            holds=False,
            **layer,
            **asked,
        )
    except CHECKED as error:
        return refusal(error)
    text = f"Backend {choice.backend!r} will run: {choice.reason}."
    if choice.backend == "triton":
        text += f" Forward: {explain_plan(x.device, dtype, batch_size, **layer)}."
    return text
