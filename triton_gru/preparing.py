"""`prepare`: measures the verdicts that the calls of a model need, before the first call."""

import importlib.util
import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from triton_gru.dispatch import compute_dtype
from triton_gru.engines.regularized import inside_a_step
from triton_gru.layer import GRU
from triton_gru.verdicts import checks, deciding, store
from triton_gru.verdicts.environment import environment
from triton_gru.verdicts.measuring import MODES
from triton_gru.verdicts.shapes import ShapeClass, Verdict

log = logging.getLogger(__name__)


def prepare(module: nn.Module, x: Tensor | PackedSequence) -> dict[str, Verdict]:
    """Measures the verdicts for `backend="auto"` on the GPU of x, unless they are stored.

    Each shape class of the layers is checked and timed in its own process, in about half a minute,
    and the result is stored on disk (docs/gpu.md). Nothing is measured if x is not on a GPU. Call
    it before the first call of a layer: a process keeps its decisions until it ends.

    With torch.distributed initialised every rank must call it. Rank 0 measures and all ranks use
    its verdicts, so that all compute the same; if cards differ, the first rank of each kind does.

    Args:
        module: A GRU, or a model with GRUs; those with backend="auto" are measured.
        x: The input of the layers, [T, B, features], [B, T, features] with batch_first, or packed.
            Its batch size, dtype and device determine the classes, as does autocast. A verdict is
            valid for all batch sizes up to the next power of two.

    Returns:
        The verdicts of the classes by name, without those that could not be measured.

    Example:
        >>> prepare(GRU(10, 20), torch.randn(5, 3, 10))  # on a CPU there is nothing to decide
        {}
    """
    device = x.data.device
    measurable = _measurable(device)
    where = environment(device) if measurable else ""
    shapes = _classes(module, x) if measurable else []
    leader = _everyone(where).index(where) == _rank()
    found: dict[str, Verdict] = {}
    error = None
    if leader:
        try:  # the other ranks wait for a result, whatever happens
            found = _verdicts(where, shapes, device)
        except Exception as raised:
            error = raised
    of_leaders = dict(filter(None, _everyone((where, found) if leader else None)))
    if error is not None:
        raise error
    if len(of_leaders) > 1 and _rank() == 0:
        log.warning(
            "the ranks run on different devices or versions (%s): each follows its own verdicts, "
            "and results differ in their last bits from rank to rank",
            "; ".join(of_leaders),
        )
    found = of_leaders[where]
    store.adopt(where, found)
    for shape in shapes:
        for mode in MODES:
            _say_if_too_late(device, shape, mode == "training", found)
    return found


def _measurable(device: torch.device) -> bool:
    """Whether there can be kernels for the device."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and importlib.util.find_spec("triton") is not None
    )


def _classes(module: nn.Module, x: Tensor | PackedSequence) -> list[ShapeClass]:
    """Those of the module's layers, without repetition."""
    found: dict[ShapeClass, None] = {}
    for layer in module.modules():
        if not isinstance(layer, GRU) or layer.backend != "auto":
            continue
        if inside_a_step(0.0, layer.zoneout, layer.layer_norm):  # which no kernel takes
            continue
        if isinstance(x, PackedSequence):
            batch_size = int(x.batch_sizes[0])
        elif x.dim() == 3:
            batch_size = x.shape[0 if layer.batch_first else 1]
        else:
            batch_size = 1
        shape = ShapeClass.of(
            reset_after=layer.reset_after,
            dtype=compute_dtype(x.data, x.data),
            hidden_size=layer.hidden_size,
            directions=2 if layer.bidirectional else 1,
            batch_size=batch_size,
        )
        found[shape] = None
    return list(found)


def _verdicts(where: str, shapes: list[ShapeClass], device: torch.device) -> dict[str, Verdict]:
    """The verdicts of the classes; missing ones are measured."""
    keys = {shape: [shape.key(mode == "training") for mode in MODES] for shape in shapes}
    known = store.known(where)
    missing = [shape for shape, names in keys.items() if not all(name in known for name in names)]
    for shape, outcome in checks.measured(missing, device):
        if not outcome.verdicts:
            log.info("%s was not measured: %s", shape.describe(), outcome.obstacle)
    known = store.known(where)
    return {name: known[name] for names in keys.values() for name in names if name in known}


def _say_if_too_late(
    device: torch.device, shape: ShapeClass, training: bool, found: dict[str, Verdict]
) -> None:
    before = deciding.decided(device, shape, training)
    if before is None or before.from_steps == deciding.judged(shape, training, found).from_steps:
        return
    log.warning(
        "a layer was called before prepare(): in this process the class %s stays with what was "
        "decided then",
        shape.key(training),
    )


def _rank() -> int:
    dist = torch.distributed
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _everyone(value: Any) -> list[Any]:
    """The values of all ranks; collective."""
    dist = torch.distributed
    if not dist.is_available() or not dist.is_initialized():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found
