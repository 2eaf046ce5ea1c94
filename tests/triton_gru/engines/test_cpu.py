"""The CPU engine: values and derivatives against the equations in float64, bits, and its build."""

import os
import random
import stat
import subprocess
import sys
import threading

import pytest
import torch

from tests.tolerances import assert_close
from triton_gru import equations
from triton_gru.engines import varlen
from triton_gru.engines.cpu import engine, library
from triton_gru.engines.cpu.layer import layer
from triton_gru.engines.varlen import PackedRows

needs_library = pytest.mark.skipif(
    library.obstacle() is not None, reason=f"no CPU engine here: {library.obstacle()}"
)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def draw(seed, **fixed):
    """A random layer and batch: tensors in float32, packed rows, resets, the variant."""
    choose = random.Random(seed)
    torch.manual_seed(seed)
    size = {
        "T": choose.choice([1, 2, 5, 9, 40]),
        "B": choose.choice([1, 2, 3, 5, 8, 17, 33]),
        "H": choose.choice([1, 5, 16, 17, 33, 64, 100, 300]),
        "I": choose.choice([1, 3, 16, 40, 300]),
        "D": choose.choice([1, 2]),
        "bias": choose.random() < 0.7,
        "ragged": choose.random() < 0.5,
        "resets": choose.random() < 0.4,
        "reset_after": choose.random() < 0.5,
    } | fixed
    T, B, H, D = (size[name] for name in "TBHD")
    scale = H**-0.5
    tensors = [torch.randn(T, B, size["I"]), torch.randn(D, B, H)]
    tensors += [scale * (2 * torch.rand(D, 3 * H, n) - 1) for n in (size["I"], H)]
    tensors += [scale * torch.randn(D, 3 * H) if size["bias"] else None for _ in range(2)]
    lengths = None
    if size["ragged"]:
        lengths = torch.tensor(sorted((choose.randint(0, T) for _ in range(B)), reverse=True))
        lengths[0] = T
    resets = None
    if size["resets"]:
        resets = varlen.resets_of_directions(torch.rand(T, B) < 0.2, lengths, D)
    rows = PackedRows.whole(T, B) if lengths is None else PackedRows.of(lengths, T)
    return tensors, rows, resets, size["reset_after"]


def packed(tensors, rows, resets):
    """The same with packed rows, as `layer` takes them: x, h0, params and keywords; and leaves."""
    x, h0, *params = tensors
    pack = varlen.pack
    stacked = [None if t is None else t.clone().requires_grad_() for t in params]
    by_direction = [t[d] for d in range(len(h0)) for t in stacked if t is not None]
    x = pack(x, rows.indices()).clone().requires_grad_()
    h0 = h0.clone().requires_grad_()
    resets = None if resets is None else pack(resets, rows.indices()).contiguous()
    return (x, h0, by_direction), {"rows": rows, "resets": resets}, [x, h0, *stacked]


def by_equations(tensors, rows, resets, reset_after):
    x, h0, weight_ih, weight_hh, bias_ih, bias_hh = tensors
    gates_x = torch.einsum("tbi,dgi->tbdg", x, weight_ih) + (0 if bias_ih is None else bias_ih)
    y = equations.scan_forward(
        gates_x,
        *(h0, weight_hh, bias_hh),
        reset_after=reset_after,
        lengths=rows.lengths,
        resets=resets,
    )
    last = torch.stack([y[0 if d else -1, :, d] for d in range(len(h0))])
    return varlen.pack(y.flatten(2), rows.indices()), last


def results(outputs, leaves):
    """y, last states, and the gradients by all leaves for the same cotangents in either dtype."""
    y, last = outputs
    # By the root of the rows, as the gradients of weights are sums over rows.
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y) / len(y) ** 0.5
    loss = (y * weights).sum() + last.sin().sum()
    return [y, last, *torch.autograd.grad(loss, [t for t in leaves if t is not None])]


@needs_library
@pytest.mark.parametrize("seed", range(60))
def test_agrees_with_the_equations_in_float64(seed, monkeypatch):
    tensors, rows, resets, reset_after = draw(seed)
    torch.set_num_threads(1 + seed % 4)
    monkeypatch.setattr(engine, "ROWS_A_PIECE", (1, 16, 1024)[seed % 3])
    given, where, leaves = packed(tensors, rows, resets)
    ours = results(layer(*given, **where, reset_after=reset_after), leaves)
    exact = [None if t is None else t.double().requires_grad_() for t in tensors]
    theirs = results(by_equations(exact, rows, resets, reset_after), exact)
    theirs[2] = varlen.pack(theirs[2], rows.indices())
    assert_close([t.double() for t in ours], theirs, dtype=torch.float32)


@needs_library
@pytest.mark.parametrize("steps", [1, 7])  # with few steps weights are not packed
@pytest.mark.parametrize("reset_after", [True, False])
def test_a_row_has_the_same_bits_beside_other_rows_and_with_other_threads(reset_after, steps):
    # Enough work for several threads.
    tensors, rows, _, _ = draw(3, T=steps, B=13, H=220, I=200, D=2, ragged=False, resets=False)
    alone, whole = PackedRows.whole(steps, 1), []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        given, where, leaves = packed(tensors, rows, None)
        y, _ = layer(*given, **where, reset_after=reset_after)
        (dx,) = torch.autograd.grad(y.square().sum(), [leaves[0]])
        whole.append((y.view(steps, 13, -1), dx.view(steps, 13, -1)))
    for y, dx in whole[1:]:
        assert torch.equal(y, whole[0][0])
        assert torch.equal(dx, whole[0][1])
    for b in (0, 4, 12):
        one = [tensors[0][:, b : b + 1], tensors[1][:, b : b + 1].contiguous(), *tensors[2:]]
        given, where, leaves = packed(one, alone, None)
        y, _ = layer(*given, **where, reset_after=reset_after)
        (dx,) = torch.autograd.grad(y.square().sum(), [leaves[0]])
        assert torch.equal(y, whole[0][0][:, b])
        assert torch.equal(dx, whole[0][1][:, b])


@needs_library
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e-42, 3e38])
@pytest.mark.parametrize("reset_after", [True, False])
def test_values_at_the_ends_of_a_float(value, reset_after):
    tensors, rows, _, _ = draw(5, T=3, B=4, H=20, I=6, D=1, ragged=False, resets=False, bias=True)
    tensors[0][1, 2, 3] = value
    given, where, _ = packed(tensors, rows, None)
    y, _ = layer(*given, **where, reset_after=reset_after)
    expected, _ = by_equations(tensors, rows, None, reset_after)
    assert torch.equal(y.isnan(), expected.isnan())
    assert_close(y.detach().nan_to_num(), expected.nan_to_num())
    assert torch.isfinite(y.view(3, 4, -1)[:, [0, 1, 3]]).all()


@needs_library
@pytest.mark.parametrize("seed", [1, 2])
def test_a_second_derivative(seed):
    tensors, rows, resets, reset_after = draw(seed, T=4, B=3, H=5, I=3, bias=True)
    given, where, leaves = packed(tensors, rows, resets)

    def second(outputs, leaves):
        first = torch.autograd.grad(outputs[0].sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    ours = second(layer(*given, **where, reset_after=reset_after), leaves)
    exact = [t.double().requires_grad_() for t in tensors]
    theirs = [*second(by_equations(exact, rows, resets, reset_after), exact)]
    theirs[0] = varlen.pack(theirs[0], rows.indices())
    assert_close([t.double() for t in ours], theirs, dtype=torch.float32)


@needs_library
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_computes_and_ends():
    """OpenMP's threads are not there in a child, as in a worker of a DataLoader."""
    tensors, rows, _, reset_after = draw(7, T=3, B=16, H=40, I=8, D=2, ragged=False, resets=False)
    torch.set_num_threads(2)
    given, where, _ = packed(tensors, rows, None)
    with torch.no_grad():
        y, _ = layer(*given, **where, reset_after=reset_after)
        child = os.fork()
        if child == 0:
            again, _ = layer(*given, **where, reset_after=reset_after)
            os._exit(0 if torch.equal(again, y) else 3)
    killer = threading.Timer(60, os.kill, (child, 9))
    killer.start()
    _, status = os.waitpid(child, 0)
    killer.cancel()
    assert os.waitstatus_to_exitcode(status) == 0


# ---- the build -------------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A cache directory of its own, in which nothing is built."""
    monkeypatch.setenv("TRITON_GRU_CACHE", str(tmp_path))
    for function in (library.library, library.obstacle):
        function.cache_clear()
    yield tmp_path
    for function in (library.library, library.obstacle):
        function.cache_clear()


def test_it_can_be_turned_off(fresh, monkeypatch):
    monkeypatch.setenv("TRITON_GRU_CPU", "0")
    assert "TRITON_GRU_CPU=0" in library.obstacle()
    assert not list(fresh.iterdir())


def test_a_machine_without_a_compiler(fresh, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert "needs a C compiler" in library.obstacle()


@needs_library
def test_a_compiler_that_fails_is_named_with_what_it_said(fresh, monkeypatch):
    compiler = fresh / "broken-cc"
    compiler.write_text("#!/bin/sh\necho 'x.c:1: error: no such thing' >&2\nexit 1\n")
    compiler.chmod(0o700)
    monkeypatch.setenv("CC", str(compiler))
    assert "broken-cc cannot build the CPU engine: x.c:1: error" in library.obstacle()
    assert [p.name for p in (fresh / "cpu").iterdir()] == ["lock"]


@needs_library
def test_a_directory_that_others_can_write_to_is_refused(fresh):
    (fresh / "cpu").mkdir()
    (fresh / "cpu").chmod(0o777)
    assert "can be written by others" in library.obstacle()


@needs_library
def test_processes_at_once_build_it_once(fresh):
    code = (
        "import logging, sys; logging.basicConfig(level=logging.INFO, stream=sys.stdout);"
        "from triton_gru.engines.cpu import library; assert library.obstacle() is None"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [run.communicate(timeout=240)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert "".join(said).count("building") == 1
    assert stat.S_IMODE((fresh / "cpu").stat().st_mode) == 0o700
    assert len(list((fresh / "cpu").glob("*.so"))) == 1


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
    tests = ["agrees_with_the_equations", "same_bits", "ends_of_a_float", "second_derivative"]
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
