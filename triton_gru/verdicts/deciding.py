"""Whether "auto" runs the kernels for a call on a GPU: by their verdict, once per process."""

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
    """The decision for a class by its verdicts.

    Attributes:
        from_steps: The least number of steps for which the kernels run; None: they never do.
        passed: Whether they compute it correctly, faster or not.
        why: The reason, without a full stop.
    """

    from_steps: int | None
    passed: bool
    why: str


# A process keeps its decision for a class: otherwise bits would change between two steps of a
# training, and graphs made before and after would differ.
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
    """The decision for a class.

    Args:
        device: A GPU.
        shape: The class; without a batch, for every batch size.
        training: Whether gradients are recorded.
        holds: Whether this is a call, whose decision is kept; else it is only a query.
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
    """The decision that calls of a class in this process keep; None if there was no call."""
    return _decided.get((device, shape, training))


def judged(shape: ShapeClass, training: bool, found: dict[str, Verdict]) -> Decision:
    """The decision by the verdicts of a class; for every batch size, by all of them."""
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
    """Whether TRITON_GRU_CHECK=first_use is set and a call of eager code may measure now.

    Not while a CUDA graph is captured, which allows neither a wait of a minute nor another process
    on the device, nor if results must be equal in each run or on each rank. Calls that are traced,
    compiled, exported or transformed are not eager: `calls.faster` does not call this for them.

    Raises:
        ValueError: The variable has another value.
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
