"""GRU: `torch.nn.GRU` with a choice of variant and backend."""

import numbers
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from triton_gru import conversion, functional
from triton_gru.cell import GRUCell  # noqa: F401 - its place in pickles of older versions
from triton_gru.dispatch import CHECKED, check_backend, explain, refusal
from triton_gru.engines.regularized import inside_a_step
from triton_gru.trace import Trace, trace
from triton_gru.validation import check_probabilities, check_rows, check_sequence


class GRU(nn.RNNBase):
    """A multi-layer gated recurrent unit that replaces `torch.nn.GRU`.

    Parameters, their names, order and initial values, `state_dict`, shapes and errors are those of
    `torch.nn.GRU`, whose documentation describes the arguments before the star.

    It is an `nn.RNNBase`, from which it inherits parameters, pickling and replication, and not an
    `nn.GRU`: Dynamo refuses to trace any instance of `nn.GRU`
    (torch/_dynamo/variables/builder.py, `allow_rnn`), so `torch.compile(fullgraph=True)` would
    fail. Quantizers and other code that reads an `nn.GRU`'s parameters must not match it either, as
    they ignore `reset_after`. Code that tests `isinstance(module, nn.GRU)`, to initialise weights
    for example, should test for `nn.RNNBase`.
    for `nn.RNNBase`.

    Args:
        input_size: Features of the input.
        hidden_size: Features of the state.
        num_layers: Number of layers; each one's input is the states of the one before.
        bias: Whether the products have biases.
        batch_first: Whether input and output are [batch, steps, features].
        dropout: Probability of zeroing an output of each layer but the last, in training.
        bidirectional: Whether each layer has a second direction, from the last step to the first.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        proj_size: Refused unless 0, as in nn.GRU; only an LSTM has it.
        reset_after: Where the reset gate acts. True is the formula of `nn.GRU` and cuDNN, which
            multiplies it into W_hn h + b_hn; False is Cho et al. 2014 (arXiv:1406.1078), which
            multiplies it into h before the product. See `triton_gru.equations`.
        backend: "triton" runs the fused kernels; "cpu" the engine in C (float32 on a CPU, built by
            the machine's compiler at first use, see docs/faq.md); "torch" ATen, and cuDNN on a GPU
            (reset_after=True only); "reference" the equations in plain torch. "auto" chooses on a
            GPU the kernels where they measured at least 10 % faster than cuDNN there (docs/gpu.md);
            on a CPU "cpu" in float32 from 16 steps on (docs/faq.md has the rule) and where torch
            has no kernel; else "torch" if it computes the layer, else "reference". `explain`
            returns which one and why.
        save_gates: Whether the Triton kernels keep the gates for the backward, three times the
            output's memory, instead of computing them again.
        recurrent_dropout: Probability of dropping an element of the state that enters W_hh, in
            training, for all steps of a row alike. This and the three below are off by default;
            `triton_gru.engines.regularized` describes them.
        weight_dropout: Probability of dropping an element of W_hh, in training.
        zoneout: Probability that an element of the state h keeps its value at a step; in evaluation
            the new state is zoneout * h + (1 - zoneout) * h'.
        layer_norm: Whether W_ih x and W_hh h are normalised, gate by gate. Adds the parameters
            gain_ih_l{k} and gain_hh_l{k}, [3H], with the suffix _reverse for the second direction.

    Raises:
        TypeError: A size, bias, batch_first, reset_after, save_gates, layer_norm or probability is
            of the wrong type.
        ValueError: A size is not positive, a probability is not at least 0 and below 1 (dropout:
            within 0 and 1), the backend is unknown or cannot compute the variant, or proj_size is
            given.

    Example:
        >>> rnn = GRU(10, 20, num_layers=2)
        >>> output, h_n = rnn(torch.randn(5, 3, 10))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
    """

    reset_after: bool
    backend: str
    save_gates: bool
    recurrent_dropout: float
    weight_dropout: float
    zoneout: float
    layer_norm: bool
    weight_ih_l0: Tensor
    _flat_weights: Any  # to torch a list of Parameter or None; here no weight is None

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
        proj_size: None = None,
        *,
        reset_after: bool = True,
        backend: str = "auto",
        save_gates: bool = False,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        zoneout: float = 0.0,
        layer_norm: bool = False,
    ) -> None:
        if proj_size is not None:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        check_backend(backend, reset_after)
        recurrent_dropout, weight_dropout, zoneout = check_probabilities(
            recurrent_dropout=recurrent_dropout, weight_dropout=weight_dropout, zoneout=zoneout
        )
        for name, value in (("save_gates", save_gates), ("layer_norm", layer_norm)):
            if not isinstance(value, bool):
                raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")
        if not isinstance(num_layers, numbers.Integral):
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

    # As nn.GRU's, so that type checkers see forward(tensor)[0] as a Tensor.
    @overload
    def forward(
        self,
        input: Tensor,
        hx: Tensor | None = None,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(
        self, input: PackedSequence, hx: Tensor | None = None
    ) -> tuple[PackedSequence, Tensor]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """The states of the last layer and the last states of all layers, see `functional.gru`.

        Args:
            input: [T, B, I]; [B, T, I] with batch_first; [T, I] for one row; or a PackedSequence.
            hx: The first states, [L * D, B, H], or [L * D, H] for one row. None means zeros.
            lengths: Steps of each row, integers [B] on input's device. Past a row's end the output
                is zero; the last states are those of the row's last step.
            resets: Where sequences begin, bool in the shape of input without its last dimension:
                before that step the state is zero, in both directions.

        Returns:
            The last layer's states, [T, B, D * H] in the layout of input, and h_n in the shape of
            hx.

        Raises:
            TypeError, ValueError, RuntimeError: As `functional.gru`.
        """
        self._update_flat_weights()
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
            gains=self._gains(),
            lengths=lengths,
            resets=resets,
            batch_first=self.batch_first,
        )

    # Without it torch.jit.script stops here; with it, at gru(), it reports keyword-only arguments.
    @torch.jit.unused
    def _update_flat_weights(self) -> None:
        # nn.RNNBase looks each weight up twice through Module.__getattr__, a fifth of the time of a
        # short call. Weights that did not change since need no update.
        parameters = self._parameters
        for name, weight in zip(self._flat_weights_names, self._flat_weights, strict=False):
            if parameters.get(name) is not weight:
                return super()._update_flat_weights()

    @torch.jit.unused
    def _gains(self) -> list[Tensor] | None:
        return [getattr(self, name) for name in self._gain_names()] if self.layer_norm else None

    def _gain_names(self) -> list[str]:
        suffixes = ("", "_reverse") if self.bidirectional else ("",)
        return [
            f"gain_{kind}_l{layer}{suffix}"
            for layer in range(self.num_layers)
            for suffix in suffixes
            for kind in ("ih", "hh")
        ]

    def trace(self, input: Tensor, hx: Tensor | None = None) -> Trace:
        """Gates r and z, candidate n and state h of every step, layer and direction.

        Args:
            input: As for forward, but not a PackedSequence.
            hx: As for forward.

        Returns:
            A `Trace` with tensors [L, D, T, B, H], [L, D, B, T, H] or [L, D, T, H].

        Raises:
            ValueError: layer_norm or zoneout is on.
            TypeError: input is a PackedSequence.
        """
        for name in ("layer_norm", "zoneout"):
            if getattr(self, name):
                raise ValueError(f"trace() needs {name} off: it shows the plain cell's gates")
        return trace(self, input, hx, reset_after=self.reset_after, backend=self.backend)

    def step(self, x_t: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One time step of all layers, for decoding; equal to forward up to rounding.

        Args:
            x_t: [B, I], or [I] for one row. batch_first has no effect.
            state: The states before the step, [L, B, H] or [L, H]. None means zeros.

        Returns:
            The last layer's state, [B, H] or [H], and the states after the step, in the shape of
            state: what the next step takes.

        Raises:
            ValueError: The layer is bidirectional, or x_t is neither 1-D nor 2-D.
            RuntimeError: As forward; or the layer is in training with recurrent_dropout or
                weight_dropout, whose masks hold for a whole sequence.
        """
        if self.bidirectional:
            raise ValueError(
                "step needs bidirectional=False: the second direction starts at the end of a "
                "sequence, which is not known at its first step"
            )
        if not isinstance(x_t, Tensor) or x_t.dim() not in (1, 2):
            got = list(x_t.shape) if isinstance(x_t, Tensor) else type(x_t).__name__
            raise ValueError(
                f"step expects one time step [batch, input_size], or [input_size], got: {got}"
            )
        if self.training and (self.recurrent_dropout or self.weight_dropout):
            raise RuntimeError(
                "in training recurrent_dropout and weight_dropout draw one mask for a whole "
                "sequence, which step does not have; call forward, or eval() first"
            )
        time = 1 if self.batch_first and x_t.dim() == 2 else 0
        y, state = self.forward(x_t.unsqueeze(time), state)
        return functional.own(y.squeeze(time)), state

    def explain(
        self,
        input: Tensor | PackedSequence | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> str:
        """Which backend will run, and why; or what is wrong with the arguments.

        Args:
            input: As for forward. None means one row with the dtype and device of the weights.
            lengths: As for forward.
            resets: As for forward.
        """
        x = input.data if isinstance(input, PackedSequence) else input
        batch_size, steps = 1, None
        if x is not None:
            packed = isinstance(input, PackedSequence)
            try:
                check_sequence(x, None, self.weight_ih_l0, packed, self.batch_first)
                check_rows(lengths, resets, x, packed, self.batch_first)
            except CHECKED as error:
                return refusal(error)
            if isinstance(input, PackedSequence):
                batch_size, steps = int(input.batch_sizes[0]), len(input.batch_sizes)
            elif x.dim() == 3:
                batch_size, steps = x.shape[:2] if self.batch_first else (x.shape[1], x.shape[0])
            else:
                steps = x.shape[0]
        regularised = inside_a_step(
            self.recurrent_dropout if self.training else 0.0, self.zoneout, self.layer_norm
        )
        return explain(
            self,
            self.weight_ih_l0 if x is None else x,
            batch_size,
            steps=steps,
            resets=resets is not None,
            regularised=regularised,
        )

    @classmethod
    def from_torch(cls, module: "nn.GRU | GRU", *, backend: str = "auto") -> "GRU":
        """A GRU with the settings, mode and a copy of the parameters of a `torch.nn.GRU`.

        Raises:
            TypeError: module is neither a `torch.nn.GRU` nor a GRU, or a subclass of one, whose
                forward may compute something else.
        """
        conversion.check_type(module, nn.GRU, GRU, cls)
        options = {**conversion.beyond_torch(module, GRU), "backend": backend, "device": "meta"}
        return conversion.copy(module, cls(*conversion.settings(module), **options))

    def to_torch(self) -> nn.GRU:
        """A `torch.nn.GRU` with these settings, this mode and a copy of these parameters.

        recurrent_dropout and weight_dropout, which act in training only, are dropped.

        Raises:
            ValueError: reset_after is False, or layer_norm or zoneout is on.
        """
        conversion.check_computes_the_same(self)
        return conversion.copy(self, nn.GRU(*conversion.settings(self), device="meta"))

    def extra_repr(self) -> str:
        """The arguments that differ from their defaults."""
        return super().extra_repr() + conversion.beyond_torch_repr(self, GRU)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Pickles of older versions lack newer attributes.
        super().__setstate__({**conversion.defaults(GRU), **state})
