"""gru() and gru_cell(): layers, directions and packing around the recurrence."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import has_torch_function

from triton_gru import equations
from triton_gru.dispatch import choose_backend, compute_dtype
from triton_gru.engines import aten, onnx, regularized, varlen
from triton_gru.engines.autograd import Recurrence, in_plain_torch, last_states, step
from triton_gru.engines.cpu import operators as cpu_operators
from triton_gru.engines.cpu.engine import Layout
from triton_gru.engines.cpu.layer import layer as cpu_layer
from triton_gru.equations import LayerWeights, ScanOptions, stack
from triton_gru.torch_modes import eager, records, transformed
from triton_gru.validation import (
    check_cell,
    check_gains,
    check_probabilities,
    check_rows,
    check_sequence,
    count_layers,
)


def gru(
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    params: list[Tensor] | tuple[Tensor, ...],
    *,
    bias: bool = True,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    reset_after: bool = True,
    backend: str = "auto",
    save_gates: bool = False,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    recurrent_dropout: float = 0.0,
    weight_dropout: float = 0.0,
    zoneout: float = 0.0,
    gains: list[Tensor] | tuple[Tensor, ...] | None = None,
) -> tuple[Tensor | PackedSequence, Tensor]:
    """A GRU of one or more layers over a sequence, as `torch.nn.GRU` computes it.

    L layers, D directions, T steps, B rows, I input_size, H hidden_size.

    Args:
        input: [T, B, I]; [B, T, I] with batch_first; [T, I] for one row; or a PackedSequence.
        hx: The first states, [L * D, B, H], or [L * D, H] for one row. None means zeros.
        params: weight_ih [3H, I], weight_hh [3H, H] and, with bias, bias_ih [3H], bias_hh [3H] of
            each direction of each layer, in the order of `nn.GRU.parameters()`. From the second
            layer on, I is D * H.
        bias: Whether params include biases.
        bidirectional: Whether D is 2. The second direction runs from the last step to the first.
        batch_first: Whether rows come before steps in input and output; never in hx and h_n.
        dropout: Probability of zeroing an output of each layer but the last, while training.
        training: Whether dropout applies.
        reset_after: The variant of the cell, see `triton_gru.equations`.
        backend: "auto", "triton", "cpu", "torch" or "reference".
        save_gates: Whether the Triton kernels keep the gates for the backward, three times the
            output's memory, instead of computing them again.
        lengths: Steps of each row, from 0 to T, integers [B] on input's device ([] for one row).
            Past its end a row's output is zero; its last state is that of its last step, and the
            second direction starts there. Values of input past the end have no effect; nor has hx
            of a row without steps on anything but that row's last state, which it is. The host does
            not synchronize: on a GPU, lengths out of range raise a device-side assertion. Under
            vmap they are not checked: out of range they give a wrong result.
        resets: Where sequences begin, bool [T, B] in the layout of input ([T] for one row). The
            first direction's state is zero before that step, the second's before the last step of
            the preceding sequence. So each sequence in a row has the result that it has alone,
            except the one that hx enters: in the first direction the first sequence, unless it
            begins with a reset, in the second the last.
        recurrent_dropout: Probability of dropping an element of the state that enters W_hh, for
            all steps of a row alike, while training; see `triton_gru.engines.regularized`.
        weight_dropout: Probability of dropping an element of W_hh, while training.
        zoneout: Probability that an element of the state h keeps its value at a step; in evaluation
            the new state is zoneout * h + (1 - zoneout) * h'.
        gains: With layer normalisation of the gates: gain_ih [3H] and gain_hh [3H] of each
            direction of each layer, in the order of params.

    Returns:
        The last layer's states, [T, B, D * H] in the layout of input, and h_n, the last states of
        every layer in the shape of hx.

    Raises:
        TypeError: input, hx, lengths or resets is not a tensor.
        ValueError: input is neither 2-D nor 3-D, or differs from the weights in dtype; the number
            of params fits no number of layers; the backend is unknown or cannot compute the
            variant; lengths are not integers or out of range; resets are not bool; either is given
            with a PackedSequence.
        RuntimeError: Another shape, dtype or device does not match, the sequence is empty, or the
            named backend cannot run here.

    Example:
        >>> layers = torch.nn.GRU(10, 20, num_layers=2)
        >>> y, h_n = gru(torch.randn(5, 3, 10), None, list(layers.parameters()))
        >>> y.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
    """
    packed = input if isinstance(input, PackedSequence) else None
    x = input.data if isinstance(input, PackedSequence) else input
    recurrent_dropout, weight_dropout, zoneout = check_probabilities(
        recurrent_dropout=recurrent_dropout, weight_dropout=weight_dropout, zoneout=zoneout
    )
    D = 2 if bidirectional else 1
    L = count_layers(params, bias, D)
    unbatched = check_sequence(x, hx, params[0], packed is not None, batch_first)
    if lengths is not None or resets is not None:
        lengths = check_rows(lengths, resets, x, packed is not None, batch_first)
    rows_first = batch_first and packed is None and not unbatched
    if unbatched:
        x, hx = x.unsqueeze(1), None if hx is None else hx.unsqueeze(1)
        lengths = None if lengths is None else lengths.unsqueeze(0)
        resets = None if resets is None else resets.unsqueeze(1)

    H = params[1].shape[1]
    if gains is not None:
        check_gains(gains, L * D, H)
    if packed is None:
        batch_sizes, B = None, x.shape[0 if rows_first else 1]
    else:  # int() would make it a constant in a trace
        batch_sizes = packed.batch_sizes
        B = cast(int, batch_sizes[0]) if torch.jit.is_tracing() else int(batch_sizes[0])
    given_states = hx is not None
    hx = _first_states(hx, (L * D, B, H), x)
    if packed is not None and packed.sorted_indices is not None:
        hx = hx.index_select(1, packed.sorted_indices)

    dtype = compute_dtype(x, hx)
    dropout = dropout if training else 0.0
    if training and weight_dropout:
        params = regularized.drop_weights(params, 4 if bias else 2, weight_dropout)
    inside = regularized.inside_a_step(
        recurrent_dropout if training else 0.0, zoneout, gains is not None
    )
    engine = choose_backend(
        backend,
        reset_after=reset_after,
        device=x.device,
        dtype=dtype,
        hidden_size=H,
        directions=D,
        regularised=inside,
        resets=resets is not None,
        steps=x.shape[1 if rows_first else 0] if batch_sizes is None else batch_sizes.shape[0],
        batch_size=B,
        tensors=(x, hx, *params),
    ).backend
    settings = (bias, L, dropout, training, bidirectional)
    if engine == "torch" and packed is None and lengths is None:
        # As nn.GRU calls it, with its batch_first, so the output is not a view.
        y, h_n = torch.gru(x, hx, params, *settings, rows_first)
    elif (
        engine == "torch"
        and batch_sizes is not None
        and not (backend == "auto" and _padded_is_faster(x, hx, params, dropout))
    ):
        y, h_n = torch.gru(x, batch_sizes, hx, params, *settings)
    elif engine == "cpu" and eager():
        y, h_n = _on_cpu_engine(
            *(x, hx, params, D, dropout),
            rows_first=rows_first,
            reset_after=reset_after,
            batch_sizes=batch_sizes,
            lengths=lengths,
            resets=resets,
        )
    else:
        if rows_first:
            x, resets = x.transpose(0, 1), None if resets is None else resets.t()
        if engine != "torch":  # which handles autocast itself
            x, hx, params = x.to(dtype), hx.to(dtype), [p.to(dtype) for p in params]
            gains = None if gains is None else [gain.to(dtype) for gain in gains]
        past_end = without_steps = None
        if batch_sizes is not None:
            lengths, indices = varlen.indices(batch_sizes, B, x.shape[0], x.device)
            x = varlen.pad(x, indices, batch_sizes.shape[0], B)
        elif lengths is not None:
            past_end = equations.past_end(lengths, x.shape[0]).unsqueeze(-1)
            # Otherwise dW_ih would contain 0 * inf = NaN from values past the end, and dW_hh from
            # the states of a row without steps.
            x = x.masked_fill(past_end, 0)
            if given_states:
                without_steps, kept = (lengths == 0).unsqueeze(-1), hx
                hx = hx.masked_fill(without_steps, 0)
        if resets is not None:
            resets = varlen.resets_of_directions(resets, lengths, D)
        options = ScanOptions(reset_after, lengths, resets)
        layer: Callable[..., tuple[Tensor, Tensor]] | None
        if inside:
            layer = partial(
                regularized.layer,
                options=options,
                recurrent_dropout=recurrent_dropout,
                zoneout=zoneout,
                training=training,
            )
        else:
            layer = _without_recurrence(engine, options, x, hx, params)
        last = []
        for index, h0 in enumerate(hx.unflatten(0, (L, D))):
            weights = LayerWeights(*_of_layer(params, index, L, D))
            if layer is not None:
                more = {} if gains is None else {"gains": _of_layer(gains, index, L, D)}
                y, h = layer(x, h0, weights, **more)
            else:
                # By name a refused launch is an error, with "auto" the equations are computed.
                scan = backend if engine == "triton" else engine
                y, _ = Recurrence.apply(x, h0, *weights, *options, scan, save_gates)
                h = last_states(y, h0)
            x = F.dropout(y, dropout) if dropout and index < L - 1 else y
            last.append(h)
        h_n = torch.cat(last)
        if without_steps is not None:
            h_n = torch.where(without_steps, kept.to(h_n.dtype), h_n)
        if packed is not None:
            y = varlen.pack(y, indices)
        else:
            y = y.transpose(0, 1) if rows_first else y
            if past_end is not None:
                y = y.masked_fill(past_end.transpose(0, 1) if rows_first else past_end, 0)
            elif rows_first or engine == "reference":
                y = own(y)

    if packed is not None:
        if packed.unsorted_indices is not None:
            h_n = h_n.index_select(1, packed.unsorted_indices)
        # Not packed._replace(data=y), which Dynamo traces incorrectly.
        _, *order = packed
        return PackedSequence(y, *order), h_n
    if unbatched:
        return y.squeeze(1), h_n.squeeze(1)
    return y, h_n


# torch.fx records a call instead of tracing into code that depends on the shapes of real tensors.
torch.fx.wrap("gru")
torch.fx.wrap("gru_cell")


def _without_recurrence(
    engine: str, options: ScanOptions, x: Tensor, hx: Tensor, params: Sequence[Tensor]
) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The function of a layer where `Recurrence` does not run (see `engines.autograd`), or None."""
    if engine == "torch":
        assert options.lengths is not None  # else nn.GRU's own operator ran
        return partial(aten.layer, lengths=options.lengths)
    if engine == "onnx":
        return partial(onnx.layer, options=options)
    if engine == "cpu":
        return partial(cpu_operators.layer, options=options)
    if engine == "reference" and (transformed() or torch.jit.is_tracing()):
        return partial(in_plain_torch, options=options)
    one_step = x.shape[0] == 1 and options.lengths is None and options.resets is None
    if engine == "triton" and one_step and not records(x, hx, *params):
        return partial(step, options=options)
    return None


def _on_cpu_engine(
    x: Tensor,
    hx: Tensor,
    params: Sequence[Tensor],
    D: int,
    dropout: float,
    *,
    rows_first: bool,
    reset_after: bool,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The CPU engine over x [T, B, I], [B, T, I] with rows_first or [N, I] with batch_sizes."""
    L = hx.shape[0] // D
    dtype = hx.dtype  # the engine computes in float32
    x, hx, *params = [t if t.dtype == torch.float32 else t.float() for t in (x, hx, *params)]
    # Dropout between layers draws the same numbers as nn.GRU's only with the rows second.
    transposed = rows_first and bool(dropout) and L > 1
    if resets is not None:
        by_step = resets.t() if rows_first else resets
        resets = varlen.resets_of_directions(by_step, lengths, D)
        resets = (resets.transpose(0, 1) if rows_first and not transposed else resets).contiguous()
    lengths = None if lengths is None else lengths.contiguous()
    if batch_sizes is not None:
        batch_sizes = batch_sizes.to(torch.int64).contiguous()
    layout = Layout(reset_after, batch_sizes, lengths, resets, rows_first and not transposed)
    y = x.transpose(0, 1) if transposed else x
    every_last = []
    for layer in range(L):
        y, last = cpu_layer(
            F.dropout(y, dropout) if dropout and layer else y,
            hx if L == 1 else hx[layer * D : (layer + 1) * D],
            params if L == 1 else params[layer * len(params) // L : (layer + 1) * len(params) // L],
            layout,
        )
        every_last.append(last)
    h_n = last if L == 1 else torch.cat(every_last)
    y = y.transpose(0, 1) if transposed else y
    if dtype != torch.float32:
        return y.to(dtype), h_n.to(dtype)
    # The last layer's backward keeps y: a copy may be changed in place, as nn.GRU's output.
    return own(y) if transposed or y.requires_grad else y, h_n


def _padded_is_faster(x: Tensor, hx: Tensor, params: Sequence[Tensor], dropout: float) -> bool:
    """Whether ATen is faster on padded rows of unequal length than on packed ones.

    It is on a CPU while gradients are recorded. Three cases stay packed: dropout, which would draw
    other numbers on padded rows; traces, which need nn.GRU's own operator for all lengths; and
    tensors with their own functions (ExpandedWeights), which may support that operator alone.
    """
    if dropout or torch.jit.is_tracing() or has_torch_function((x, *params)):
        return False
    return x.device.type == "cpu" and records(x, hx, *params)


def own(view: Tensor) -> Tensor:
    """A tensor that may be detached and changed in place, as the output of nn.GRU.

    A view cannot be detached in place, and a tensor saved for a backward must not be changed.
    """
    if view.requires_grad or torch.jit.is_tracing() or transformed():
        return view.clone()
    return view.detach()


def _of_layer(
    params: list[Tensor] | tuple[Tensor, ...], layer: int, L: int, D: int
) -> list[Tensor]:
    """The parameters of a layer, kind by kind, with its directions stacked."""
    kinds = len(params) // (L * D)
    group = params[layer * D * kinds : (layer + 1) * D * kinds]
    return [stack(group[kind::kinds]) for kind in range(kinds)]


def gru_cell(
    input: Tensor,
    hx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    reset_after: bool = True,
    backend: str = "auto",
) -> Tensor:
    """One step of a GRU, as `torch.nn.GRUCell` computes it (B rows, I input_size, H hidden_size).

    Args:
        input: [B, I], or [I] for one row.
        hx: The state before the step, [B, H] or [H]. None means zeros.
        weight_ih: [3H, I].
        weight_hh: [3H, H].
        bias_ih: [3H] or None.
        bias_hh: [3H] or None.
        reset_after: The variant of the cell, see `triton_gru.equations`.
        backend: "auto", "triton", "cpu", "torch" or "reference".

    Returns:
        The state after the step, in the shape of hx.

    Raises:
        TypeError: input or hx is not a tensor.
        ValueError: input or hx is neither 1-D nor 2-D; only one bias is given; the backend is
            unknown or cannot compute the variant.
        RuntimeError: Another shape, dtype or device does not match, or backend="triton" cannot run
            here.

    Example:
        >>> cell = torch.nn.GRUCell(10, 20)
        >>> gru_cell(torch.randn(3, 10), None, cell.weight_ih, cell.weight_hh).shape
        torch.Size([3, 20])
    """
    hidden_size = weight_hh.shape[1]
    check_cell(input, hx, weight_ih, hidden_size)
    if (bias_ih is None) != (bias_hh is None):
        given = "bias_hh" if bias_ih is None else "bias_ih"
        raise ValueError(f"bias_ih and bias_hh should both be given or both be None, got {given}")
    batched = input.dim() == 2
    x = input if batched else input.unsqueeze(0)
    if hx is None:
        hx = x.new_zeros(x.shape[0], hidden_size)
    elif not batched:
        hx = hx.unsqueeze(0)
    dtype = compute_dtype(x, hx)
    choice = choose_backend(
        backend,
        reset_after=reset_after,
        device=x.device,
        dtype=dtype,
        hidden_size=hidden_size,
        steps=1,
        batch_size=x.shape[0],
        tensors=[t for t in (x, hx, weight_ih, weight_hh, bias_ih, bias_hh) if t is not None],
    )
    if choice.backend == "torch":
        h = torch.gru_cell(x, hx, weight_ih, weight_hh, bias_ih, bias_hh)
    else:
        params = [weight_ih, weight_hh]
        if bias_ih is not None and bias_hh is not None:
            params += [bias_ih, bias_hh]
        if choice.backend == "cpu" and eager():
            x, hx, *params = [t.float() for t in (x, hx, *params)]
            _, h = cpu_layer(x.unsqueeze(0), hx.unsqueeze(0), params, Layout(reset_after))
        else:
            _, h = gru(
                *(x.unsqueeze(0), hx.unsqueeze(0), params),
                bias=bias_ih is not None,
                reset_after=reset_after,
                backend=backend,
            )
        h = own(h.squeeze(0).to(dtype))
    return h if batched else h.squeeze(0)


def _first_states(hx: Tensor | None, expected: tuple[int, int, int], x: Tensor) -> Tensor:
    if hx is None:
        return x.new_zeros(expected)
    if hx.shape != expected:
        raise RuntimeError(
            f"Expected hidden size {expected}, got {list(hx.shape)}; hx should be "
            "(num_layers * directions, batch, hidden_size), with batch_first too"
        )
    return hx
