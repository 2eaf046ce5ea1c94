"""replace_gru(): replaces every `torch.nn.GRU` and `torch.nn.GRUCell` of a model by ours."""

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
    """The result of `replace_gru`; prints as a sentence.

    Attributes:
        swapped: The replaced modules, by each of their names in the model. The empty name is the
            model itself.
        left: The GRUs that were not replaced, by name, with the reason; also those of this package.
    """

    swapped: dict[str, nn.Module]
    left: dict[str, str]

    def undo(self) -> None:
        """Turns the replaced modules back into torch's, with their current parameters.

        Those that are torch's already stay so.

        Raises:
            RuntimeError: The class of a module has changed since, by `fully_shard` for instance.
                No module is changed then.
        """
        changed = [
            f"{name or 'the model itself'} is a {type(module).__name__}"
            for name, module in self.swapped.items()
            if own_type(module) not in (*OURS, *THEIRS)
        ]
        if changed:
            raise RuntimeError(
                f"undo() expects the modules as replace_gru left them, but {', '.join(changed)}; "
                "first undo what changed the class"
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
    """Turns every `torch.nn.GRU` and `torch.nn.GRUCell` of a model into a GRU or GRUCell of ours.

    The modules remain the same objects; only their class changes, as with torch's parametrizations
    and `fully_shard`. So all references to them and to their parameters stay valid: optimizers,
    tied weights, modules used in several places, hooks, weight_norm and other parametrizations,
    requires_grad, the mode, names and `state_dict`.

    Not replaced, and named in the result: subclasses of torch's two, since their forward may differ
    (with `fully_shard`, swap before it); modules whose forward was replaced on the instance;
    modules compiled by TorchScript; and modules of this package, which keep their backend (set
    `module.backend` for another).

    Code of the model that tests `isinstance(module, torch.nn.GRU)` no longer matches them, see
    `GRU`. Such code usually initialises weights: swap after it.

    Args:
        model: Any module, which may be a GRU itself.
        backend: "auto", "triton", "cpu", "torch" or "reference", see `GRU`.

    Returns:
        A `Replacement`: what was replaced and what was not, with `undo()` and `explain()`.

    Raises:
        TypeError: model is not a module.
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
    # A module in several places is changed once and listed by each name.
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
        # torch gave the module its own class, a subclass of the previous one with a property for
        # each parametrized tensor.
        members = dict(vars(type(module)))
        for name in ("__dict__", "__weakref__", "__module__", "__doc__"):
            members.pop(name, None)
        new = type(f"Parametrized{new.__name__}", (new,), members)
    module.__class__ = new


def _attributes_beyond_torch(ours: type[nn.Module], backend: str = "auto") -> dict[str, Any]:
    """The attributes of a module of ours that torch's lacks: the keyword-only ones, at defaults."""
    theirs = THEIRS[ours](1, 1, device="meta")
    return {
        name: value
        for name, value in vars(ours(1, 1, device="meta", backend=backend)).items()
        if name not in vars(theirs)
    }
