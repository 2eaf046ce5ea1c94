"""Conversion between torch's modules and ours: type checks, copies of settings and parameters."""

import inspect
from typing import Any, TypeVar

from torch import nn
from torch.nn.utils import parametrize

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def own_type(module: nn.Module) -> type[nn.Module]:
    """The class of a module, without the subclass that a parametrization gives it."""
    return parametrize.type_before_parametrizations(module)


def check_type(module: nn.Module, theirs: type[nn.Module], *ours: type[nn.Module]) -> None:
    """Raises unless the class of module is exactly one of these: a subclass may compute otherwise.

    Raises:
        TypeError: It is none of them.
    """
    if not isinstance(module, nn.Module) or own_type(module) not in (theirs, *ours):
        kind = type(module).__name__
        if isinstance(module, (theirs, *ours)):
            kind += ", a subclass, whose forward may compute something else"
        raise TypeError(f"from_torch expects a torch.nn.{theirs.__name__}, got: {kind}")


def check_computes_the_same(module: nn.Module) -> None:
    """Raises if torch has no module that computes the same.

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
    """The keyword-only arguments of a class of ours, which torch's lacks, with their defaults.

    Each is an attribute of the module by the same name.
    """
    parameters = inspect.signature(ours.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def beyond_torch(module: nn.Module, ours: type[nn.Module]) -> dict[str, Any]:
    """The values that a module has for `defaults`; empty for torch's modules."""
    return {name: getattr(module, name) for name in defaults(ours) if hasattr(module, name)}


def beyond_torch_repr(module: nn.Module, ours: type[nn.Module]) -> str:
    """The part of a repr that lists the arguments beyond torch's that are not at their default."""
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
    """Gives target, made on the meta device, the mode and copies of the parameters of source."""
    for name, _ in list(target.named_parameters()):
        # By attribute, not from source.parameters(): with a parametrization (weight_norm) the
        # attribute is the value, and the parameters are what it is computed from.
        value = getattr(source, name)
        copy = nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad)
        setattr(target, name, copy)
    if isinstance(target, nn.RNNBase):
        target._init_flat_weights()
    return target.train(source.training)
