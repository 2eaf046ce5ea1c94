"""GRUCell: `torch.nn.GRUCell` with a choice of variant and backend."""

import numbers
from typing import Any

import torch
from torch import Tensor, nn

from triton_gru import conversion, functional
from triton_gru.dispatch import CHECKED, check_backend, explain, refusal
from triton_gru.validation import check_cell


class GRUCell(nn.GRUCell):
    """One step of a gated recurrent unit: a subclass of and replacement for `torch.nn.GRUCell`.

    Args:
        input_size: Features of the input.
        hidden_size: Features of the state.
        bias: Whether the products have biases.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        reset_after: Where the reset gate acts, see `GRU`.
        backend: "auto", "triton", "cpu", "torch" or "reference", see `GRU`.

    Raises:
        TypeError: A size or reset_after is of the wrong type.
        ValueError: A size is negative, or the backend is unknown or cannot compute the variant.

    Example:
        >>> cell = GRUCell(10, 20)
        >>> h = cell(torch.randn(3, 10))
        >>> cell(torch.randn(3, 10), h).shape
        torch.Size([3, 20])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        reset_after: bool = True,
        backend: str = "auto",
    ) -> None:
        check_backend(backend, reset_after)
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
            if not isinstance(size, numbers.Integral):
                raise TypeError(f"{name} should be of type int, got: {type(size).__name__}")
            if size < 0:  # torch.nn.GRUCell takes 0, and torch.nn.GRU does not
                raise ValueError(f"{name} must not be negative, got: {size}")
        super().__init__(input_size, hidden_size, bias, device, dtype)
        self.reset_after = reset_after
        self.backend = backend

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """The state after one step, [B, H] or [H].

        Args:
            input: [B, I], or [I] for one row.
            hx: The state before the step, [B, H] or [H]. None means zeros.

        Raises:
            TypeError, ValueError, RuntimeError: As `functional.gru_cell`.
        """
        return functional.gru_cell(
            input,
            hx,
            self.weight_ih,
            self.weight_hh,
            self.bias_ih,
            self.bias_hh,
            reset_after=self.reset_after,
            backend=self.backend,
        )

    def explain(self, input: Tensor | None = None) -> str:
        """Which backend will run, and why.

        Args:
            input: As for forward. None means one row with the dtype and device of the weights.
        """
        try:
            if input is not None:
                check_cell(input, None, self.weight_ih, self.hidden_size)
        except CHECKED as error:
            return refusal(error)
        batch_size = 1 if input is None or input.dim() == 1 else input.shape[0]
        return explain(self, self.weight_ih if input is None else input, batch_size, steps=1)

    @classmethod
    def from_torch(cls, module: "nn.GRUCell | GRUCell", *, backend: str = "auto") -> "GRUCell":
        """A GRUCell with the settings, mode and a copy of the parameters of a `torch.nn.GRUCell`.

        Raises:
            TypeError: module is neither a `torch.nn.GRUCell` nor a GRUCell, or a subclass of one,
                whose forward may compute something else.
        """
        conversion.check_type(module, nn.GRUCell, GRUCell, cls)
        options = {**conversion.beyond_torch(module, GRUCell), "backend": backend, "device": "meta"}
        return conversion.copy(module, cls(*conversion.settings(module), **options))

    def to_torch(self) -> nn.GRUCell:
        """A `torch.nn.GRUCell` with these settings, this mode and a copy of these parameters.

        Raises:
            ValueError: reset_after is False.
        """
        conversion.check_computes_the_same(self)
        input_size, hidden_size, bias = conversion.settings(self)
        return conversion.copy(self, nn.GRUCell(input_size, hidden_size, bias, device="meta"))

    def extra_repr(self) -> str:
        """The arguments that differ from their defaults."""
        return super().extra_repr() + conversion.beyond_torch_repr(self, GRUCell)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Pickles of older versions lack newer attributes.
        super().__setstate__({**conversion.defaults(GRUCell), **state})
