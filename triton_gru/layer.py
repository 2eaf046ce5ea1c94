"""GRU and GRUCell: `torch.nn.GRU` and `torch.nn.GRUCell` with a choice of variant and backend."""

import numbers
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from triton_gru import functional
from triton_gru.backends import check_backend, choose_backend, explain_plan
from triton_gru.regularisation import check_probabilities, inside_a_step
from triton_gru.trace import Trace, trace

# Arguments of GRU that nn.GRU does not have, but for backend, which is chosen anew with each copy.
BEYOND_TORCH = (
    "reset_after",
    "save_gates",
    "recurrent_dropout",
    "weight_dropout",
    "zoneout",
    "layer_norm",
)


class GRU(nn.RNNBase):
    """A multi-layer gated recurrent unit that takes the place of `torch.nn.GRU`.

    Parameters, their names, order and initial values, `state_dict`, shapes and errors are those of
    `torch.nn.GRU`, whose documentation says what the arguments before the star mean.

    It is an `nn.RNNBase`, from which parameters, pickling and replication come, and no `nn.GRU`:
    Dynamo refuses to trace any instance of `nn.GRU` (torch/_dynamo/variables/builder.py,
    `allow_rnn`), so that `torch.compile(fullgraph=True)` would fail. Nor may code that takes an
    `nn.GRU` apart, to quantise it for instance, take this one for it, as it knows no `reset_after`.
    Code that asks for `isinstance(module, nn.GRU)`, to initialise weights for instance, should ask
    for `nn.RNNBase`.

    Args:
        input_size: Features of the input.
        hidden_size: Features of the state.
        num_layers: Layers, each fed by the states of the one before.
        bias: Whether there are biases.
        batch_first: Whether input and output are [batch, steps, features].
        dropout: Probability of zeroing an output of each layer but the last, in training.
        bidirectional: Whether each layer has a second direction, from the last step to the first.
        device: Where the parameters are made.
        dtype: The parameters' dtype.
        reset_after: Where the reset gate acts. True is the formula of `nn.GRU` and cuDNN, which
            multiplies it into W_hn h + b_hn; False is Cho et al. 2014 (arXiv:1406.1078), which
            multiplies it into h before the product. See `triton_gru.equations`.
        backend: "auto" takes what measured fastest; "triton" the fused kernels; "torch" ATen,
            and cuDNN on a GPU (reset_after=True only); "reference" the equations in plain torch.
        save_gates: Whether the Triton kernels keep the gates for the backward, three times the
            output's memory, instead of computing them again.
        recurrent_dropout: Probability of dropping an element of the state that enters W_hh, in
            training, for all steps of a row alike. This and the three below are off by default and
            are said more of in `triton_gru.regularisation`.
        weight_dropout: Probability of dropping an element of W_hh, in training.
        zoneout: Probability that an element of the state stays as it was at a step; in evaluation
            the state moves by the expected share.
        layer_norm: Whether W_ih x and W_hh h are normalised, gate by gate. Adds the parameters
            gain_ih_l{k} and gain_hh_l{k}, [3H], with the suffix _reverse for the second direction.

    Raises:
        TypeError: A size, bias, batch_first, reset_after, layer_norm or probability is of the wrong
            type.
        ValueError: A size is not positive, a probability is not within 0 and 1, or the backend is
            unknown or cannot compute the variant.

    Example:
        >>> rnn = GRU(10, 20, num_layers=2)
        >>> output, h_n = rnn(torch.randn(5, 3, 10))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        reset_after: bool = True,
        backend: str = "auto",
        save_gates: bool = False,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        zoneout: float = 0.0,
        layer_norm: bool = False,
    ) -> None:
        _check_options(reset_after, backend)
        check_probabilities(
            recurrent_dropout=recurrent_dropout, weight_dropout=weight_dropout, zoneout=zoneout
        )
        if not isinstance(layer_norm, bool):
            raise TypeError(f"layer_norm should be of type bool, got: {type(layer_norm).__name__}")
        if not isinstance(num_layers, int):
            raise TypeError(f"num_layers should be of type int, got: {type(num_layers).__name__}")
        super().__init__(
            "GRU",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
        )
        self.reset_after = reset_after
        self.backend = backend
        self.save_gates = save_gates
        self.recurrent_dropout = recurrent_dropout
        self.weight_dropout = weight_dropout
        self.zoneout = zoneout
        self.layer_norm = layer_norm
        if layer_norm:
            for name in self._gain_names():
                gain = torch.ones(3 * hidden_size, device=device, dtype=dtype)
                self.register_parameter(name, nn.Parameter(gain))

    def reset_parameters(self) -> None:
        """Draws weights and biases as `nn.GRU` does; gains are 1."""
        super().reset_parameters()
        if getattr(self, "layer_norm", False):  # not yet set while nn.RNNBase builds itself
            for name in self._gain_names():
                nn.init.ones_(getattr(self, name))

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """The states of the last layer and the last states of all layers, see `functional.gru`.

        Args:
            input: [T, B, I]; [B, T, I] with batch_first; [T, I] for one row; or a PackedSequence.
            hx: The first states, [L * D, B, H], or [L * D, H] for one row. None means zeros.
            lengths: Steps of each row, integers [B] on input's device. Output is zero past a row's
                end, and its last states are those at its end.
            resets: Whether a sequence begins at a step, bool in the shape of input without its
                last dimension: the state starts anew from zero, in both directions.
        """
        return self._run(input, hx, lengths=lengths, resets=resets, batch_first=self.batch_first)

    def _run(
        self, input: Tensor | PackedSequence, hx: Tensor | None, **options: Any
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        self._update_flat_weights()
        gains = [getattr(self, name) for name in self._gain_names()] if self.layer_norm else None
        return functional.gru(
            input,
            hx,
            self._flat_weights,
            bias=self.bias,
            bidirectional=self.bidirectional,
            dropout=self.dropout,
            training=self.training,
            reset_after=self.reset_after,
            backend=self.backend,
            save_gates=self.save_gates,
            recurrent_dropout=self.recurrent_dropout,
            weight_dropout=self.weight_dropout,
            zoneout=self.zoneout,
            gains=gains,
            **options,
        )

    def _gain_names(self) -> list[str]:
        suffixes = ("", "_reverse") if self.bidirectional else ("",)
        return [
            f"gain_{kind}_l{layer}{suffix}"
            for layer in range(self.num_layers)
            for suffix in suffixes
            for kind in ("ih", "hh")
        ]

    def trace(self, input: Tensor, hx: Tensor | None = None) -> Trace:
        """Gates r and z, candidate n and state h of every step, layer and direction, see `Trace`.

        Args:
            input: As for forward, but no PackedSequence.
            hx: As for forward.

        Raises:
            ValueError: There is layer_norm or zoneout.
        """
        for name in ("layer_norm", "zoneout"):
            if getattr(self, name):
                raise ValueError(f"trace() needs {name} off: it shows the plain cell's gates")
        return trace(self, input, hx)

    def step(self, x_t: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One time step of all layers, as in decoding; the same numbers as forward gives.

        Args:
            x_t: [B, I], or [I] for one row. batch_first makes no difference.
            state: The states before the step, [L, B, H] or [L, H]. None means zeros.

        Returns:
            The last layer's state, [B, H] or [H], and the states after the step, in the shape of
            state: what the next step takes.

        Raises:
            ValueError: The layer is bidirectional, or x_t is neither 1-D nor 2-D.
            RuntimeError: As forward; or the layer is in training with recurrent_dropout or
                weight_dropout, whose masks are drawn once for a sequence.
        """
        if self.bidirectional:
            raise ValueError(
                "step needs bidirectional=False: the second direction comes from the end of a "
                "sequence, which is not known at its first step"
            )
        if not isinstance(x_t, Tensor) or x_t.dim() not in (1, 2):
            got = list(x_t.shape) if isinstance(x_t, Tensor) else type(x_t).__name__
            raise ValueError(
                f"step expects one time step [batch, input_size], or [input_size], got: {got}"
            )
        if self.training and (self.recurrent_dropout or self.weight_dropout):
            raise RuntimeError(
                "step draws no mask for a whole sequence, as recurrent_dropout and weight_dropout "
                "want it in training; call forward, or eval() first"
            )
        y, state = self._run(x_t.unsqueeze(0), state, batch_first=False)
        return y.squeeze(0), state

    def explain(
        self,
        input: Tensor | PackedSequence | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> str:
        """Which backend will run, and why.

        Args:
            input: What forward would be given. None stands for one row that fits the weights.
            lengths: What forward would be given.
            resets: What forward would be given.
        """
        x = self.weight_ih_l0
        batch_size = 1
        if isinstance(input, PackedSequence):
            x, batch_size = input.data, int(input.batch_sizes[0])
        elif input is not None:
            x = input
            batch_size = x.shape[0 if self.batch_first else 1] if x.dim() == 3 else 1
        regularised = inside_a_step(
            self.recurrent_dropout if self.training else 0.0, self.zoneout, self.layer_norm
        )
        return _explain(self, x, batch_size, resets=resets is not None, regularised=regularised)

    @classmethod
    def from_torch(cls, module: "nn.GRU | GRU", *, backend: str = "auto") -> "GRU":
        """A GRU with the settings, mode and a copy of the parameters of a `torch.nn.GRU`.

        Raises:
            TypeError: module is neither a `torch.nn.GRU` nor a GRU.
        """
        _check_module(module, nn.GRU, cls)
        options = {name: getattr(module, name) for name in BEYOND_TORCH if hasattr(module, name)}
        return _copy(module, cls(*_settings(module), device="meta", backend=backend, **options))

    def to_torch(self) -> nn.GRU:
        """A `torch.nn.GRU` with these settings, this mode and a copy of these parameters.

        recurrent_dropout and weight_dropout, which act in training only, are left behind.

        Raises:
            ValueError: reset_after is False, or there is layer_norm or zoneout.
        """
        _check_convertible(self)
        for name in ("layer_norm", "zoneout"):
            if getattr(self, name):
                raise ValueError(
                    f"to_torch() needs {name} off: torch.nn.GRU does not have it and would "
                    "silently compute another function"
                )
        return _copy(self, nn.GRU(*_settings(self), device="meta"))

    def extra_repr(self) -> str:
        """The arguments that differ from their defaults."""
        regularised = ("recurrent_dropout", "weight_dropout", "zoneout", "layer_norm")
        values = {name: getattr(self, name) for name in regularised}
        options = "".join(f", {name}={value}" for name, value in values.items() if value)
        return super().extra_repr() + _options_repr(self) + options


class GRUCell(nn.GRUCell):
    """One step of a gated recurrent unit, in the place of `torch.nn.GRUCell`, and a subclass of it.

    Args:
        input_size: Features of the input.
        hidden_size: Features of the state.
        bias: Whether there are biases.
        device: Where the parameters are made.
        dtype: The parameters' dtype.
        reset_after: Where the reset gate acts, see `GRU`.
        backend: "auto", "triton", "torch" or "reference", see `GRU`.

    Raises:
        TypeError: A size or reset_after is of the wrong type.
        ValueError: A size is not positive, or the backend is unknown or cannot compute the variant.
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
        _check_options(reset_after, backend)
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
            if not isinstance(size, numbers.Integral):
                raise TypeError(f"{name} should be of type int, got: {type(size).__name__}")
            if size <= 0:
                raise ValueError(f"{name} must be greater than zero, got: {size}")
        super().__init__(input_size, hidden_size, bias, device, dtype)
        self.reset_after = reset_after
        self.backend = backend

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """The state after one step, see `functional.gru_cell`."""
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
            input: What forward would be given. None stands for one row that fits the weights.
        """
        batch_size = 1 if input is None or input.dim() == 1 else input.shape[0]
        return _explain(self, self.weight_ih if input is None else input, batch_size)

    @classmethod
    def from_torch(cls, module: nn.GRUCell, *, backend: str = "auto") -> "GRUCell":
        """A GRUCell with the settings, mode and a copy of the parameters of a `torch.nn.GRUCell`.

        Raises:
            TypeError: module is no `torch.nn.GRUCell`.
        """
        _check_module(module, nn.GRUCell, cls)
        options = {"reset_after": getattr(module, "reset_after", True), "backend": backend}
        return _copy(module, cls(*_settings(module), device="meta", **options))

    def to_torch(self) -> nn.GRUCell:
        """A `torch.nn.GRUCell` with these settings, this mode and a copy of these parameters.

        Raises:
            ValueError: reset_after is False.
        """
        _check_convertible(self)
        return _copy(self, nn.GRUCell(*_settings(self), device="meta"))

    def extra_repr(self) -> str:
        """The arguments that differ from their defaults."""
        return super().extra_repr() + _options_repr(self)


def _check_options(reset_after: bool, backend: str) -> None:
    if not isinstance(reset_after, bool):
        raise TypeError(f"reset_after should be of type bool, got: {type(reset_after).__name__}")
    check_backend(backend, reset_after)


def _check_module(module: nn.Module, expected: type[nn.Module], ours: type[nn.Module]) -> None:
    if not isinstance(module, (expected, ours)):
        raise TypeError(
            f"from_torch expects a torch.nn.{expected.__name__}, got: {type(module).__name__}"
        )


def _check_convertible(module: GRU | GRUCell) -> None:
    if not module.reset_after:
        raise ValueError(
            "to_torch() needs reset_after=True: torch.nn.GRU multiplies the reset gate into "
            "W_hn h + b_hn, so that with these weights it would silently compute another function"
        )


def _settings(module: nn.RNNBase | nn.GRUCell) -> tuple:
    """The constructor's arguments before device, in order."""
    settings = (module.input_size, module.hidden_size)
    if isinstance(module, nn.GRUCell):
        return (*settings, module.bias)
    return (
        *settings,
        module.num_layers,
        module.bias,
        module.batch_first,
        module.dropout,
        module.bidirectional,
    )


def _copy(source: nn.Module, target: nn.Module) -> nn.Module:
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


def _explain(module: GRU | GRUCell, x: Tensor, batch_size: int, **asked: Any) -> str:
    """`asked` is what `choose_backend` takes besides the layer."""
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
    except (RuntimeError, ValueError) as error:
        return f"No backend will run. {error}."
    text = f"Backend {choice.backend!r} will run: {choice.reason}."
    if choice.backend == "triton":
        text += f" Forward: {explain_plan(x.device, dtype, batch_size, **layer)}."
    return text


def _options_repr(module: GRU | GRUCell) -> str:
    reset_after = "" if module.reset_after else ", reset_after=False"
    return reset_after + ("" if module.backend == "auto" else f", backend={module.backend!r}")
