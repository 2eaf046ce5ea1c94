"""Whether "auto" runs the kernels for a call on a GPU that they can compute."""

from collections.abc import Sequence

import torch
from torch import Tensor

from triton_gru.torch_modes import constant_for_dynamo, eager, records
from triton_gru.verdicts import deciding
from triton_gru.verdicts.shapes import SHORT, ShapeClass

# reset_after, device, dtype, hidden_size and directions.
Layer = tuple[bool, torch.device, torch.dtype, int, int]


def faster(
    layer: Layer,
    steps: int | torch.SymInt | None,
    batch_size: int | torch.SymInt,
    tensors: Sequence[Tensor],
    *,
    torch_can: bool,
    holds: bool,
) -> tuple[bool, str]:
    """Whether the kernels are faster by their verdict, and why.

    A graph is valid for every number of steps and rows: the verdicts of all batch sizes decide, and
    no size is read, which would make it a graph for that size.

    Args:
        layer: The properties that do not depend on the call.
        steps: T, or None in a cell.
        batch_size: B.
        tensors: Input, state and parameters.
        torch_can: Whether torch's own GRU computes it. If not, plain torch does, in several
            launches per step: then the kernels must be correct, but need not be faster.
        holds: Whether this is a call, whose decision the process keeps.
    """
    training = records(*tensors)
    # In a trace a size is a tensor, and to compare it would hold it to its value.
    any_steps = torch.jit.is_tracing() or (not eager() and steps is not None and steps != 1)
    if any_steps:
        slower = _slower_in_graphs(layer, training, torch_can, holds)
        return slower is None, slower or "their verdicts say so for every batch size measured"
    if steps is None or steps < SHORT:
        return False, f"the Triton kernels are measured by sequences of at least {SHORT} steps"
    found = deciding.decision(
        layer[1],
        _shape_class(layer, int(batch_size)),
        training,
        holds=holds,
        may_measure=lambda: deciding.may_measure(int(steps), tensors),
    )
    least = _least_steps(found, layer, torch_can)
    if least is None:
        return False, found.why
    if steps < least:
        return False, f"the sequence has fewer than {least} steps: {found.why}"
    return True, found.why


# Constant for Dynamo, which then does not trace how a verdict is found.
@constant_for_dynamo
def _slower_in_graphs(layer: Layer, training: bool, torch_can: bool, holds: bool) -> str | None:
    """Why a graph for all sizes does not use the kernels; None if it does."""
    found = deciding.decision(layer[1], _shape_class(layer, None), training, holds=holds)
    return found.why if _least_steps(found, layer, torch_can) is None else None


def _least_steps(found: deciding.Decision, layer: Layer, torch_can: bool) -> int | None:
    if found.passed and layer[0] and not torch_can:
        return SHORT
    return found.from_steps


def _shape_class(layer: Layer, batch_size: int | None) -> ShapeClass:
    reset_after, _, dtype, hidden_size, directions = layer
    return ShapeClass.of(
        reset_after=reset_after,
        dtype=dtype,
        hidden_size=hidden_size,
        directions=directions,
        batch_size=batch_size,
    )
