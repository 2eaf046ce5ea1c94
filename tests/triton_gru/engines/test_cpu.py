"""The CPU engine: values and derivatives against the equations in float64, and bits."""

import copy
import os
import subprocess
import sys
import threading

import pytest
import torch

from tests.tolerances import assert_close
from tests.triton_gru.engines.cpu_cases import (
    assert_agrees,
    draw,
    needs_library,
    states_and_input_gradient,
)
from triton_gru import GRU
from triton_gru.engines.cpu import engine
from triton_gru.engines.cpu.layer import layer


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


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
    tests = ["agrees_with", "products_of", "same_bits", "ends_of_a_float"]
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
