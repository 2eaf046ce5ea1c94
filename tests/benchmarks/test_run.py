"""The suite's logic on a CPU: the record, the budget, failures, lost processes, going on."""

import json
import math
import os
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import implementations, run
from benchmarks.measurements import ROOT, Record, environment
from benchmarks.measuring import Measuring
from benchmarks.suites import SUITES, Cell
from benchmarks.timing import WallClock

CPU = torch.device("cpu")
FOREVER = math.inf


def small(**changes) -> Cell:
    fields = {
        "T": 3,
        "B": 2,
        "H": 8,
        "dtype": "float32",
        "implementations": ("nn.GRU", "reference"),
    }
    return Cell(**(fields | changes))


@pytest.fixture
def record(tmp_path, monkeypatch):
    """A record of two cells; the implementation "reference" stands for a second implementation."""
    monkeypatch.setitem(implementations.IMPLEMENTATIONS, "reference", _reference)
    cells = [small(), small(mode="forward")]
    record = Record.new(tmp_path / "out.json", "smoke", cells, ["probe"])
    record.save()
    record.cells = cells
    return record


def _reference(cell, weights):
    runner = implementations._ours(cell, weights, "reference")
    return runner


def on_disk(record) -> dict:
    return json.loads(record.path.read_text())


def test_a_cell_holds_time_error_and_what_it_is(record):
    cell = record.cells[0]
    assert not run.run_cell(record, cell, CPU, WallClock(), FOREVER)
    stored = on_disk(record)["cells"][cell.id]
    assert {key: stored[key] for key in ("T", "B", "H", "dtype", "mode")} == {
        "T": 3,
        "B": 2,
        "H": 8,
        "dtype": "float32",
        "mode": "train",
    }
    for name in ("nn.GRU", "reference"):
        result = stored["results"][name]
        assert result["status"] == "ok"
        assert 0 < result["min_ms"] <= result["p10_ms"] <= result["median_ms"] <= result["p90_ms"]
        assert result["step_us"] == pytest.approx(1e3 * result["median_ms"] / 3)
        assert set(result["error"]) == {
            "y",
            "x",
            "weight_ih_l0",
            "weight_hh_l0",
            "bias_ih_l0",
            "bias_hh_l0",
        }
        assert all(0 < error < 1e-5 for error in result["error"].values())
    assert on_disk(record)["in_flight"] is None


def test_a_wrong_implementation_shows_in_the_error(record, monkeypatch):
    def wrong(cell, weights):
        runner = _reference(cell, weights)
        forward = runner.forward
        runner.forward = lambda inputs: forward(inputs) * 1.01
        return runner

    monkeypatch.setitem(implementations.IMPLEMENTATIONS, "reference", wrong)
    run.run_cell(record, record.cells[0], CPU, WallClock(), FOREVER)
    error = record.slot("cell", record.cells[0].id, "reference")["error"]
    assert error["y"] == pytest.approx(0.01, rel=0.01)


def test_nan_is_no_result(record, monkeypatch):
    def broken(cell, weights):
        runner = _reference(cell, weights)
        forward = runner.forward
        runner.forward = lambda inputs: forward(inputs) * torch.nan
        return runner

    monkeypatch.setitem(implementations.IMPLEMENTATIONS, "reference", broken)
    run.run_cell(record, record.cells[0], CPU, WallClock(), FOREVER)
    result = record.slot("cell", record.cells[0].id, "reference")
    assert result["status"] == "failed" and "NaN" in result["reason"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("wrong weather"), "failed"),
        (implementations.Missing("not here"), "missing"),
        (implementations.Unsupported("not that"), "unsupported"),
    ],
)
def test_a_failed_implementation_is_recorded_and_the_others_are_measured(
    record, monkeypatch, error, status
):
    def fails(cell, weights):
        raise error

    monkeypatch.setitem(implementations.IMPLEMENTATIONS, "nn.GRU", fails)
    assert not run.run_cell(record, record.cells[0], CPU, WallClock(), FOREVER)
    results = on_disk(record)["cells"][record.cells[0].id]["results"]
    assert results["nn.GRU"]["status"] == status
    assert str(error) in results["nn.GRU"]["reason"]
    assert results["reference"]["status"] == "ok"


def test_no_room_for_the_inputs_is_a_failure_of_the_cell(record, monkeypatch):
    def no_room(*_):
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(implementations, "make_inputs", no_room)
    assert not run.run_cell(record, record.cells[0], CPU, WallClock(), FOREVER)
    results = on_disk(record)["cells"][record.cells[0].id]["results"]
    assert {result["status"] for result in results.values()} == {"failed"}


def test_nothing_starts_after_the_time_is_up(record):
    run.run_cell(record, record.cells[0], CPU, WallClock(), time.time() - 1)
    ran = []
    probes = {"probe": lambda *_: ran.append(1)}
    run.run_probe(record, "probe", probes, CPU, WallClock(), True, time.time() - 1)
    assert record.counts() == {"not run": 5} and not ran


def test_what_is_measured_is_not_measured_again(record):
    run.run_cell(record, record.cells[0], CPU, WallClock(), FOREVER)
    before = on_disk(record)["cells"]
    again = Record.load(record.path)
    for cell in record.cells:
        run.run_cell(again, cell, CPU, WallClock(), FOREVER)
    after = on_disk(record)["cells"]
    assert after[record.cells[0].id] == before[record.cells[0].id]
    assert after[record.cells[1].id]["results"]["nn.GRU"]["status"] == "ok"


def test_a_failed_probe_is_recorded(record):
    def fails(*_):
        raise RuntimeError("words were missed")

    run.run_probe(record, "probe", {"probe": fails}, CPU, WallClock(), True, FOREVER)
    stored = on_disk(record)["probes"]["probe"]
    assert stored == {"status": "failed", "reason": "RuntimeError: words were missed"}


class LostClock(WallClock):
    def synchronize(self):
        raise RuntimeError("an illegal memory access was encountered")


def test_a_lost_device_is_recorded_and_ends_the_process(record):
    assert run.run_cell(record, record.cells[0], CPU, LostClock(), FOREVER)
    results = on_disk(record)["cells"][record.cells[0].id]["results"]
    assert "device was lost" in results["nn.GRU"]["reason"]
    assert results["reference"]["status"] == "not run", "left for a fresh process"


def test_what_was_in_flight_is_lost(record):
    cell = record.cells[0]
    record.data["in_flight"] = ["cell", cell.id, "nn.GRU"]
    assert record.lose("hung") == ["cell", cell.id, "nn.GRU"]
    stored = on_disk(record)
    assert stored["in_flight"] is None
    result = stored["cells"][cell.id]["results"]["nn.GRU"]
    assert result == {"status": "lost", "reason": "hung"}
    assert record.lose("again") is None


def test_other_devices_and_code_are_not_mixed(record):
    here = environment(CPU)
    record.belongs_to(here)
    record.belongs_to(dict(here))
    for key in ("device", "torch", "sources"):
        with pytest.raises(ValueError, match=f"measured with {key}"):
            record.belongs_to(here | {key: "another"})
    assert len(here["commit"]) == 40 and here["torch"] == torch.__version__


def test_a_record_of_another_format_is_refused(record):
    record.data["format"] = 0
    record.save()
    with pytest.raises(ValueError, match="should have format 2, got: 0"):
        Record.load(record.path)


# -- the process that watches ---------------------------------------------------------------------


def watch(record, script: str, monkeypatch, tmp_path) -> int:
    """`supervise`, with a script in the place of the process that measures."""
    path = tmp_path / "worker.py"
    path.write_text(script)
    popen = subprocess.Popen

    def start(command, **options):
        return popen([sys.executable, str(path), str(record.path)], **options)

    monkeypatch.setattr(run.subprocess, "Popen", start)
    options = run.argparse.Namespace(suite="smoke", out=record.path, device="cpu", commit=None)
    return run.supervise(options, FOREVER)


START = """
import json, os, sys, time
path = sys.argv[1]
data = json.load(open(path))
cell = next(iter(data["cells"]))
results = data["cells"][cell]["results"]
waiting = [name for name in results if results[name]["status"] == "not run"]
if not waiting:
    sys.exit(0)
data["in_flight"] = ["cell", cell, waiting[0]]
json.dump(data, open(path, "w"))
"""


def test_a_process_that_dies_is_replaced(record, monkeypatch, tmp_path):
    assert watch(record, START + "os.abort()", monkeypatch, tmp_path) == 0
    results = on_disk(record)["cells"][record.cells[0].id]["results"]
    assert [result["status"] for result in results.values()] == ["lost", "lost"]
    assert "ended with -6" in results["nn.GRU"]["reason"]


def test_a_process_that_hangs_is_replaced(record, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "STALL_SECONDS", 1)
    assert watch(record, START + "time.sleep(60)", monkeypatch, tmp_path) == 0
    results = on_disk(record)["cells"][record.cells[0].id]["results"]
    assert {result["reason"] for result in results.values()} == {"hung"}


def test_a_process_that_cannot_start_is_not_tried_again(record, monkeypatch, tmp_path, capsys):
    assert watch(record, "raise SystemExit('no torch here')", monkeypatch, tmp_path) == 1
    assert "no torch here" in capsys.readouterr().err


# -- implementations and suites --------------------------------------------------------------------


@pytest.mark.parametrize("suite", SUITES)
def test_every_cell_is_there_once_with_known_implementations(suite):
    cells = SUITES[suite]()
    assert len({cell.id for cell in cells}) == len(cells)
    for cell in cells:
        assert set(cell.implementations) <= set(implementations.IMPLEMENTATIONS)
        assert cell.dtype in implementations.TORCH_DTYPES


def test_the_full_suite_holds_the_quick_one():
    quick, full = ({cell.id for cell in SUITES[name]()} for name in ("quick", "full"))
    assert quick < full


@pytest.mark.parametrize("name", ["nn.GRU", "compiled loop"])
def test_implementations_compute_the_same(name, monkeypatch):
    monkeypatch.setattr(implementations, "_compiled_step", lambda: implementations._step)
    cell = small(T=5, B=3)
    measuring = Measuring(cell, CPU, WallClock())
    assert (
        max(
            measuring.error(implementations.IMPLEMENTATIONS[name](cell, measuring.weights)).values()
        )
        < 1e-5
    )


def test_flashrnns_order_of_gates():
    """Its equations, as its own plain version states them, on the arguments we hand it."""
    H, weights = 8, torch.nn.GRU(8, 8)
    x = torch.randn(5, 3, H)
    gates_x, R, b = implementations.flashrnn_arguments(x, *weights.parameters())
    h, states = torch.zeros(3, H), []
    for t in range(5):
        w = gates_x[:, t, :, 0]
        recurrent = torch.einsum("gdp,bp->bgd", R[:, 0], h) + b[None, :3, 0]
        r, z = ((w[:, i] + recurrent[:, 1 + i]).sigmoid() for i in range(2))
        h = z * h + (1 - z) * torch.tanh(w[:, 2] + b[3, 0] + r * recurrent[:, 0])
        states.append(h)
    torch.testing.assert_close(torch.stack(states), weights(x)[0])


def test_lengths_are_between_three_tenths_and_all():
    inputs = implementations.make_inputs(small(T=100, B=64, lengths="packed"), 0, CPU)
    lengths = inputs.lengths
    assert lengths[0] == 100 and lengths.min() >= 30 and lengths.float().mean() < 75
    assert inputs.leaf.shape[0] == lengths.sum() == inputs.dy.shape[0]


def test_every_set_of_inputs_is_another_one():
    cell = small()
    one, two, same = (implementations.make_inputs(cell, seed, CPU) for seed in (0, 1, 0))
    assert not torch.equal(one.leaf, two.leaf) and torch.equal(one.leaf, same.leaf)


# -- as it is called ------------------------------------------------------------------------------


def test_the_command_without_a_gpu_or_interpreter(tmp_path):
    """The smoke suite on a CPU: cuDNN's places are ATen's, ours says why it cannot run."""
    out = tmp_path / "smoke.json"
    command = [sys.executable, "-m", "benchmarks.run", "--suite", "smoke", "--device", "cpu"]
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # Compiling a loop step takes longer than all the rest: an earlier run has lost it.
    record = Record.new(out, "smoke", SUITES["smoke"](), [])
    loop = next(cell for cell in SUITES["smoke"]() if "compiled loop" in cell.implementations)
    record.data["in_flight"] = ["cell", loop.id, "compiled loop"]
    record.save()
    done = subprocess.run(
        [*command, "--out", str(out)], cwd=ROOT, env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    data = json.loads(out.read_text())
    statuses = {}
    for cell in data["cells"].values():
        for name, result in cell["results"].items():
            statuses.setdefault(name, set()).add(result["status"])
    assert statuses["nn.GRU"] == {"ok"} and statuses["nn.LSTM"] == {"ok"}
    assert statuses["triton_gru"] <= {"failed", "unsupported"}
    assert statuses["compiled loop"] == {"lost"}
    assert "need a CUDA GPU" in done.stdout
    again = subprocess.run(
        [*command, "--suite", "quick", "--out", str(out)],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
    )
    assert again.returncode == 2 and "holds the suite 'smoke'" in again.stderr
