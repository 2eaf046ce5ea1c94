"""Whether "auto" takes the kernels for a call on a GPU: what their verdict says, once a process."""

import logging
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from triton_gru.verdicts import measuring, store
from triton_gru.verdicts.environment import environment
from triton_gru.verdicts.shapes import SHORT, ShapeClass, Verdict

log = logging.getLogger(__name__)

CHECK = "python -m triton_gru check"
# TRITON_GRU_CHECK=first_use measures at a call of at least so many steps: short ones are tests of
# a model, warm-up or decoding, whose class a program may never use again.
FIRST_USE = "first_use"
FIRST_USE_STEPS = 64


class Decision(NamedTuple):
    """What a verdict says of a class.

    Attributes:
        from_steps: The least number of steps for which the kernels are taken; None: for none.
        passed: Whether they compute it correctly, be they faster or not.
        why: The reason, without a full stop.
    """

    from_steps: int | None
    passed: bool
    why: str


# A class that was decided stays so for the life of a process: bits that change between one step of
# a training and the next, and graphs that were made before and after, would be hard to explain.
_decided: dict[tuple[torch.device, ShapeClass, bool], Decision] = {}
_told: set[torch.device] = set()


def decision(
    device: torch.device,
    shape: ShapeClass,
    training: bool,
    *,
    holds: bool,
    may_measure: Callable[[], bool] = lambda: False,
) -> Decision:
    """What holds for a class.

    Args:
        device: A GPU.
        shape: The class; without a batch, for every batch size.
        training: Whether gradients are recorded.
        holds: Whether this is a call, whose decision stays; else somebody asks.
        may_measure: Whether a class without a verdict may be measured now.
    """
    known = _decided.get((device, shape, training))
    if known is not None:
        return known
    where = environment(device)
    found = store.known(where)
    if holds and shape.key(training) not in found and may_measure():
        log.info("measuring the Triton kernels once (TRITON_GRU_CHECK): %s", shape.describe())
        outcome = measuring.measure(shape, device)
        if outcome.verdicts:
            found = {shape.key(m == "training"): v for m, v in outcome.verdicts.items()}
            store.remember(where, found)
        else:
            log.warning("not measured: %s", outcome.obstacle)
    result = judged(shape, training, found)
    if holds:
        _decided[device, shape, training] = result
        if not result.passed and device not in _told:
            _told.add(device)
            log.info('backend="auto" runs no Triton kernel on %s: %s', device, result.why)
    return result


def decided(device: torch.device, shape: ShapeClass, training: bool) -> Decision | None:
    """What calls of a class in this process stay with; None if there were none."""
    return _decided.get((device, shape, training))


def judged(shape: ShapeClass, training: bool, found: dict[str, Verdict]) -> Decision:
    """What verdicts say of a class; of every batch size, what all of them say."""
    key = shape.key(training)
    own = [v for k, v in found.items() if (k == key if shape.batch else k.startswith(key))]
    if not own:
        return Decision(
            None,
            False,
            f"the Triton kernels have not been measured on this GPU ({shape.command()})",
        )
    failed = next((verdict for verdict in own if verdict.failure), None)
    if failed is not None:
        return Decision(
            None,
            False,
            f"the Triton kernels failed their check on this GPU on {failed.day} ({failed.failure}; "
            f"check again: {shape.command()})",
        )
    slowest = max(own, key=lambda verdict: verdict.kernel_step_us / (verdict.other_step_us or 1e-9))
    steps = [verdict.from_steps for verdict in own]
    from_steps = None if None in steps else max(n for n in steps if n is not None)
    what = "forward and backward" if training else "forward"
    why = (
        f"measured on this GPU on {slowest.day}, a step of {what} takes the Triton kernels "
        f"{slowest.kernel_step_us:.2f} us and {shape.competitor} {slowest.other_step_us:.2f} us"
    )
    if from_steps is not None and from_steps > SHORT:
        why += f", with the launch less from {from_steps} steps on"
    return Decision(from_steps, True, f"{why} (measure again: {shape.command()})")


def may_measure(steps: int, tensors: Sequence[Tensor]) -> bool:
    """Whether TRITON_GRU_CHECK=first_use asks for a measurement at a call of eager code.

    Not while a CUDA graph is captured, where a wait of a minute or another process on the device
    has no place, nor where results are to be the same in each run or on each rank. What traces,
    compiles, exports or transforms is not eager: there `calls.faster` does not ask.

    Raises:
        ValueError: The variable holds something else.
    """
    asked = os.environ.get("TRITON_GRU_CHECK")
    if not asked:
        return False
    if asked != FIRST_USE:
        raise ValueError(f"TRITON_GRU_CHECK should be {FIRST_USE!r} or not set, got: {asked!r}")
    dist = torch.distributed
    return (
        steps >= FIRST_USE_STEPS
        and torch._C._len_torch_dispatch_stack() == 0
        and all(type(t) in (Tensor, nn.Parameter) for t in tensors)
        and not torch.are_deterministic_algorithms_enabled()
        and not (dist.is_available() and dist.is_initialized())
        and not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
    )
