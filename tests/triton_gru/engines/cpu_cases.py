"""Random layers and batches for the CPU engine, and their results by the equations."""

import random
from typing import NamedTuple

import pytest
import torch

from tests.tolerances import assert_close
from triton_gru import equations
from triton_gru.engines import varlen
from triton_gru.engines.cpu import library
from triton_gru.engines.cpu.engine import Layout
from triton_gru.engines.cpu.layer import layer

needs_library = pytest.mark.skipif(
    library.obstacle() is not None, reason=f"no CPU engine here: {library.obstacle()}"
)


class Case(NamedTuple):
    """A layer and a batch: tensors of time-major padded rows, and how the engine gets the rows."""

    tensors: list[torch.Tensor | None]  # x, h0, weight_ih, weight_hh, bias_ih, bias_hh
    lengths: torch.Tensor | None
    resets: torch.Tensor | None
    reset_after: bool
    form: str  # steps_first, rows_first or packed

    def batch_sizes(self):
        T, B = self.tensors[0].shape[:2]
        lengths = torch.full((B,), T) if self.lengths is None else self.lengths
        return (lengths > torch.arange(T).unsqueeze(1)).sum(1)

    def indices(self):
        sizes = self.batch_sizes()
        return varlen.indices(sizes, self.tensors[0].shape[1], int(sizes.sum()), sizes.device)[1]

    def given(self):
        """x, h0, params and the layout for `layer`, and the leaves in the order of `tensors`."""
        x, h0, *params = self.tensors
        stacked = [None if t is None else t.clone().requires_grad_() for t in params]
        by_direction = [t[d] for d in range(len(h0)) for t in stacked if t is not None]
        resets, sizes, lengths = self.resets, None, self.lengths
        if self.form == "packed":
            x, lengths, sizes = varlen.pack(x, self.indices()), None, self.batch_sizes()
            resets = None if resets is None else varlen.pack(resets, self.indices()).contiguous()
        elif lengths is not None:  # what is past the ends is not read
            past_end = equations.past_end(lengths, len(x)).unsqueeze(-1)
            x = x.masked_fill(past_end, torch.nan)
        if self.form == "rows_first":
            x = x.transpose(0, 1).contiguous()
            resets = None if resets is None else resets.transpose(0, 1).contiguous()
        x, h0 = x.clone().requires_grad_(), h0.clone().requires_grad_()
        layout = Layout(self.reset_after, sizes, lengths, resets, self.form == "rows_first")
        return (x, h0, by_direction, layout), [x, h0, *stacked]

    def padded(self, rows):
        """Time-major padded rows of what the engine returned or took."""
        if self.form == "packed":
            return varlen.pad(rows, self.indices(), *self.tensors[0].shape[:2])
        return rows.transpose(0, 1) if self.form == "rows_first" else rows

    def by_equations(self, tensors):
        x, h0, weight_ih, weight_hh, bias_ih, bias_hh = tensors
        gates_x = torch.einsum("tbi,dgi->tbdg", x, weight_ih) + (0 if bias_ih is None else bias_ih)
        y = equations.scan_forward(
            gates_x,
            *(h0, weight_hh, bias_hh),
            reset_after=self.reset_after,
            lengths=self.lengths,
            resets=self.resets,
        )
        last = torch.stack([y[0 if d else -1, :, d] for d in range(len(h0))])
        y = y.flatten(2)
        if self.lengths is not None:
            y = y.masked_fill(equations.past_end(self.lengths, len(y)).unsqueeze(-1), 0)
        return y, last


def draw(seed, **fixed):
    """A random case in float32."""
    choose = random.Random(seed)
    torch.manual_seed(seed)
    size = {
        "T": choose.choice([1, 2, 5, 9, 40]),
        "B": choose.choice([1, 2, 3, 5, 8, 17, 33]),
        "H": choose.choice([1, 5, 16, 17, 33, 64, 100, 300]),
        "I": choose.choice([1, 3, 16, 40, 300]),
        "D": choose.choice([1, 2]),
        "bias": choose.random() < 0.7,
        "ragged": choose.random() < 0.6,
        "resets": choose.random() < 0.4,
        "reset_after": choose.random() < 0.5,
        "form": choose.choice(["steps_first", "rows_first", "packed"]),
    } | fixed
    T, B, H, D = (size[name] for name in "TBHD")
    scale = max(1, H) ** -0.5
    tensors = [torch.randn(T, B, size["I"]), torch.randn(D, B, H)]
    tensors += [scale * (2 * torch.rand(D, 3 * H, n) - 1) for n in (size["I"], H)]
    tensors += [scale * torch.randn(D, 3 * H) if size["bias"] else None for _ in range(2)]
    lengths = None
    if size["ragged"]:
        lengths = torch.tensor([choose.randint(0, T) for _ in range(B)])
        if size["form"] == "packed":
            lengths = lengths.sort(descending=True).values
            lengths[0] = T
    resets = None
    if size["resets"]:
        resets = varlen.resets_of_directions(torch.rand(T, B) < 0.2, lengths, D)
    return Case(tensors, lengths, resets, size["reset_after"], size["form"])


def results(outputs, leaves, padded=lambda rows: rows):
    """y, last states, and the gradients by all leaves for the same cotangents in either dtype."""
    y, last = padded(outputs[0]), outputs[1]
    # By the root of the rows, as the gradients of weights are sums over rows.
    weights = (
        torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        / max(1, y.shape[0] * y.shape[1]) ** 0.5
    )
    loss = (y * weights).sum() + last.sin().sum()
    dx, *rest = torch.autograd.grad(loss, [t for t in leaves if t is not None])
    return [y, last, padded(dx), *rest]


def assert_agrees(case):
    """With the equations in float64, values and all gradients."""
    given, leaves = case.given()
    ours = results(layer(*given), leaves, case.padded)
    exact = [None if t is None else t.double().requires_grad_() for t in case.tensors]
    theirs = results(case.by_equations(exact), exact)
    assert_close([t.double() for t in ours], theirs, dtype=torch.float32)


def states_and_input_gradient(case):
    given, leaves = case.given()
    y = case.padded(layer(*given)[0])
    (dx,) = torch.autograd.grad(y.square().sum(), [leaves[0]])
    return y, case.padded(dx)
