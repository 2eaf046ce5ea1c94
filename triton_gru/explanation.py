"""What `GRU.explain` and `GRUCell.explain` say."""

from typing import Any

from torch import Tensor, nn

from triton_gru import functional
from triton_gru.backends import choose_backend, explain_plan

CHECKED = (TypeError, ValueError, RuntimeError)  # what a call refuses its arguments with


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
    dtype = functional.compute_dtype(x, x)
    layer = {
        "hidden_size": module.hidden_size,
        "reset_after": module.reset_after,
        "directions": 2 if getattr(module, "bidirectional", False) else 1,
    }
    try:
        choice = choose_backend(
            module.backend,
            device=x.device,
            dtype=dtype,
            **layer,
            **asked,
        )
    except CHECKED as error:
        return refusal(error)
    text = f"Backend {choice.backend!r} will run: {choice.reason}."
    if choice.backend == "triton":
        text += f" Forward: {explain_plan(x.device, dtype, batch_size, **layer)}."
    return text
