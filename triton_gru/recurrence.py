"""One layer of the recurrence as one autograd node.

An engine is a module with `scan_forward` and `scan_backward`, with the arguments, shapes and
results that `equations` states: `equations` itself for backend "reference", and `ops`, which
launches the kernels, for backend "triton".
"""

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_gru import equations, onnx, ops, reference_ops
from triton_gru.autocast import without_autocast
from triton_gru.backends import for_any_steps, transformed


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
        Every state [T, B, D * H], where a row past its end keeps its state, and the last state of
        each direction [D, B, H].
    """
    tensors = (x, h0, weight_ih, weight_hh, bias_ih, bias_hh)
    if backend == "onnx":
        return onnx.recurrence(*tensors, reset_after=reset_after, lengths=lengths, resets=resets)
    plain = lengths is None and resets is None
    if backend == "triton" and x.shape[0] == 1 and plain and not records(*tensors):
        return _step(*tensors, reset_after)
    if backend == "reference" and (transformed() or torch.jit.is_tracing()):
        # In torch.jit.trace's graph a Function is a call of Python, which cannot be saved.
        engine = equations if transformed() else reference_ops
        with without_autocast(x.device):
            gates_x = _project(x, weight_ih, bias_ih)
            options = {"reset_after": reset_after, "lengths": lengths, "resets": resets}
            y = engine.scan_forward(gates_x, h0, weight_hh, bias_hh, **options).flatten(2)
    else:
        y, _ = _Recurrence.apply(*tensors, lengths, resets, reset_after, backend, save_gates)
    # A row past its end keeps its state, so the last state stands at the same step in every row.
    D, _, H = h0.shape
    return y, torch.stack([y[0 if d else -1, :, d * H : (d + 1) * H] for d in range(D)])


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
                y, gates_h = ops.scan_forward_saving_gates(*scan, **options)
            else:
                y, gates_h = _engine(backend, x.shape[0]).scan_forward(*scan, **options), None
        # As the layer returns it: users detach and change it in place, which autograd refuses for
        # a view, and notices for what the backward has kept only if that is the very tensor.
        return y.flatten(2).detach(), gates_h

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
        plain = torch.is_grad_enabled() or transformed(dy)
        engine = equations if plain else _engine(ctx.backend, x.shape[0])
        # reshape and not flatten, here and in `equations`: is_grads_batched knows no flatten.
        by_direction = (*x.shape[:2], *weight_hh.shape[::2])
        saved = {"gates_h": gates_h} if engine is ops and gates_h is not None else {}
        with without_autocast(x.device):
            d_gates_x, dh0, dweight_hh, dbias_hh = engine.scan_backward(
                dy.reshape(by_direction),
                y.reshape(by_direction),
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
    return h.transpose(0, 1).flatten(1).unsqueeze(0).detach(), h


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
    return reference_ops if for_any_steps(steps) else equations
