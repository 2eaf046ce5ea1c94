"""The implementations that are timed, each built for a cell on the same weights and inputs.

An implementation is a function from (cell, weights) to a `Runner`. It raises `Missing` if its
package is not installed, `Unsupported` if it has no such function; the record has the reason.
"""

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import triton_gru
from benchmarks.suites import CUDNN, LOOP, LSTM, OURS, Cell

TORCH_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "tf32": torch.float32,
    "float32": torch.float32,
}
SHORTEST = 0.3


class Missing(RuntimeError):
    """The implementation's package is not installed."""


class Unsupported(RuntimeError):
    """The implementation has no function for this cell."""


@dataclasses.dataclass
class Inputs:
    """One set of inputs, leaves of their own graph.

    Attributes:
        x: [T, B, I], or a PackedSequence.
        leaf: the tensor of x by which gradients are taken.
        lengths: [B] on x's device, or None.
        dy: the gradient of the loss with respect to y.
    """

    x: Tensor | PackedSequence
    leaf: Tensor
    lengths: Tensor | None
    dy: Tensor


@dataclasses.dataclass
class Runner:
    """An implementation, ready to run.

    Attributes:
        forward: from Inputs to y, or the data of y if x is packed.
        parameters: in the order of `nn.GRU.parameters()`.
        exact: whether y is comparable with float64 (an LSTM's is not).
    """

    forward: Callable[[Inputs], Tensor]
    parameters: list[Tensor]
    exact: bool = True


def make_weights(cell: Cell, device: torch.device) -> nn.GRU:
    """The weights for all implementations, rounded to the cell's dtype."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.GRU(cell.H, cell.H, bidirectional=cell.directions == 2)
    return module.to(device, TORCH_DTYPES[cell.dtype])


def make_inputs(cell: Cell, seed: int, device: torch.device) -> Inputs:
    dtype, g = TORCH_DTYPES[cell.dtype], torch.Generator(device).manual_seed(seed)
    leaf = torch.randn(cell.T, cell.B, cell.H, generator=g, device=device).to(dtype)
    dy = torch.randn(cell.T, cell.B, cell.directions * cell.H, generator=g, device=device).to(dtype)
    if cell.lengths == "full":
        return Inputs(leaf.requires_grad_(), leaf, None, dy)
    share = SHORTEST + (1 - SHORTEST) * torch.rand(cell.B, generator=g, device=device)
    lengths = (share * cell.T).round().long().clamp(1, cell.T).sort(descending=True).values
    lengths[0] = cell.T
    if cell.lengths == "lengths":
        return Inputs(leaf.requires_grad_(), leaf, lengths, dy)
    on_host = lengths.cpu()
    packed = pack_padded_sequence(leaf, on_host)
    leaf = packed.data.detach().requires_grad_()
    dy = pack_padded_sequence(dy, on_host).data
    return Inputs(packed._replace(data=leaf), leaf, lengths, dy)


def _module(module: nn.Module, cell: Cell, exact: bool = True) -> Runner:
    module.train(cell.mode == "train")

    def forward(inputs: Inputs) -> Tensor:
        more = {"lengths": inputs.lengths} if cell.lengths == "lengths" else {}
        y, _ = module(inputs.x, **more)
        return y.data if isinstance(y, PackedSequence) else y

    return Runner(forward, list(module.parameters()), exact)


def _ours(cell: Cell, weights: nn.GRU, backend: str) -> Runner:
    if cell.lengths == "lengths" and not takes_lengths():
        raise Unsupported("GRU.forward takes no lengths")
    module = triton_gru.GRU(
        cell.H,
        cell.H,
        bidirectional=cell.directions == 2,
        reset_after=cell.reset_after,
        backend=backend,
        device=weights.weight_hh_l0.device,
        dtype=weights.weight_hh_l0.dtype,
    )
    module.load_state_dict(weights.state_dict())
    return _module(module, cell)


def takes_lengths() -> bool:
    return "lengths" in inspect.signature(triton_gru.GRU.forward).parameters


def reference(cell: Cell, weights: nn.GRU) -> Runner:
    """The equations in float64, with the rounded weights."""
    module = triton_gru.GRU(
        cell.H,
        cell.H,
        bidirectional=cell.directions == 2,
        reset_after=cell.reset_after,
        backend="reference",
        device=weights.weight_hh_l0.device,
        dtype=torch.float64,
    )
    module.load_state_dict(weights.state_dict())
    return _module(module, cell)


def _cudnn(cell: Cell, weights: nn.GRU) -> Runner:
    if not cell.reset_after:
        raise Unsupported("nn.GRU has reset_after=True only")
    if cell.lengths == "lengths":
        raise Unsupported("nn.GRU takes lengths as a PackedSequence only")
    module = nn.GRU(cell.H, cell.H, bidirectional=cell.directions == 2)
    module.to(weights.weight_hh_l0.device, weights.weight_hh_l0.dtype)
    module.load_state_dict(weights.state_dict())
    return _module(module, cell)


def _lstm(cell: Cell, weights: nn.GRU) -> Runner:
    module = nn.LSTM(cell.H, cell.H, bidirectional=cell.directions == 2)
    return _module(module.to(weights.weight_hh_l0.device, weights.weight_hh_l0.dtype), cell, False)


def _leaves(cell: Cell, weights: nn.GRU) -> list[Tensor]:
    if not cell.reset_after or cell.directions == 2 or cell.lengths != "full":
        raise Unsupported("one direction, full length and reset_after=True only")
    return [p.detach().clone().requires_grad_() for p in weights.parameters()]


def _step(gates_x: Tensor, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    x_r, x_z, x_n = gates_x.chunk(3, -1)
    h_r, h_z, h_n = F.linear(h, weight, bias).chunk(3, -1)
    r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + r * h_n)
    return n + z * (h - n)


def _compiled_step() -> Callable:
    # Compiled for each cell: after eight shapes Dynamo would silently run the function uncompiled.
    torch.compiler.reset()
    return torch.compile(_step, dynamic=False)


def _loop(cell: Cell, weights: nn.GRU) -> Runner:
    parameters = w_ih, w_hh, b_ih, b_hh = _leaves(cell, weights)
    step = _compiled_step()

    def forward(inputs: Inputs) -> Tensor:
        h, states = inputs.x.new_zeros(cell.B, cell.H), []
        for gates_x in F.linear(inputs.x, w_ih, b_ih).unbind(0):
            h = step(gates_x, h, w_hh, b_hh)
            states.append(h)
        return torch.stack(states)

    return Runner(forward, parameters)


def _gru_qat(cell: Cell, weights: nn.GRU) -> Runner:
    """gru-qat 0.5: the dense kernel with a grid barrier, as its README calls it."""
    scan = _import("gru_qat.triton_kernels.scan", "gru-qat").gru_scan_persistent
    parameters = w_ih, w_hh, b_ih, b_hh = _leaves(cell, weights)

    def forward(inputs: Inputs) -> Tensor:
        h0 = inputs.x.new_zeros(cell.B, cell.H)
        return scan(F.linear(inputs.x, w_ih, b_ih), h0, w_hh, b_hh)

    return Runner(forward, parameters)


def _torchrl(cell: Cell, weights: nn.GRU) -> Runner:
    """TorchRL's kernels behind recurrent_backend="triton": batch first, float32 or bfloat16."""
    name = "torchrl.modules.tensordict_module._rnn_triton"
    gru = _import(name, "torchrl").gru_triton
    parameters = _leaves(cell, weights)
    if cell.dtype == "float16":
        raise Unsupported("computes float32 and bfloat16")
    options = {"compute_dtype": TORCH_DTYPES[cell.dtype]}
    if options["compute_dtype"] == torch.float32:
        options["input_precision"] = "tf32" if cell.dtype == "tf32" else "ieee"

    def forward(inputs: Inputs) -> Tensor:
        x = inputs.x.transpose(0, 1)
        hidden = x.new_zeros(cell.B, cell.T, cell.H)
        resets = torch.zeros(cell.B, cell.T, dtype=torch.bool, device=x.device)
        return gru(x, hidden, *parameters, resets, **options)[0].transpose(0, 1)

    return Runner(forward, parameters)


def flashrnn_arguments(
    x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Wx [B, T, 3, 1, H], R [3, 1, H, H] and b [4, 1, H] of FlashRNN's GRU.

    It orders the gates c, r, z, n: c = W_hn h + b_hn, then r and z, then the input's part of n.
    """
    T, B, H = x.shape[0], x.shape[1], w_hh.shape[1]
    gates_x = F.linear(x, w_ih).view(T, B, 3, 1, H).transpose(0, 1)
    R = w_hh.view(3, 1, H, H)[[2, 0, 1]]
    both = b_ih.view(3, H) + b_hh.view(3, H)
    b = torch.stack([b_hh.view(3, H)[2], both[0], both[1], b_ih.view(3, H)[2]])
    return gates_x, R, b.unsqueeze(1)


def _flashrnn(cell: Cell, weights: nn.GRU) -> Runner:
    """FlashRNN 1.0.8: the only GRU it has is the alternating one; it compiles with nvcc."""
    run = _import("flashrnn", "flashrnn").flashrnn
    parameters = _leaves(cell, weights)
    if cell.dtype in ("tf32", "float32"):
        raise Unsupported("timed in 16 bit only, each dtype and shape being compiled for minutes")
    if weights.weight_hh_l0.device.type != "cuda":
        raise Unsupported("needs a CUDA GPU")

    def forward(inputs: Inputs) -> Tensor:
        arguments = flashrnn_arguments(inputs.x, *parameters)
        y, _ = run(*arguments, function="gru", backend="cuda", dtype=cell.dtype)
        return y[0].transpose(0, 1).flatten(2)  # [1, B, T, 1, H]

    return Runner(forward, parameters)


def _import(module: str, package: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Missing(f"{package}: {error}") from error


IMPLEMENTATIONS: dict[str, Callable[[Cell, nn.GRU], Runner]] = {
    OURS: functools.partial(_ours, backend="triton"),
    "triton_gru auto": functools.partial(_ours, backend="auto"),
    CUDNN: _cudnn,
    LSTM: _lstm,
    LOOP: _loop,
    "gru-qat": _gru_qat,
    "torchrl": _torchrl,
    "flashrnn": _flashrnn,
}
