"""The CPU engine: values and derivatives against the equations in float64, and bits."""

import copy
import os
import random
import subprocess
import sys
import threading
from typing import NamedTuple

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence

from tests.tolerances import assert_close
from triton_gru import GRU, equations, gru
from triton_gru.engines import varlen
from triton_gru.engines.cpu import engine, library
from triton_gru.engines.cpu.engine import Layout
from triton_gru.engines.cpu.layer import layer

needs_library = pytest.mark.skipif(
    library.obstacle() is not None, reason=f"no CPU engine here: {library.obstacle()}"
)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


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


@needs_library
@pytest.mark.parametrize("seed", range(60))
def test_agrees_with_the_equations_in_float64(seed, monkeypatch):
    case = draw(seed)
    torch.set_num_threads(1 + seed % 4)
    monkeypatch.setattr(engine, "ROWS_A_PIECE", (1, 16, 1024)[seed % 3])
    assert_agrees(case)


@needs_library
@pytest.mark.parametrize("none", ["B", "H", "I"])
@pytest.mark.parametrize("ragged", [True, False])
def test_sizes_of_zero(none, ragged):
    case = draw(
        1,
        **({"T": 3, "B": 2, "H": 4, "I": 5, "D": 2, "bias": True} | {none: 0}),
        ragged=ragged and none != "B",
        resets=False,
        form="steps_first",
    )
    assert_agrees(case)


@needs_library
@pytest.mark.parametrize("reset_after", [True, False])
def test_products_of_many_rows_and_columns(reset_after):
    """More rows than a pass over a panel takes, and a sum longer than one takes."""
    case = draw(11, T=3, B=150, H=210, I=170, D=1, ragged=True, resets=True, bias=True)
    case = case._replace(reset_after=reset_after)
    assert_agrees(case)


@needs_library
@pytest.mark.parametrize("steps", [1, 7])  # with few steps weights are not packed
@pytest.mark.parametrize("reset_after", [True, False])
@pytest.mark.parametrize("batch_size", [13, 150])
def test_a_row_has_the_same_bits_beside_other_rows_and_with_other_threads(
    reset_after, steps, batch_size
):
    # Enough work for several threads.
    case = draw(3, T=steps, B=batch_size, H=220, I=200, D=2, ragged=False, resets=False)
    case, whole = case._replace(reset_after=reset_after, form="steps_first"), []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        whole.append(states_and_input_gradient(case))
    for y, dx in whole[1:]:
        assert torch.equal(y, whole[0][0])
        assert torch.equal(dx, whole[0][1])
    for b in (0, 4, 12, batch_size - 1):
        x, h0, *params = case.tensors
        one = [x[:, b : b + 1], h0[:, b : b + 1].contiguous(), *params]
        y, dx = states_and_input_gradient(case._replace(tensors=one))
        assert torch.equal(y[:, 0], whole[0][0][:, b])
        assert torch.equal(dx[:, 0], whole[0][1][:, b])


@needs_library
def test_a_row_has_the_same_bits_padded_and_packed_and_without_padding():
    case = draw(9, T=11, B=7, H=50, I=30, D=2, ragged=True, resets=True, form="packed")
    y, dx = states_and_input_gradient(case)
    for form in ("steps_first", "rows_first"):
        y_padded, dx_padded = states_and_input_gradient(case._replace(form=form))
        assert torch.equal(y_padded, y)
        assert torch.equal(dx_padded, dx)
    x, h0, *params = case.tensors
    b, steps = next((b, int(n)) for b, n in enumerate(case.lengths) if 0 < n < 11)
    one = [x[:steps, b : b + 1], h0[:, b : b + 1].contiguous(), *params]
    resets = case.resets[:steps, b : b + 1].contiguous()
    alone = case._replace(tensors=one, lengths=None, resets=resets, form="steps_first")
    y_alone, dx_alone = states_and_input_gradient(alone)
    assert torch.equal(y_alone[:, 0], y[:steps, b])
    assert torch.equal(dx_alone[:, 0], dx[:steps, b])


def states_and_input_gradient(case):
    given, leaves = case.given()
    y = case.padded(layer(*given)[0])
    (dx,) = torch.autograd.grad(y.square().sum(), [leaves[0]])
    return y, case.padded(dx)


@needs_library
@pytest.mark.parametrize(
    "rows",
    [
        {"lengths": torch.tensor([3, 6])},
        {"lengths": torch.tensor([-1, 2])},
        {"batch_sizes": torch.tensor([1, 2, 2, 2, 3])},
        {"batch_sizes": torch.tensor([3, 2, 2, 2, 1])},
        {"batch_sizes": torch.tensor([2, 2, 2, 2, 1])},
    ],
    ids=str,
)
def test_rows_that_do_not_fit_are_refused_before_memory_is_read(rows):
    case = draw(2, T=5, B=2, H=3, I=4, D=1, ragged=False, resets=False, form="steps_first")
    (x, *rest, layout), _ = case.given()
    x = x.flatten(0, 1) if "batch_sizes" in rows else x
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"within 0 and 5|should not increase"):
        layer(x, *rest, layout._replace(**rows))


@needs_library
@pytest.mark.parametrize("name", ["weight_ih", "weight_hh", "bias_ih", "bias_hh"])
@pytest.mark.parametrize("cut", [0, 1])
def test_parameters_of_another_shape_are_refused_before_memory_is_written(name, cut):
    layer = GRU(4, 6, 2, backend="cpu")
    params = [p.detach().requires_grad_() for p in layer.parameters()]
    index = 4 + ("weight_ih", "weight_hh", "bias_ih", "bias_hh").index(name)
    short = params[index]
    if cut < short.dim():
        params[index] = short.detach().narrow(cut, 0, 1).clone().requires_grad_()
    else:
        params[index] = short.detach().repeat(2).requires_grad_()
    with pytest.raises(RuntimeError, match=r"Expected|size|shape"):
        gru(torch.randn(20, 2, 4), None, params, backend="cpu")


@needs_library
@pytest.mark.parametrize("change", ["strided", "expanded", "int32"])
def test_batch_sizes_of_another_layout(change):
    sizes = torch.tensor([4, 3, 2, 1, 2, 0, 2, 0])[::2]
    if change == "expanded":
        sizes = torch.tensor([3]).expand(4)
    if change == "int32":
        sizes = torch.tensor([4, 2, 2, 2], dtype=torch.int32)
    packed = PackedSequence(torch.randn(int(sizes.sum()), 5), sizes)
    layer = GRU(5, 6, backend="cpu")
    plain = PackedSequence(packed.data, sizes.long().clone())
    assert torch.equal(layer(packed)[0].data, layer(plain)[0].data)


@needs_library
def test_a_tensor_that_is_the_negative_of_its_memory():
    layer, x = GRU(4, 6, backend="cpu"), torch.randn(20, 2, 4)
    expected = layer(-x)[0]
    assert torch.equal(layer(torch._neg_view(x))[0], expected)
    layer.backend = "auto"
    assert_close(layer(torch._neg_view(x))[0], expected)


@needs_library
@pytest.mark.parametrize("of", ["y", "last"])
def test_vmap_over_the_derivatives_of_an_eager_call(of):
    layer, x = GRU(4, 6, backend="cpu"), torch.randn(5, 2, 4, requires_grad=True)
    y = layer(x)[0 if of == "y" else 1]
    cotangents = torch.randn(3, *y.shape)

    def derivative(cotangent):
        return torch.autograd.grad(y, [x], cotangent, retain_graph=True)[0]

    found = torch.func.vmap(derivative)(cotangents)
    assert_close(found, torch.stack([derivative(c) for c in cotangents]))


@needs_library
def test_a_second_derivative_beside_a_state_without_steps_that_is_not_finite():
    layer = GRU(4, 6, backend="cpu")
    x, hx = torch.randn(5, 3, 4, requires_grad=True), torch.randn(1, 3, 6)
    hx[0, 1] = torch.nan
    y, _ = layer(x, hx, lengths=torch.tensor([5, 0, 4]))
    params = list(layer.parameters())
    first = torch.autograd.grad(y.sin().sum(), params, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), params)
    assert all(g.isfinite().all() for g in (*first, *second))


@needs_library
@pytest.mark.parametrize("name", ["lengths", "resets", "batch_sizes"])
def test_rows_changed_in_place_before_the_backward_are_found(name):
    form = "packed" if name == "batch_sizes" else "steps_first"
    case = draw(4, T=5, B=3, H=4, I=2, D=1, ragged=True, resets=True, form=form)
    given, _ = case.given()
    y, _ = layer(*given)
    getattr(given[-1], name).zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@needs_library
@pytest.mark.parametrize("reset_after", [True, False])
@pytest.mark.parametrize("form", ["steps_first", "rows_first", "packed"])
def test_bfloat16_is_computed_in_float32(reset_after, form):
    torch.manual_seed(6)
    layer = GRU(8, 20, 2, batch_first=form == "rows_first", reset_after=reset_after)
    layer = layer.bfloat16()
    x = torch.randn(3, 30, 8) if layer.batch_first else torch.randn(30, 3, 8)
    x = x.bfloat16().requires_grad_()
    given = x
    if form == "packed":
        given = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor([30, 20, 1]))
    found = derived(layer, given, x)
    assert "Backend 'cpu'" in layer.explain(given)
    assert {t.dtype for t in found} == {torch.bfloat16}
    exact = copy.deepcopy(layer).double()
    exact.backend = "reference"
    x64 = x.detach().double().requires_grad_()
    given = x64
    if form == "packed":
        given = torch.nn.utils.rnn.pack_padded_sequence(x64, torch.tensor([30, 20, 1]))
    assert_close([t.double() for t in found], derived(exact, given, x64), dtype=torch.bfloat16)


def derived(layer, given, x):
    y, h_n = layer(given)
    y = y.data if isinstance(y, torch.nn.utils.rnn.PackedSequence) else y
    loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum() + h_n.sum()
    return [y, h_n, *torch.autograd.grad(loss, [x, *layer.parameters()])]


@needs_library
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e-42, 3e38])
@pytest.mark.parametrize("reset_after", [True, False])
def test_values_at_the_ends_of_a_float(value, reset_after):
    case = draw(5, T=3, B=4, H=20, I=6, D=1, ragged=False, resets=False, bias=True)
    case = case._replace(reset_after=reset_after, form="steps_first")
    case.tensors[0][1, 2, 3] = value
    given, _ = case.given()
    y, _ = layer(*given)
    expected, _ = case.by_equations(case.tensors)
    assert torch.equal(y.isnan(), expected.isnan())
    assert_close(y.detach().nan_to_num(), expected.nan_to_num())
    assert torch.isfinite(y[:, [0, 1, 3]]).all()


@needs_library
@pytest.mark.parametrize("form", ["steps_first", "rows_first", "packed"])
@pytest.mark.parametrize("ragged", [True, False])
def test_a_second_derivative(form, ragged):
    case = draw(1, T=4, B=3, H=5, I=3, bias=True, form=form, ragged=ragged)
    given, leaves = case.given()

    def second(outputs, leaves):
        first = torch.autograd.grad(outputs[0].sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    ours = [*second(layer(*given), leaves)]
    ours[0] = case.padded(ours[0])
    exact = [t.double().requires_grad_() for t in case.tensors]
    theirs = second(case.by_equations(exact), exact)
    assert_close([t.double() for t in ours], theirs, dtype=torch.float32)


@needs_library
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_computes_and_ends():
    """OpenMP's threads are not there in a child, as in a worker of a DataLoader."""
    case = draw(7, T=3, B=16, H=40, I=8, D=2, ragged=False, resets=False)
    torch.set_num_threads(2)
    given, _ = case.given()
    with torch.no_grad():
        y, _ = layer(*given)
        child = os.fork()
        if child == 0:
            again, _ = layer(*given)
            os._exit(0 if torch.equal(again, y) else 3)
    killer = threading.Timer(60, os.kill, (child, 9))
    killer.start()
    _, status = os.waitpid(child, 0)
    killer.cancel()
    assert os.waitstatus_to_exitcode(status) == 0


@needs_library
@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_no_access_outside_a_buffer_and_no_undefined_behaviour(tmp_path):
    """The tests of values and bits once more, in a process with the compiler's sanitizers."""
    compiler = os.environ.get("CC") or "cc"
    runtime = subprocess.run(
        [compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not os.path.isabs(runtime):  # the name alone comes back where there is no such file
        pytest.skip(f"{compiler} has no address sanitizer")
    tests = ["agrees_with", "products_of", "same_bits", "ends_of_a_float", "do_not_fit"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.triton_gru.engines.sanitized"]
    done = subprocess.run(
        [*command, "-s", "-p", "no:cacheprovider", "-k", " or ".join(tests), __file__],
        env={
            **os.environ,
            "LD_PRELOAD": runtime,
            "ASAN_OPTIONS": "detect_leaks=0",  # Python's own, at its end
            "TRITON_GRU_CACHE": str(tmp_path),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout
