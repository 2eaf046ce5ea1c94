"""One layer of the recurrence as one autograd node, and the choice of what computes it.

An engine is a module with `scan_forward` and `scan_backward`, with the arguments, shapes and
results that `equations` states: `equations` itself for backend "reference", and `ops`, which
launches the kernels, for backend "triton".
"""

import importlib.util
import os
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import TransformType, is_legacy_batchedtensor
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import forward_ad

from triton_gru import equations, onnx, ops, reference_ops
from triton_gru.plan import Problem
from triton_gru.tuning import planned

# Transforms of torch.func that an autograd.Function stands in the way of.
PLAIN_TORCH_ONLY = {TransformType.Vmap, TransformType.Jvp}
BACKENDS = ("auto", "triton", "torch", "reference")

# What regularises each step from within: no kernel, ours or torch's, takes it.
INSIDE_A_STEP = {
    "recurrent_dropout": "recurrent_dropout masks the state that enters each step's product",
    "zoneout": "zoneout holds elements of the state from step to step",
    "layer_norm": "layer_norm normalises the gates of each step over all units",
}

# Compute capabilities on which the kernels were measured (benchmarks/results). Elsewhere "auto"
# leaves them to those who ask by name: what no GPU has run is no default.
MEASURED_ON: frozenset[tuple[int, int]] = frozenset()


class Choice(NamedTuple):
    """A backend's name and, as a sentence, why it runs."""

    backend: str
    reason: str


def check_backend(backend: str, reset_after: bool) -> None:
    """Refuses what no input could make run.

    Raises:
        ValueError: The backend is unknown, or cannot compute the variant on any device.
    """
    if backend not in BACKENDS:
        raise ValueError(
            f"backend should be one of {', '.join(map(repr, BACKENDS))}, got: {backend!r}"
        )
    if backend == "torch" and not reset_after:
        raise ValueError(
            "backend='torch' computes reset_after=True only, as ATen and cuDNN have no other GRU; "
            "use backend='auto', 'triton' or 'reference' with reset_after=False"
        )


def choose_backend(
    backend: str,
    *,
    reset_after: bool,
    device: torch.device,
    dtype: torch.dtype,
    hidden_size: int,
    directions: int = 1,
    resets: bool = False,
    steps: int | torch.SymInt | None = None,
    regularised: Sequence[str] = (),
) -> Choice:
    """The backend that computes a layer, and why.

    Args:
        backend: What was asked for.
        reset_after: The variant.
        device: Of the input.
        dtype: What is computed in.
        hidden_size: H.
        directions: D.
        resets: Whether sequences begin inside rows.
        steps: T, or None where it does not matter, as in a cell.
        regularised: What of INSIDE_A_STEP is at work.

    Raises:
        ValueError: As `check_backend`.
        RuntimeError: The backend asked for by name cannot run here; the message says why.
    """
    check_backend(backend, reset_after)
    if regularised:
        why = f"{INSIDE_A_STEP[regularised[0]]}, which only the equations in plain torch do"
        if backend in ("torch", "triton"):
            raise RuntimeError(f"backend={backend!r} cannot run: {why}. Use backend='auto'")
        return Choice("reference", why)
    if onnx.exporting():
        return Choice("onnx", "torch.onnx.export is tracing, and ONNX has an operator")
    if backend in ("auto", "triton") and _transformed():
        return Choice("reference", "vmap and forward-mode derivatives take plain torch")
    torch_obstacle = _torch_obstacle(reset_after, device, resets, steps)
    if backend == "torch" and resets:
        raise RuntimeError(f"backend='torch' cannot run: {torch_obstacle}. Use backend='auto'")
    if backend in ("torch", "reference"):
        return Choice(backend, "it was asked for by name")
    obstacle = _triton_obstacle(device, dtype, hidden_size, reset_after, directions)
    if backend == "triton":
        if obstacle:
            raise RuntimeError(
                f"backend='triton' cannot run: {obstacle}. "
                "Use backend='auto' to take the best that can"
            )
        return Choice("triton", "it was asked for by name")
    obstacle = obstacle or _unmeasured(device)
    if obstacle is None:
        return Choice(
            "triton", f"its kernels take {dtype} at hidden_size={hidden_size} on {device}"
        )
    if torch_obstacle is None:
        library = "cuDNN" if device.type == "cuda" else "ATen"
        return Choice(
            "torch", f"{obstacle}, and torch's own GRU ({library}) computes reset_after=True"
        )
    return Choice("reference", f"{obstacle}, and {torch_obstacle}")


def _torch_obstacle(
    reset_after: bool,
    device: torch.device,
    resets: bool,
    steps: int | torch.SymInt | None,
) -> str | None:
    """Why "auto" does not take torch's own GRU, as the end of a sentence."""
    if not reset_after:
        return "torch has no kernel for reset_after=False"
    if resets:
        return "torch's own GRU cannot start anew inside a row"
    if device.type == "cpu" and steps is not None and _for_any_steps(steps):
        return "a graph of ATen's holds one number of steps"
    return None


# Constant for Dynamo, which need not trace how a plan is made: none of it depends on the sizes of a
# batch, as more rows are more groups, in further launches if need be.
@torch.compiler.assume_constant_result
def _triton_obstacle(
    device: torch.device, dtype: torch.dtype, hidden_size: int, reset_after: bool, directions: int
) -> str | None:
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the Triton kernels need a CUDA GPU and the tensors are on {device}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'triton-gru[triton]')"
    from triton_gru.kernels import engine

    return engine.obstacle(
        device=device,
        dtype=dtype,
        batch_size=1,
        hidden_size=hidden_size,
        reset_after=reset_after,
        directions=directions,
    )


@torch.compiler.assume_constant_result
def _unmeasured(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) in MEASURED_ON:
        return None
    return f"the Triton kernels have not been measured on a GPU like {device} (backend='triton')"


def explain_plan(
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int,
    hidden_size: int,
    reset_after: bool,
    directions: int,
) -> str:
    """How the kernels will compute a layer that they can compute, in a sentence."""
    from triton_gru.kernels import engine

    problem = Problem(
        batch_size,
        hidden_size,
        engine.DTYPES[dtype],
        reset_after,
        directions=directions,
        tensor_cores=engine.matrix_precision(dtype) != "ieee",
    )
    return planned(problem, engine.device_limits(device)).describe()


def recurrence(
    x: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    *,
    reset_after: bool,
    backend: str,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    save_gates: bool = False,
) -> tuple[Tensor, Tensor]:
    """One layer, all its directions (T steps, B rows, D directions).

    Args:
        x: [T, B, I].
        h0: [D, B, H].
        weight_ih: [D, 3H, I].
        weight_hh: [D, 3H, H].
        bias_ih: [D, 3H] or None.
        bias_hh: [D, 3H] or None.
        reset_after: The variant, see `equations`.
        backend: "reference", "triton" or "onnx", as `choose_backend` named it.
        lengths: Steps of each row, int64 [B] on x's device, or None where all rows have T.
        resets: Before which steps each direction starts anew, bool [T, B, D], or None; see
            `sequences.resets_of_directions`.
        save_gates: Whether the kernels keep the gates, three times y, for the backward.

    Returns:
        Every state [T, B, D, H], where a row past its end keeps its state, and the last state of
        each direction [D, B, H].
    """
    tensors = (x, h0, weight_ih, weight_hh, bias_ih, bias_hh)
    if backend == "onnx":
        return onnx.recurrence(*tensors, reset_after=reset_after, lengths=lengths, resets=resets)
    plain = lengths is None and resets is None
    if backend == "triton" and x.shape[0] == 1 and plain and not records(*tensors):
        return _step(*tensors, reset_after)
    if backend == "reference" and _transformed():
        with without_autocast(x.device):
            gates_x = _project(x, weight_ih, bias_ih)
            options = {"reset_after": reset_after, "lengths": lengths, "resets": resets}
            y = equations.scan_forward(gates_x, h0, weight_hh, bias_hh, **options)
    else:
        y, _ = _Recurrence.apply(*tensors, lengths, resets, reset_after, backend, save_gates)
    # A row past its end keeps its state, so the last state stands at the same step in every row.
    return y, torch.stack([y[0 if d else -1, :, d] for d in range(h0.shape[0])])


class _Recurrence(torch.autograd.Function):
    """Projection and scan of a layer; keeps x and y, and the gates if asked.

    The projection is inside so that gates_x, three times as large as y, need not be kept: the
    backward computes it anew. On two CPU cores at T64 B32 I256 H256 this adds 10 % to forward and
    backward together.
    """

    @staticmethod
    def forward(
        x,
        h0,
        weight_ih,
        weight_hh,
        bias_ih,
        bias_hh,
        lengths,
        resets,
        reset_after,
        backend,
        save_gates,
    ):
        with without_autocast(x.device):
            scan = (_project(x, weight_ih, bias_ih), h0, weight_hh, bias_hh)
            options = {"reset_after": reset_after, "lengths": lengths, "resets": resets}
            if save_gates and backend == "triton":
                return ops.scan_forward_saving_gates(*scan, **options)
            return _engine(backend, x.shape[0]).scan_forward(*scan, **options), None

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.reset_after, ctx.backend, _ = inputs
        y, gates_h = output
        if gates_h is not None:
            ctx.mark_non_differentiable(gates_h)
        ctx.save_for_backward(*tensors, y, gates_h)

    @staticmethod
    def backward(ctx, dy, _):
        *inputs, lengths, resets, y, gates_h = ctx.saved_tensors
        x, h0, weight_ih, weight_hh, bias_ih, bias_hh = inputs
        # With grad mode on, this derivative is to be differentiated, which kernels cannot be; nor
        # do they take the further dimension of vmap, torch.func's or that of is_grads_batched.
        plain = torch.is_grad_enabled() or _transformed(dy)
        engine = equations if plain else _engine(ctx.backend, x.shape[0])
        saved = {"gates_h": gates_h} if engine is ops and gates_h is not None else {}
        with without_autocast(x.device):
            d_gates_x, dh0, dweight_hh, dbias_hh = engine.scan_backward(
                dy,
                y,
                _project(x, weight_ih, bias_ih),
                h0,
                weight_hh,
                bias_hh,
                reset_after=ctx.reset_after,
                lengths=lengths,
                resets=resets,
                **saved,
            )
            dx = dweight_ih = dbias_ih = None
            # reshape and not flatten, here and in `equations`: is_grads_batched knows no flatten.
            T, B, D, G = d_gates_x.shape
            d_gates = d_gates_x.reshape(T, B, D * G)
            if ctx.needs_input_grad[0]:
                dx = d_gates @ weight_ih.flatten(0, 1)
            if ctx.needs_input_grad[2]:
                d_rows = d_gates.reshape(T * B, D * G)
                dweight_ih = (d_rows.t() @ x.flatten(0, 1)).reshape(weight_ih.shape)
            if bias_ih is not None:
                dbias_ih = d_gates_x.sum((0, 1))
        return dx, dh0, dweight_ih, dweight_hh, dbias_ih, dbias_hh, *[None] * 5


def _step(
    x: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    reset_after: bool,
) -> tuple[Tensor, Tensor]:
    """`recurrence` of a single step that nothing is derived from, as in decoding."""
    with without_autocast(x.device):
        gates_x = _project(x, weight_ih, bias_ih)[0]
        h = equations.stack(
            [
                ops.step(
                    gates_x[:, d],
                    h0[d],
                    weight_hh[d],
                    None if bias_hh is None else bias_hh[d],
                    reset_after,
                )
                for d in range(h0.shape[0])
            ]
        )
    return h.transpose(0, 1).unsqueeze(0), h


def _transformed(cotangent: Tensor | None = None) -> bool:
    """Whether vmap or a forward-mode derivative is at work, torch.func's or torch.autograd's."""
    if torch.compiler.is_compiling():
        return False
    if forward_ad._current_level >= 0:
        return True
    if cotangent is not None and is_legacy_batchedtensor(cotangent):
        return True
    kinds = {transform.key() for transform in retrieve_all_functorch_interpreters()}
    return not kinds.isdisjoint(PLAIN_TORCH_ONLY)


def records(*tensors: Tensor | None) -> bool:
    """Whether autograd will record what is computed from them."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _project(x: Tensor, weight_ih: Tensor, bias_ih: Tensor | None) -> Tensor:
    """gates_x [T, B, D, 3H], both directions in one product."""
    bias = None if bias_ih is None else bias_ih.flatten()
    return F.linear(x, weight_ih.flatten(0, 1), bias).unflatten(-1, weight_ih.shape[:2])


def _engine(backend: str, steps: int | torch.SymInt) -> ModuleType:
    if backend == "triton":
        return ops
    return reference_ops if _for_any_steps(steps) else equations


def _for_any_steps(steps: int | torch.SymInt) -> bool:
    """Whether a graph is being made that should hold for other numbers of steps as well.

    torch.compile is to trace once for all. torch.export writes torch's own operators, those of each
    step, unless the steps vary; its strict mode cannot tell.
    """
    if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
        return not isinstance(steps, int)
    return torch.compiler.is_compiling()


def without_autocast(device: torch.device) -> torch.autocast:
    """Where everything has been cast to one dtype already."""
    # The caller has cast everything to one dtype. Devices such as "meta" have no autocast.
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type if known else "cpu", enabled=False)
