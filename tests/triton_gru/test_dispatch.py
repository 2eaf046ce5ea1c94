"""Which backend runs, what explain says of it, and what the package needs to be imported."""

import subprocess
import sys
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from tests.tolerances import assert_close
from triton_gru import GRU, GRUCell, dispatch, equations, functional
from triton_gru.dispatch import choose_backend
from triton_gru.engines import autograd
from triton_gru.engines.cpu import library, rule
from triton_gru.engines.cpu.layer import layer as cpu_layer


@pytest.fixture
def cpu_engine_from_one_step_on(monkeypatch):
    """The rule of "auto" on a CPU with AVX-512; conftest.py changes it for other tests."""
    caches = (dispatch._choose_on_cpu, rule.ranges)
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setitem(rule.PRODUCT, torch.float32, 2**22)
    yield
    for cache in caches:
        cache.cache_clear()


WITHOUT_TRITON = """
import runpy, sys

# As importlib.util.find_spec sees what is not installed, which torch 2.14 asks about triton.
absent = dict.fromkeys(("triton", "lightning", "lightning_module", "hydra"))
sys.modules |= absent
import torch
before = set(sys.modules)
import triton_gru
# Dynamo takes as long to import as torch itself.
new = {name for name in set(sys.modules) - before if not name.startswith("triton_gru")}
assert not any(name.startswith(("torch._dynamo", "torch._inductor")) for name in new), new
for reset_after in (True, False):
    layer = triton_gru.GRU(3, 4, reset_after=reset_after)
    layer(torch.randn(2, 1, 3))[0].sum().backward()
assert all(sys.modules[name] is None for name in absent)
assert triton_gru.__version__ == runpy.run_path(triton_gru.version.__file__)["__version__"]
print("ran")
"""


@pytest.mark.compat("beyond", "use without triton installed", "works")
def test_import_and_use_need_no_triton():
    process = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False
    )
    assert process.stdout.strip() == "ran", process.stderr


def choose(backend="auto", device="cuda", reset_after=True, resets=False, **known):
    return choose_backend(
        backend,
        reset_after=reset_after,
        device=torch.device(device),
        dtype=torch.float32,
        hidden_size=5,
        resets=resets,
        **known,
    )


@pytest.fixture
def engine(monkeypatch):
    """Stands in for the kernels: the equations, on any device, with an obstacle to be set."""

    def scan_forward(*scan):
        *tensors, reset_after, lengths, resets, _, _ = scan
        options = {"reset_after": reset_after, "lengths": lengths, "resets": resets}
        return equations.scan_forward(*tensors, **options), None

    def scan_backward(*scan):
        *tensors, reset_after, lengths, resets, _, _ = scan
        options = {"reset_after": reset_after, "lengths": lengths, "resets": resets}
        return equations.scan_backward(*tensors, **options)

    engine = types.SimpleNamespace(
        scan_forward=scan_forward, scan_backward=scan_backward, obstacle=lambda *layer: None
    )
    monkeypatch.setattr(autograd, "operators", engine)
    monkeypatch.setattr(dispatch, "_triton_obstacle", lambda *layer: engine.obstacle(*layer))
    monkeypatch.setattr(dispatch, "_needs_verdict", lambda device: False)
    monkeypatch.setattr(dispatch, "_choose_on_cpu", dispatch._choose)  # the obstacle changes
    return engine


@pytest.mark.parametrize(
    ("reset_after", "device", "expected"),
    [
        (True, "cpu", "torch"),
        (False, "cpu", "reference"),
        (True, "cuda", "torch"),
        (False, "cuda", "reference"),
    ],
)
@pytest.mark.compat("arguments", "backend", "works better", "`auto`, or one by name")
def test_auto_without_kernels(reset_after, device, expected, monkeypatch):
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    obstacle = dispatch._triton_obstacle
    monkeypatch.setattr(
        dispatch,
        "_triton_obstacle",
        lambda device, *layer: (
            obstacle(device, *layer) if device.type == "cpu" else "no kernels here"
        ),
    )
    choice = choose(reset_after=reset_after, device=device)
    assert choice.backend == expected
    assert ("a CUDA GPU" if device == "cpu" else "no kernels here") in choice.reason


def test_triton_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    with pytest.raises(RuntimeError, match=r"need a CUDA GPU and the tensors are on cpu.*'auto'"):
        choose("triton", device="cpu")
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        choose("triton")


def test_layer_with_backend_triton_raises_on_a_cpu(monkeypatch):
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    layer = GRU(3, 5, backend="triton")  # may be built before it is moved to a GPU
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot run: .*CUDA GPU"):
        layer(torch.zeros(2, 1, 3))
    assert layer.explain().startswith("No backend will run. backend='triton' cannot run: ")


def test_kernels_are_taken_where_they_have_no_obstacle(engine):
    assert choose(device="cuda").backend == "triton"
    engine.obstacle = lambda device, dtype, hidden_size, *layer: (
        f"hidden_size={hidden_size} is too large"
    )
    assert choose(device="cuda") == (
        "torch",
        "hidden_size=5 is too large, and torch's own GRU (cuDNN) computes reset_after=True",
    )
    with pytest.raises(RuntimeError, match="hidden_size=5 is too large"):
        choose("triton")


@pytest.mark.parametrize("reset_after", [True, False])
def test_the_engine_computes_forward_and_backward_but_no_second_derivative(engine, reset_after):
    calls = []

    def counted(function):
        def call(*args, **kwargs):
            calls.append((function.__name__, torch.is_grad_enabled()))
            return function(*args, **kwargs)

        return call

    engine.scan_forward = counted(engine.scan_forward)
    engine.scan_backward = counted(engine.scan_backward)
    layer = GRU(3, 5, reset_after=reset_after, backend="triton", dtype=torch.float64)
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)

    def gradient(create_graph):
        return torch.autograd.grad(layer(x)[0].sin().sum(), x, create_graph=create_graph)[0]

    first = gradient(False)
    assert calls == [("scan_forward", False), ("scan_backward", False)]
    recorded = gradient(True)
    assert calls[2:] == [("scan_forward", False)]
    assert_close(recorded, first)
    recorded.square().sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "Backend 'torch' will run: the Triton kernels need a CUDA GPU and the tensors are on"),
        ({"backend": "reference"}, "Backend 'reference' will run: it was asked for by name."),
        ({"reset_after": False, "dtype": torch.float64}, "no kernel for reset_after=False."),
    ],
)
@pytest.mark.compat("beyond", "explain", "works better", "which backend runs, and why")
def test_explain(options, text, monkeypatch):
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    layer = GRU(3, 5, **options)
    for x in (None, torch.zeros(2, 3), torch.zeros(2, 1, 3)):
        assert text in layer.explain(None if x is None else x.to(layer.weight_ih_l0.dtype))


needs_cpu_engine = pytest.mark.skipif(
    library.obstacle() is not None, reason=f"no CPU engine here: {library.obstacle()}"
)


@needs_cpu_engine
@pytest.mark.compat("beyond", "speed on a CPU", "works better", "an engine in C, from 16 steps on")
@pytest.mark.parametrize(
    ("T", "B", "H", "options", "given", "grad", "expected"),
    [
        (15, 3, 5, {}, {}, True, "torch"),
        (16, 1, 5, {}, {}, True, "cpu"),
        (16, 1, 256, {}, {}, False, "cpu"),
        (16, 8, 257, {}, {}, True, "cpu"),
        (16, 9, 257, {}, {}, True, "torch"),
        (16, 1, 257, {}, {}, False, "torch"),
        (17, 1, 257, {}, {}, False, "cpu"),
        (64, 5, 5, {"num_layers": 2, "bidirectional": True, "batch_first": True}, {}, True, "cpu"),
        (64, 7, 513, {}, {}, False, "torch"),
        (64, 7, 513, {}, {}, True, "cpu"),
        (64, 8, 513, {}, {}, False, "cpu"),
        (512, 1, 513, {}, {}, False, "cpu"),
        (32, 32, 512, {}, {}, True, "cpu"),
        (32, 33, 512, {}, {}, True, "torch"),
        (16, 64, 256, {}, {}, True, "cpu"),
        (31, 65, 256, {}, {}, True, "torch"),
        (32, 128, 256, {}, {}, True, "cpu"),
        (64, 9, 1024, {}, {}, True, "torch"),
        (1, 4, 512, {}, {}, False, "cpu"),
        (4, 16, 512, {}, {}, False, "cpu"),
        (1, 4, 512, {}, {}, True, "torch"),
        (1, 3, 512, {}, {}, False, "torch"),
        (1, 17, 512, {}, {}, False, "torch"),
        (5, 4, 512, {}, {}, False, "torch"),
        (1, 4, 511, {}, {}, False, "torch"),
        (1, 1, 5, {"reset_after": False}, {}, True, "cpu"),
        (1, 1, 5, {}, {"resets": torch.zeros(1, 1, dtype=torch.bool)}, True, "cpu"),
        (64, 1, 5, {"dtype": torch.float64}, {}, True, "torch"),
        (64, 1, 5, {"dtype": torch.bfloat16}, {}, True, "cpu"),
        (64, 8, 257, {"dtype": torch.bfloat16}, {}, True, "torch"),
        (1, 8, 512, {"dtype": torch.bfloat16}, {}, False, "torch"),
        (64, 1, 5, {"zoneout": 0.5}, {}, True, "reference"),
    ],
)
def test_where_auto_takes_the_cpu_engine(T, B, H, options, given, grad, expected, monkeypatch):
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    layer = GRU(3, H, **options)
    shape = (B, T, 3) if layer.batch_first else (T, B, 3)
    x = torch.zeros(shape, dtype=layer.weight_ih_l0.dtype)
    calls = []
    monkeypatch.setattr(
        functional, "cpu_layer", lambda *a, **k: calls.append(1) or cpu_layer(*a, **k)
    )
    with torch.set_grad_enabled(grad):
        assert f"Backend {expected!r} will run" in layer.explain(x, **given)
        layer(x, **given)
    assert bool(calls) == (expected == "cpu")


@pytest.mark.parametrize(
    ("dtype", "H", "expected"),
    [
        (
            torch.float32,
            64,
            "at least 16 steps with a batch_size up to 1024, or at least 32 steps "
            "with a batch_size up to 2048",
        ),
        (
            torch.float32,
            512,
            "at least 32 steps with a batch_size up to 32, or at least 16 steps with a batch_size "
            "up to 8 (without gradients: at least 32 steps with a batch_size up to 32, or 1 to 4 "
            "steps with a batch_size of 4 to 16)",
        ),
        (
            torch.bfloat16,
            300,
            "at least 19 steps with a batch_size up to 5, or at least 16 steps with a batch_size "
            "up to 5 (without gradients: at least 19 steps with a batch_size up to 5)",
        ),
        (torch.bfloat16, 725, "no input"),
    ],
)
def test_the_rule_in_words(dtype, H, expected):
    assert rule.sentence(dtype, H) == expected


@needs_cpu_engine
def test_a_cell_takes_the_cpu_engine_where_a_step_of_the_layer_does(monkeypatch):
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    cell, layer = GRUCell(3, 512), GRU(3, 512)
    for B, grad, expected in ((4, False, "cpu"), (4, True, "torch"), (3, False, "torch")):
        x = torch.zeros(B, 3)
        with torch.set_grad_enabled(grad):
            assert f"Backend {expected!r} will run" in cell.explain(x)
            assert f"Backend {expected!r} will run" in layer.explain(x.unsqueeze(0))
    with torch.no_grad():
        x, h = torch.randn(4, 3), torch.randn(4, 512)
        assert_close(cell(x, h), cell.to_torch()(x, h))


@needs_cpu_engine
def test_packed_rows_count_by_their_longest():
    layer = GRU(3, 5)
    rows = [torch.zeros(n, 3) for n in (16, 2)]
    assert "Backend 'cpu'" in layer.explain(torch.nn.utils.rnn.pack_sequence(rows))
    rows = [torch.zeros(9, 3) for _ in range(2)]  # 18 rows, 9 steps
    assert "Backend 'torch'" in layer.explain(torch.nn.utils.rnn.pack_sequence(rows))


class Subclass(torch.Tensor):
    """A tensor that brings its own operators, or could."""


@needs_cpu_engine
def test_auto_leaves_to_torch_what_c_code_would_not_see():
    """Operators that a mode or a subclass is to see, products that autocast makes 16-bit."""
    layer, x = GRU(3, 5), torch.randn(64, 2, 3)
    with FlopCounterMode(display=False) as flops:
        layer(x)
    assert flops.get_total_flops() > 0
    with torch.autocast("cpu"):
        assert "Backend 'torch'" in layer.explain(x)
        theirs = layer.to_torch()(x)[0]
        assert torch.equal(layer(x)[0], theirs)
    assert "Backend 'torch'" in layer.explain(x.as_subclass(Subclass))
    with FakeTensorMode():
        assert GRU(3, 5)(torch.randn(64, 2, 3))[0].shape == (64, 2, 5)
        with pytest.raises(RuntimeError, match=r"cannot run: .* reads memory"):
            GRU(3, 5, backend="cpu")(torch.randn(64, 2, 3))


def test_auto_without_a_compiler_is_torch_and_explain_says_so(monkeypatch):
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    monkeypatch.setattr(library, "obstacle", lambda: "the CPU engine needs a C compiler")
    text = GRU(3, 5).explain(torch.zeros(64, 1, 3))
    assert "Backend 'torch' will run" in text and "but the CPU engine needs a C compiler." in text


RESETS = {"resets": torch.ones(2, 1, dtype=torch.bool)}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_resets_go_to_the_equations_where_no_kernel_takes_them(device, engine):
    engine.obstacle = lambda *layer: "no kernels here"
    choice = choose(device=device, resets=True)
    assert choice.backend == "reference"
    assert "torch's own GRU cannot reset its state inside a row" in choice.reason
    engine.obstacle = lambda *layer: None
    assert choose(device=device, resets=True).backend == "triton"


def test_explain_takes_lengths_and_resets(monkeypatch):
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    layer, x = GRU(3, 5), torch.zeros(2, 1, 3)
    packed = torch.nn.utils.rnn.pack_sequence([torch.zeros(2, 3)])
    for text in (layer.explain(packed), layer.explain(x, lengths=torch.tensor([1]))):
        assert "Backend 'torch' will run" in text
    text = layer.double().explain(x.double(), **RESETS)
    assert "Backend 'reference' will run" in text
    assert "torch's own GRU cannot reset its state inside a row." in text


@pytest.mark.compat("beyond", "resets", "works better")
def test_torch_by_name_refuses_resets():
    layer, x = GRU(3, 5, backend="torch"), torch.zeros(2, 1, 3)
    with pytest.raises(RuntimeError, match=r"backend='torch' cannot run: .*Use backend='auto'"):
        layer(x, **RESETS)
    assert layer.explain(x, **RESETS).startswith("No backend will run. backend='torch'")


def test_explain_asks_for_the_input_as_given(engine):
    engine.obstacle = lambda device, dtype, hidden_size, reset_after, directions: (
        f"{hidden_size} x {directions} of {dtype}"
    )
    layer = GRU(3, 5, batch_first=True, bidirectional=True)
    x = torch.zeros(4, 2, 3)
    assert "5 x 2 of torch.bfloat16" in layer.bfloat16().explain(x.bfloat16())
    layer.float().backend = "triton"
    with pytest.raises(RuntimeError, match=r"5 x 2 of torch\.float32"):
        layer(x)
    assert "on meta" not in layer.explain()
