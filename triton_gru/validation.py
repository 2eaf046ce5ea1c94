"""Argument checks of gru() and gru_cell().

Exception types are those of nn.GRU and nn.GRUCell, and messages begin as theirs where they have
one, because programs and PyTorch's own samples match on them.
"""

import numbers
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from triton_gru.torch_modes import autocasts


def check_sequence(
    x: Tensor, hx: Tensor | None, weight_ih: Tensor, packed: bool, batch_first: bool
) -> bool:
    """Whether x is one row without a batch dimension; raises if it does not fit the weights."""
    _check_tensors("GRU", x, hx)
    shape, dims = x.shape, x.dim()
    if (
        hx is None
        and not packed
        and 1 < dims < 4
        and shape[-1] == weight_ih.shape[1]
        and shape[1 if batch_first and dims == 3 else 0] != 0
        and x.dtype == weight_ih.dtype
        and x.device == weight_ih.device
    ):
        return dims == 2  # the checks below would pass; a short call takes microseconds
    layout = "[batch, steps, input_size]" if batch_first else "[steps, batch, input_size]"
    if packed:
        if dims != 2:
            raise RuntimeError(
                f"input must have 2 dimensions, got {dims}: the data of a PackedSequence should "
                f"be [all steps, input_size] and is {list(shape)}"
            )
    elif dims not in (2, 3):
        raise ValueError(
            f"GRU: Expected input to be 2D or 3D, got {dims}D instead; its shape should be "
            f"{layout}, or [steps, input_size] for one row, and is {list(shape)}"
        )
    unbatched = not packed and dims == 2
    if not packed and hx is not None and hx.dim() != dims:
        kind = "unbatched 2-D" if unbatched else "batched 3-D"
        raise RuntimeError(
            f"For {kind} input, hx should also be {dims}-D but got {hx.dim()}-D tensor; "
            f"input is {list(shape)}, hx is {list(hx.shape)}"
        )
    if x.dtype != weight_ih.dtype and not autocasts(x):
        raise ValueError(
            f"RNN input dtype ({x.dtype}) does not match weight dtype ({weight_ih.dtype}). "
            f"Convert input: input.to({weight_ih.dtype}), or convert model: model.to({x.dtype})"
        )
    _check_dtypes_and_devices(x, hx, weight_ih)
    if shape[-1] != weight_ih.shape[1]:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {weight_ih.shape[1]}, got "
            f"{shape[-1]}; input should be {'packed' if packed else layout}, "
            f"and is {list(shape)}"
        )
    if shape[0 if packed or unbatched or not batch_first else 1] == 0:
        raise RuntimeError(
            "Expected sequence length to be larger than 0 in RNN; input should have at least one "
            f"step, and is {list(shape)}"
        )
    return unbatched


def check_rows(
    lengths: Tensor | None, resets: Tensor | None, x: Tensor, packed: bool, batch_first: bool
) -> Tensor | None:
    """The lengths as int64; raises if lengths or resets do not fit x.

    x has passed `check_sequence`.
    """
    for name, value in (("lengths", lengths), ("resets", resets)):
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(
                f"GRU: Expected {name} to be a tensor, got {type(value).__name__} instead"
            )
        if packed:
            raise ValueError(
                f"{name} cannot be given for a PackedSequence, which has the ends of its rows; "
                "give padded rows and lengths= instead"
            )
        if value.device != x.device:
            raise RuntimeError(
                f"Input and {name} are not at the same device, found input tensor at {x.device} "
                f"and {name} at {value.device}. Move {name}: {name}.to({str(x.device)!r})"
            )
    unbatched = x.dim() == 2
    if lengths is not None:
        steps = x.shape[1 if batch_first and not unbatched else 0]
        lengths = _check_lengths(
            lengths, () if unbatched else (x.shape[0 if batch_first else 1],), steps
        )
    if resets is not None:
        if resets.dtype != torch.bool:
            raise ValueError(
                f"resets should be of dtype torch.bool, got: {resets.dtype}. "
                "Convert resets: resets.bool()"
            )
        if resets.shape != x.shape[:-1]:
            raise RuntimeError(
                f"Expected resets of shape {list(x.shape[:-1])}, that of input without its last "
                f"dimension, got {list(resets.shape)}; input is {list(x.shape)}"
            )
    return lengths


def _check_lengths(lengths: Tensor, expected: tuple[int, ...], steps: int) -> Tensor:
    if lengths.dtype == torch.bool or lengths.is_floating_point() or lengths.is_complex():
        raise ValueError(
            f"lengths should be of an integer dtype, got: {lengths.dtype}. "
            "Convert lengths: lengths.long()"
        )
    if lengths.shape != expected:
        raise RuntimeError(
            f"Expected lengths of shape {list(expected)}, one for each row, got "
            f"{list(lengths.shape)}"
        )
    # As int64: 8-bit lengths cannot be compared with more steps, nor unsigned ones reduced by 1.
    lengths = lengths.to(torch.int64)
    compiling = torch.compiler.is_compiling()
    if not compiling and is_functorch_wrapped_tensor(lengths):
        return lengths  # under vmap values cannot be read
    wrong = (lengths < 0) | (lengths > steps)
    if compiling or lengths.device.type != "cpu":
        # Neither synchronizes nor breaks the graph: the device raises the assertion.
        torch._assert_async(~wrong.any(), "lengths should be within 0 and the input's steps")
    elif wrong.any():
        values = lengths[wrong].tolist() if lengths.dim() else [lengths.item()]
        raise ValueError(
            f"lengths should be within 0 and {steps}, the input's steps, got: "
            f"{', '.join(map(str, values[:5]))}"
        )
    return lengths


def check_cell(x: Tensor, hx: Tensor | None, weight_ih: Tensor, hidden_size: int) -> None:
    """Raises if input or state do not fit the weights of a cell."""
    _check_tensors("GRUCell", x, hx)
    size, dtype, device = x.shape, x.dtype, x.device
    dims = len(size)
    if (
        0 < dims < 3
        and size[-1] == weight_ih.shape[1]
        and dtype == weight_ih.dtype
        and device == weight_ih.device
        and (
            hx is None
            or (
                hx.dtype == dtype
                and hx.device == device
                and hx.shape == ((hidden_size,) if dims == 1 else (size[0], hidden_size))
            )
        )
    ):
        return  # the checks below would pass; a short call takes microseconds
    for name, tensor in (("input", x),) if hx is None else (("input", x), ("hidden", hx)):
        if tensor.dim() not in (1, 2):
            raise ValueError(
                f"GRUCell: Expected {name} to be 1D or 2D, got {tensor.dim()}D instead; "
                f"its shape should be [batch, features] or [features], and is {list(tensor.shape)}"
            )
    if hx is not None and hx.dim() != dims:
        raise RuntimeError(
            f"For {dims}-D input, hx should also be {dims}-D but got {hx.dim()}-D tensor; "
            f"input is {list(x.shape)}, hx is {list(hx.shape)}"
        )
    if x.shape[-1] != weight_ih.shape[1]:
        raise RuntimeError(
            f"input has inconsistent input_size: got {x.shape[-1]} expected {weight_ih.shape[1]}"
        )
    if hx is not None and hx.shape[-1] != hidden_size:
        raise RuntimeError(
            f"hidden0 has inconsistent hidden_size: got {hx.shape[-1]}, expected {hidden_size}"
        )
    if hx is not None and x.shape[:-1] != hx.shape[:-1]:
        raise RuntimeError(
            f"Input batch size {x.shape[0]} doesn't match hidden0 batch size {hx.shape[0]}"
        )
    if x.dtype != weight_ih.dtype and not autocasts(x):
        raise RuntimeError(
            f"GRUCell input dtype ({x.dtype}) does not match weight dtype ({weight_ih.dtype}). "
            f"Convert input: input.to({weight_ih.dtype}), or convert model: model.to({x.dtype})"
        )
    _check_dtypes_and_devices(x, hx, weight_ih)


def _check_tensors(owner: str, x: Tensor, hx: Tensor | None) -> None:
    if isinstance(x, Tensor) and (hx is None or isinstance(hx, Tensor)):
        return
    name, value = ("hx", hx) if isinstance(x, Tensor) else ("input", x)
    raise TypeError(f"{owner}: Expected {name} to be a tensor, got {type(value).__name__} instead")


def _check_dtypes_and_devices(x: Tensor, hx: Tensor | None, weight_ih: Tensor) -> None:
    if hx is not None and hx.dtype != x.dtype and not autocasts(x):
        raise RuntimeError(
            f"hx dtype ({hx.dtype}) does not match input dtype ({x.dtype}). "
            f"Convert hx: hx.to({x.dtype})"
        )
    if x.dtype != weight_ih.dtype or (hx is not None and hx.dtype != x.dtype):
        dtypes = {t.dtype for t in (x, hx, weight_ih) if t is not None}
        if torch.float64 in dtypes:
            raise RuntimeError(
                "autocast leaves torch.float64 as it is, so that input, hx and weights should all "
                f"have it or none; got {', '.join(sorted(map(str, dtypes)))}"
            )
    if x.device != weight_ih.device:
        raise RuntimeError(
            "Input and parameter tensors are not at the same device, found input tensor at "
            f"{x.device} and parameter tensor at {weight_ih.device}. "
            f"Move input: input.to({str(weight_ih.device)!r}), or the model"
        )
    if hx is not None and hx.device != x.device:
        raise RuntimeError(
            "Input and hidden tensors are not at the same device, found input tensor at "
            f"{x.device} and hidden tensor at {hx.device}. Move hx: hx.to({str(x.device)!r})"
        )


def check_probabilities(**given: float) -> list[float]:
    """The values, any kind of number, as floats; raises unless each is at least 0 and below 1.

    Raises:
        TypeError: A value is not a number.
        ValueError: A value is below 0 or at least 1.
    """
    for name, value in given.items():
        # First the cheap test: every call of a layer makes it, mostly with floats.
        if type(value) is not float and (
            isinstance(value, bool) or not isinstance(value, numbers.Real)
        ):
            raise TypeError(f"{name} should be a number, got: {type(value).__name__}")
        if not 0 <= value < 1:
            raise ValueError(f"{name} should be at least 0 and below 1, got: {value}")
    return [float(value) for value in given.values()]


def count_layers(params: Sequence[Tensor], bias: bool, D: int) -> int:
    """L, from the parameters of all layers; raises if their number fits no number of layers."""
    per_layer = D * (4 if bias else 2)
    if not params or len(params) % per_layer:
        raise ValueError(
            f"params should hold {per_layer} tensors for each layer with bias={bias} and "
            f"bidirectional={D == 2}, got {len(params)} in all"
        )
    return len(params) // per_layer


def check_gains(gains: Sequence[Tensor], directions: int, H: int) -> None:
    """Raises unless there are two gains [3H] for each direction of every layer."""
    if len(gains) != 2 * directions or any(gain.shape != (3 * H,) for gain in gains):
        raise ValueError(
            f"gains should hold 2 tensors of shape [{3 * H}] for each of the {directions} "
            f"directions of all layers, got shapes {[list(gain.shape) for gain in gains]}"
        )
