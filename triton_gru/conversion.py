"""From torch's modules to ours and back: what may be converted, and what is taken along."""

import inspect
from typing import Any, TypeVar

from torch import nn
from torch.nn.utils import parametrize

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def own_type(module: nn.Module) -> type[nn.Module]:
    """The class of a module, or the one that it had before its tensors were parametrized."""
    return parametrize.type_before_parametrizations(module)


def check_type(module: nn.Module, theirs: type[nn.Module], *ours: type[nn.Module]) -> None:
    """Refuses to take a module for what it may not compute.

    Raises:
        TypeError: module is of none of these classes, exactly.
    """
    if not isinstance(module, nn.Module) or own_type(module) not in (theirs, *ours):
        kind = type(module).__name__
        if isinstance(module, (theirs, *ours)):
            kind += ", a subclass, whose forward may compute something else"
        raise TypeError(f"from_torch expects a torch.nn.{theirs.__name__}, got: {kind}")


def check_computes_the_same(module: nn.Module) -> None:
    """Refuses a module that torch has no counterpart of.

    Raises:
        ValueError: reset_after is False, or there is layer_norm or zoneout.
    """
    if not module.reset_after:
        raise ValueError(
            "to_torch() needs reset_after=True: torch.nn.GRU multiplies the reset gate into "
            "W_hn h + b_hn, so that with these weights it would silently compute another function"
        )
    for name in ("layer_norm", "zoneout"):
        if getattr(module, name, False):
            raise ValueError(
                f"to_torch() needs {name} off: torch.nn.GRU does not have it and would silently "
                "compute another function"
            )


def defaults(ours: type[nn.Module]) -> dict[str, Any]:
    """What a class of ours takes beyond torch's: its keyword-only arguments, with their defaults.

    Each is an attribute of the module by the same name.
    """
    parameters = inspect.signature(ours.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def beyond_torch(module: nn.Module, ours: type[nn.Module]) -> dict[str, Any]:
    """What a module has of `defaults`: nothing if it is one of torch's."""
    return {name: getattr(module, name) for name in defaults(ours) if hasattr(module, name)}


def beyond_torch_repr(module: nn.Module, ours: type[nn.Module]) -> str:
    """The part of a repr that says what of `defaults` was given."""
    usual = defaults(ours)
    given = beyond_torch(module, ours)
    return "".join(f", {name}={v!r}" for name, v in given.items() if v != usual[name])


def settings(module: nn.RNNBase | nn.GRUCell) -> tuple[Any, ...]:
    """The constructor's arguments before device, in order."""
    sizes = (module.input_size, module.hidden_size)
    if isinstance(module, nn.GRUCell):
        return (*sizes, module.bias)
    return (
        *sizes,
        module.num_layers,
        module.bias,
        module.batch_first,
        module.dropout,
        module.bidirectional,
    )


def copy(source: nn.Module, target: ModuleT) -> ModuleT:
    """Gives target, made on the meta device, the mode and parameters of source."""
    for name, _ in list(target.named_parameters()):
        # By attribute and not from source's parameters: a parametrization (weight_norm) has the
        # value there, and the tensors it is computed from elsewhere.
        value = getattr(source, name)
        copy = nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad)
        setattr(target, name, copy)
    if isinstance(target, nn.RNNBase):
        target._init_flat_weights()
    return target.train(source.training)
