"""The check of a class on hardware, in processes of their own, and what "auto" takes by it."""

import os
import sys

import pytest
import torch

from tests.gpu.device import DEVICE
from triton_gru import GRU, check_command, prepare
from triton_gru.verdicts import checks, deciding, environment, measuring, store
from triton_gru.verdicts.measuring import MODES
from triton_gru.verdicts.shapes import LONG, SHORT, ShapeClass, Verdict

pytestmark = pytest.mark.cuda
# A process that compiles each kernel of a class.
LONG_TEST = pytest.mark.timeout(measuring.DEADLINE + 60, method="thread")

SHAPE = ShapeClass(True, "bfloat16", 512, 1, 32)
# Seconds for a kernel that hangs: torch, a compiled kernel and more.
SOON = 60.0


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_GRU_CACHE", str(tmp_path))
    for name in ("TRITON_GRU_CHECK", "TRITON_GRU_VERDICTS"):
        monkeypatch.delenv(name, raising=False)
    forget()
    yield
    forget()


def forget():
    """As in a new process."""
    for known in (store._here, store._warned, deciding._decided, deciding._told):
        known.clear()
    store._valid.cache_clear()


def broken(kind, deadline=measuring.DEADLINE):
    """Measures with kernels that are broken on purpose; afterwards this process computes on."""
    command = (sys.executable, "-m", "tests.gpu.checked_class", kind)
    ((_, outcome),) = checks.measured(
        [SHAPE],
        DEVICE,
        lambda shape, device: measuring.measure(shape, device, command=command, deadline=deadline),
    )
    x = torch.randn(300, 300, device=DEVICE)
    torch.testing.assert_close((x @ x).cpu(), x.cpu() @ x.cpu(), rtol=1e-2, atol=0.1)
    return outcome


def layer_and_input(T=100, B=32):
    layer = GRU(512, 512, device=DEVICE, dtype=torch.bfloat16)
    return layer, torch.randn(T, B, 512, device=DEVICE, dtype=torch.bfloat16)


@LONG_TEST
def test_the_kernels_pass_and_auto_follows(capsys):
    layer, x = layer_and_input()
    found = prepare(layer, x)
    assert set(found) == {SHAPE.key(mode == "training") for mode in MODES}
    assert [verdict.failure for verdict in found.values()] == [None, None]
    for mode in MODES:
        verdict = found[SHAPE.key(mode == "training")]
        assert 0 < verdict.kernel_step_us < 1000 and 0 < verdict.other_step_us < 1000
        with torch.set_grad_enabled(mode == "training"):
            text = layer.explain(x)
            taken = "triton" if verdict.from_steps and verdict.from_steps <= len(x) else "torch"
            assert f"Backend {taken!r} will run" in text and verdict.day in text
            layer(x)
    forget()
    assert prepare(layer, x) == found, "it is on disk"


@LONG_TEST
def test_the_command(capsys):
    quick = ["check", "--quick", "--hidden-size", "256"]
    assert check_command.main(quick) == 0
    out = capsys.readouterr().out
    assert torch.cuda.get_device_name(DEVICE) in out and out.count("bfloat16 H 256 B 32") == 2


@LONG_TEST
def test_reset_before_passes():
    shape = ShapeClass(False, "float16", 256, 2, 16)
    outcome = measuring.measure(shape, DEVICE)
    assert outcome.obstacle == "" and outcome.failure is None


@LONG_TEST
def test_a_kernel_that_is_wrong():
    assert broken("wrong").failure.startswith("wrong y")


@LONG_TEST
def test_a_kernel_that_hangs_is_killed():
    assert "was killed" in broken("stuck", SOON).failure


@LONG_TEST
def test_a_kernel_that_faults():
    assert broken("faulty").failure
    assert deciding.decision(DEVICE, SHAPE, True, holds=False).passed is False


@LONG_TEST
def test_a_kernel_that_is_slow():
    outcome = broken("slow")
    assert outcome.failure is None
    assert [verdict.from_steps for verdict in outcome.verdicts.values()] == [None, None]
    layer, x = layer_and_input()
    assert "Backend 'torch' will run" in layer.explain(x)


@pytest.fixture
def faster():
    times = [(us * SHORT, us * LONG) for us in (1.0, 2.0)]
    verdicts = {SHAPE.key(m == "training"): Verdict("2026-01-01", None, *times) for m in MODES}
    store.remember(environment.environment(DEVICE), verdicts)


def test_what_a_verdict_says_runs_eagerly_compiled_and_captured(faster):
    layer, x = layer_and_input()
    assert "Backend 'triton' will run: measured on this GPU on 2026-01-01" in layer.explain(x)
    expected = GRU.from_torch(layer.to_torch(), backend="triton").to(DEVICE)(x)[0]
    assert torch.equal(layer(x)[0], expected)
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(x)[0], expected, rtol=8e-2, atol=8e-2)
    with torch.no_grad():
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)[0]
        graph.replay()
    assert torch.equal(y, expected.detach())


def test_first_use_measures_no_graph_that_is_captured(monkeypatch):
    monkeypatch.setenv("TRITON_GRU_CHECK", "first_use")
    monkeypatch.setattr(measuring, "measure", lambda *a: pytest.fail("measured"))
    layer, x = layer_and_input()
    with torch.no_grad():
        layer.to_torch()(x)  # what cuDNN allocates at its first call
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            layer(x)
    torch.compile(GRU(512, 256, device=DEVICE), fullgraph=True)(x.float())


@LONG_TEST
def test_first_use_measures_once(monkeypatch):
    monkeypatch.setenv("TRITON_GRU_CHECK", "first_use")
    layer, x = layer_and_input()
    layer(x)
    assert set(store.known(environment.environment(DEVICE))) == {
        SHAPE.key(t) for t in (True, False)
    }
    monkeypatch.setattr(measuring, "measure", lambda *a: pytest.fail("measured"))
    layer(x)
    forget()
    layer(x)


def test_a_budget_is_another_device(monkeypatch):
    whole = environment.environment(DEVICE)
    monkeypatch.setenv("TRITON_GRU_SM_BUDGET", "17")
    assert environment.environment(DEVICE) != whole
    assert os.environ["TRITON_GRU_SM_BUDGET"] in environment.environment(DEVICE)


def test_the_driver_names_its_version():
    assert environment.driver_version()[0].isdigit()
