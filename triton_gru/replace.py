"""replace_gru(): every `torch.nn.GRU` and `torch.nn.GRUCell` inside a model becomes ours."""

import dataclasses
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from triton_gru.cell import GRUCell
from triton_gru.conversion import own_type
from triton_gru.layer import GRU

OURS: dict[type[nn.Module], type[nn.Module]] = {nn.GRU: GRU, nn.GRUCell: GRUCell}
THEIRS = {ours: theirs for theirs, ours in OURS.items()}


@dataclasses.dataclass(frozen=True)
class Replacement:
    """What `replace_gru` did to a model; prints as a sentence.

    Attributes:
        swapped: The modules that are ours now, by each of their names in the model. The empty name
            is the model itself.
        left: GRUs that were left alone, by name, and why; those that were ours before as well.
    """

    swapped: dict[str, nn.Module]
    left: dict[str, str]

    def undo(self) -> None:
        """Makes the swapped modules torch's again, with the parameters that they have by then.

        Those that are torch's already stay so.

        Raises:
            RuntimeError: A module has got another class since, from `fully_shard` for instance.
                Nothing is undone then.
        """
        changed = [
            f"{name or 'the model itself'} is a {type(module).__name__}"
            for name, module in self.swapped.items()
            if own_type(module) not in (*OURS, *THEIRS)
        ]
        if changed:
            raise RuntimeError(
                f"undo() expects the modules as replace_gru left them, but {', '.join(changed)}; "
                "undo first what changed that since"
            )
        for module in self.swapped.values():
            ours = own_type(module)
            if ours in THEIRS:
                for name in _attributes_beyond_torch(ours):
                    delattr(module, name)
                _change_class(module, THEIRS[ours])

    def explain(self) -> dict[str, str]:
        """Which backend will run and why, for each swapped module by name; see `GRU.explain`."""
        return {
            name: cast("GRU | GRUCell", module).explain() for name, module in self.swapped.items()
        }

    def __str__(self) -> str:
        names = ", ".join(name or "the model itself" for name in self.swapped)
        text = f"Swapped for triton_gru's: {names or 'nothing'}."
        if self.left:
            left = [f"{name or 'the model itself'} ({why})" for name, why in self.left.items()]
            text += f" Left alone: {'; '.join(left)}."
        return text


def replace_gru(model: nn.Module, *, backend: str = "auto") -> Replacement:
    """Makes every `torch.nn.GRU` and `torch.nn.GRUCell` inside a model a GRU and GRUCell of ours.

    The modules stay the objects that they are and only change their class, as with torch's own
    parametrizations and `fully_shard`. Hence everything that refers to them or to their parameters
    goes on to hold: optimizers, tied weights, modules used in several places, hooks, weight_norm
    and other parametrizations, requires_grad, the mode, names and `state_dict`.

    Left alone and named in the result: subclasses of torch's two, since their forward may be
    another (with `fully_shard`, swap before it); modules whose forward was replaced on the
    instance; what TorchScript has compiled; and modules that are ours already, with the backend
    that they have (set `module.backend` for another).

    Code of the model that asks for `isinstance(module, torch.nn.GRU)` no longer finds them, see
    `GRU`; a swap after initialisation leaves out the usual place of such code.

    Args:
        model: Any module, which may be a GRU itself.
        backend: "auto", "triton", "cpu", "torch" or "reference", see `GRU`.

    Returns:
        What was swapped and what was left, which prints, with `undo()` and `explain()`.

    Raises:
        TypeError: model is no module.
        ValueError: The backend is unknown.

    Example:
        >>> model = nn.ModuleDict({"encoder": nn.GRU(3, 5), "output": nn.Linear(5, 2)})
        >>> print(replace_gru(model))
        Swapped for triton_gru's: encoder.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"replace_gru expects a torch.nn.Module, got: {type(model).__name__}")
    attributes = {ours: _attributes_beyond_torch(ours, backend) for ours in THEIRS}
    swapped, left = {}, {}
    # A module in several places is changed once and named in each.
    for name, module in list(model.named_modules(remove_duplicate=False)):
        reason = _reason_to_leave(module)
        if reason:
            left[name] = reason
        elif own_type(module) in OURS:
            swapped[name] = module
    for module in swapped.values():
        if own_type(module) in OURS:
            ours = OURS[own_type(module)]
            _change_class(module, ours)
            vars(module).update(attributes[ours])
    return Replacement(swapped, left)


def _reason_to_leave(module: nn.Module) -> str | None:
    if isinstance(module, torch.jit.ScriptModule):
        if module.original_name in {theirs.__name__ for theirs in OURS}:
            return "compiled by TorchScript"
    elif isinstance(module, tuple(THEIRS)):
        return f"already ours, backend={module.backend!r}"
    elif isinstance(module, tuple(OURS)):
        if own_type(module) not in OURS:
            cls = type(module)
            return f"{cls.__module__}.{cls.__qualname__}, a subclass, whose forward may be another"
        if "forward" in vars(module):
            return "its forward was replaced on the instance"
    return None


def _change_class(module: nn.Module, new: type[nn.Module]) -> None:
    if parametrize.is_parametrized(module):
        # torch gave the module a class of its own, a subclass of the one before, which holds a
        # property for each parametrized tensor.
        members = dict(vars(type(module)))
        for name in ("__dict__", "__weakref__", "__module__", "__doc__"):
            members.pop(name, None)
        new = type(f"Parametrized{new.__name__}", (new,), members)
    module.__class__ = new


def _attributes_beyond_torch(ours: type[nn.Module], backend: str = "auto") -> dict[str, Any]:
    """What a module of ours holds and one of torch's does not: the keywords, at their defaults."""
    theirs = THEIRS[ours](1, 1, device="meta")
    return {
        name: value
        for name, value in vars(ours(1, 1, device="meta", backend=backend)).items()
        if name not in vars(theirs)
    }
