"""Ratios, means and tables, on records whose numbers are known; the plots are drawn."""

import json
import math

import pytest

from benchmarks import report
from benchmarks.measurements import Record
from benchmarks.metrics import (
    find_cell,
    geometric_mean,
    goals,
    lower_bound_us,
    noise,
    speedup,
    worst_error_ratio,
)
from benchmarks.plots import plots
from benchmarks.suites import Cell
from triton_gru.plan.devices import DEVICES
from triton_gru.plan.plan import Problem
from triton_gru.plan.planner import best_plan


def ok(ms: float, **more) -> dict:
    return {"status": "ok", "median_ms": ms, "round_medians_ms": [ms, 1.1 * ms], **more}


@pytest.fixture
def data(tmp_path):
    """Speed-ups of 2 and 8 within the goal's cells, 0.5 outside; one variable length, one tf32."""
    plan = best_plan(Problem(16, 256, "bfloat16", True), DEVICES[90])
    plans = {
        "forward": {"lower_bound_us": 1.5, "estimate_us": 2.0},
        "backward": {"lower_bound_us": 2.5},
    }
    cells = {
        Cell(512, 16, 256): (1.0, 2.0),
        Cell(512, 64, 1024): (1.0, 8.0),
        Cell(512, 16, 2048): (4.0, 2.0),
        Cell(512, 16, 256, mode="forward"): (0.5, 4.0),
        Cell(512, 64, 1024, mode="forward"): (0.5, 4.0),
        Cell(512, 16, 256, lengths="packed"): (1.3, 9.0),
        Cell(512, 16, 256, dtype="tf32"): (3.0, 6.0),
    }
    record = Record.new(tmp_path / "r.json", "quick", list(cells), ["exchange sentinel", "kernels"])
    for cell, (ours, theirs) in cells.items():
        error = {"y": 3e-3, "x": 1e-3}
        mine = ok(ours, error=error, peak_bytes=100, plans=plans)
        record.put("cell", cell.id, "triton_gru", mine)
        other = {"y": 2e-3, "x": 4e-3}
        record.put("cell", cell.id, "nn.GRU", ok(theirs, error=other, peak_bytes=125))
    rows = [{"programs": n, "step_us": 0.7 + n / 100} for n in (2, 16, 48)]
    probe = {"status": "ok", "protocol": "sentinel", "rows": rows}
    record.put("probe", "exchange sentinel", None, probe)
    import dataclasses

    row = {"T": 512, "B": 16, "H": 256, "dtype": "bfloat16", "reset_after": True}
    row |= {"direction": "forward", "plan": dataclasses.asdict(plan), "step_us": 2.4}
    record.put("probe", "kernels", None, {"status": "ok", "rows": [row]})
    record.data["environment"] = {"device": "a device", "commit": "c" * 40}
    record.save()
    return record.data


def test_geometric_mean():
    assert geometric_mean([2, 8]) == pytest.approx(4)
    assert geometric_mean([]) is None


def test_speedup_is_their_time_over_ours(data):
    cell = find_cell(data, H=256, mode="train", dtype="bfloat16", lengths="full")
    assert speedup(cell) == pytest.approx(2)
    cell["results"]["nn.GRU"] = {"status": "failed", "reason": "no"}
    assert speedup(cell) is None


def test_errors_lower_bound_and_noise(data):
    cell = find_cell(data, H=256, mode="train", dtype="bfloat16", lengths="full")
    assert worst_error_ratio(cell) == pytest.approx(1.5)
    assert lower_bound_us(cell) == pytest.approx(4.0)
    assert noise(cell) == pytest.approx(0.1)


def test_goals(data):
    found = {goal.split("(")[0].strip(): value for goal, value, _ in goals(data)}
    assert found["smallest speed-up over nn.GRU, 16 bit"] == pytest.approx(0.5)
    assert found["mean speed-up, H 256-1024, B 8-128, T >= 128"] == pytest.approx(4)
    assert found["mean speed-up, tf32"] == pytest.approx(2)
    assert found["peak memory over nn.GRU's, worst"] == pytest.approx(0.8)
    assert found["error over nn.GRU's, worst"] == pytest.approx(1.5)
    packed = next(v for g, v, _ in goals(data) if g.startswith("variable length (packed)"))
    assert packed == pytest.approx(1.3)


def test_the_table_for_the_readme(data):
    table = report.markdown(data)
    row = next(line for line in table.splitlines() if line.startswith("| 512 | 64 | 1024 | bf16"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[4:9] == ["train", "1.000", "1.95", "8.000", "8.00x"]
    assert cells[-2:] == ["1.50x", "0.80x"]
    mean = math.exp(sum(map(math.log, (2, 8, 0.5, 9 / 1.3))) / 4)
    assert f"forward + backward {mean:.2f}x over 4 cells" in table
    assert "differ by 10 % in the median cell, 10 % in the worst" in table


def test_failures_are_listed_under_the_table(data):
    cell = find_cell(data, H=2048, mode="train")
    cell["results"]["triton_gru"] = {"status": "lost", "reason": "hung"}
    cell["results"]["flashrnn"] = {"status": "missing", "reason": "no module"}
    table = report.markdown(data)
    assert "- T512 B16 H2048 bf16 train, triton_gru: lost: hung" in table
    assert "- flashrnn: not installed" in table


def test_the_text_names_every_measured_cell(data):
    data["cells"]["unmeasured"] = find_cell(data, H=2048, mode="train") | {
        "T": 7,
        "results": {"triton_gru": {"status": "not run"}},
    }
    text = report.text(data)
    assert "T512 B16 H256 bf16 train packed" in text and "T7 " not in text
    assert "  48 programs   1.180 us per step" in text
    assert "16 ok" in text.splitlines()[-1] and "1 not run" in text.splitlines()[-1]


def test_plots_are_written_and_not_empty(data, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "r.json").write_text(json.dumps(data))
    assert report.main([str(tmp_path / "r.json"), "--out", str(tmp_path / "plots")]) == 0
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    stems = {"step_against_hidden_size", "speedup", "lower_bound", "exchange"}
    assert {f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")} < names
    assert "report.md" in names
    svg = (tmp_path / "plots" / "speedup.svg").read_text()
    assert svg.count('<g id="text_') > 4


def test_nothing_measured_gives_no_plot(tmp_path):
    pytest.importorskip("matplotlib")
    record = Record.new(tmp_path / "r.json", "quick", [Cell(1, 1, 1)], [])
    assert plots(record.data, tmp_path) == []
    assert goals(record.data) == []
    assert "1 not run" not in report.markdown(record.data)


def test_the_brief_table_has_twenty_lines_and_both_modes(data):
    lines = report.brief(data).splitlines()
    assert len(lines) <= 20
    (row,) = (line for line in lines if line.startswith("T512 B64 H1024"))
    # 0.5 and 1.0 ms of 512 steps; 8 times nn.GRU's speed in both; no nn.LSTM was timed.
    assert row.split()[3:] == ["0.98", "8.00", "-", "1.95", "8.00", "-"]
