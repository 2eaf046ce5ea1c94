"""What is said of a sweep, from records made up here."""

import csv
import json
import math
import random
import re
import sys

import matplotlib.figure
import numpy as np
import pytest

from lightning_module.sweeps import plots as sweep_plots
from lightning_module.sweeps import report as sweep_report
from lightning_module.sweeps.jobs import COMPLETE, FAILED, UNFINISHED, Job, write_job

SPACE = {
    "optimizer.lr": {"low": 1e-4, "high": 1e-1, "log": True, "step": None},
    "model.dropout": {"low": 0.0, "high": 0.5, "log": False, "step": None},
    "model.num_layers": {"low": 1, "high": 3, "log": False, "step": 1},
    "model.hidden_size": {"choices": ["64", "256", "128"]},
    "model/layer_type": {"choices": ["gru", "lstm"]},
}


def make(directory, number_of_jobs=12, direction="minimize", space=SPACE):
    """A sweep in which the learning rate decides nearly alone."""
    draw = random.Random(0)
    (directory / "jobs").mkdir(parents=True)
    described = {"sweeper": "OptunaSweeper", "objective": "val_loss", "direction": direction}
    described |= {"parameters": space, "fixed": []}
    (directory / "sweep.json").write_text(json.dumps(described))
    for number in range(number_of_jobs):
        values = {
            name: draw.choice(d["choices"])
            if "choices" in d
            else draw.randint(1, 3)
            if d["step"]
            else d["low"] + (d["high"] - d["low"]) * draw.random()
            for name, d in space.items()
        }
        if "optimizer.lr" in values:
            values["optimizer.lr"] = 10 ** draw.uniform(-4, -1)
        job = Job(number, ["seed=1", *(f"{k}={v}" for k, v in values.items())], str(number))
        job.state = FAILED if number in (3, 5) else UNFINISHED if number == 7 else COMPLETE
        if job.state == FAILED:
            job.reason = "the loss is [red]NaN[/red], a reason, with commas"
        if job.state == COMPLETE:
            loss = 2 + math.log10(values.get("optimizer.lr", 1)) ** 2 + 0.01 * draw.random()
            job.value = loss if direction == "minimize" else -loss
            job.metrics = {"val_loss": job.value, "best_step": 100}
        job.seconds = 1.5
        write_job(directory, job)
    return sweep_report.read_sweep(directory)


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_jobs_are_sorted_best_first(tmp_path, direction, capsys):
    sweep = make(tmp_path / "s", direction=direction)
    sign = 1 if direction == "minimize" else -1
    values = [sign * job.value for job in sweep.complete]
    assert values == sorted(values) and len(values) == 9
    assert [job.number for job in sweep.jobs[9:]] == [3, 5, 7]
    sweep_report.report(sweep.directory)
    said = capsys.readouterr().out
    assert "9 complete, 2 failed, 1 unfinished" in said
    assert "Failed, job 3, 5: the loss is [red]NaN[/red], a reason, with commas" in said
    assert f"The best, job {sweep.jobs[0].number}, as a single run:" in said
    assert sweep.jobs[0].command() in said
    with (tmp_path / "s" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["job"]) for row in rows] == [job.number for job in sweep.jobs]
    assert [row["state"] for row in rows[8:]] == ["complete", "failed", "failed", "unfinished"]
    assert float(rows[0]["val_loss"]) == sweep.jobs[0].value
    assert rows[0]["optimizer.lr"] == sweep.value(sweep.jobs[0], "optimizer.lr")
    for name in ("parallel.png", "importance.png"):
        assert (tmp_path / "s" / name).stat().st_size > 10_000


def test_places_on_an_axis():
    axis = sweep_plots.parameter_axis("lr", SPACE["optimizer.lr"], ["0.0001", "0.01", "1e-1"])
    assert axis.places == pytest.approx([0, 2 / 3, 1])
    assert ("0.001", pytest.approx(1 / 3)) in [(label, place) for place, label in axis.ticks]
    axis = sweep_plots.parameter_axis("d", SPACE["model.dropout"], ["0.0", "0.125", "0.5"])
    assert axis.places == pytest.approx([0, 0.25, 1])
    assert [label for _, label in axis.ticks] == ["0.0", "0.1", "0.2", "0.3", "0.4", "0.5"]
    # numbers among choices stand by size, words in the order given, from the top
    axis = sweep_plots.parameter_axis("h", SPACE["model.hidden_size"], ["64", "128", "256"])
    assert axis.places == pytest.approx([0, 0.5, 1])
    axis = sweep_plots.parameter_axis("c", SPACE["model/layer_type"], ["gru", "lstm"])
    assert axis.places == pytest.approx([1, 0])
    axis = sweep_plots.parameter_axis("n", SPACE["model.num_layers"], ["1", "2", "3"])
    assert axis.places == pytest.approx([0, 0.5, 1])
    assert [label for _, label in axis.ticks] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("low", "high", "log"), [(1e-5, 1e-1, True), (0.002, 0.003, True), (2.31, 2.34, False)]
)
def test_ticks_are_few_and_inside(low, high, log):
    numbers = sweep_plots._round_numbers(low, high, log)
    assert 2 <= len(numbers) <= 10
    assert all(low <= n <= high * (1 + 1e-12) for n in numbers)
    labels = sweep_plots._labels(numbers, log)
    assert len(set(labels)) == len(labels)
    assert [float(label) for label in labels] == pytest.approx(numbers, rel=1e-3)


def test_what_decides_is_named_first(tmp_path, monkeypatch):
    sweep = make(tmp_path / "s", 40)
    names = list(SPACE)
    by_rank = sweep_plots.rank_importance(sweep, names)
    assert max(by_rank, key=by_rank.get) == "optimizer.lr"
    assert by_rank["optimizer.lr"] > 0.95
    assert all(0 <= value <= 1 for value in by_rank.values())
    # without Optuna that is what is drawn, and said
    monkeypatch.setitem(sys.modules, "sklearn", None)
    shares, method = sweep_plots.importance(sweep, names)
    assert shares == by_rank and "rank correlation" in method


def test_fanova_where_it_is_installed(tmp_path):
    pytest.importorskip("optuna")
    pytest.importorskip("sklearn")
    sweep = make(tmp_path / "s", 40)
    shares, method = sweep_plots.importance(sweep, list(SPACE))
    assert "fANOVA" in method
    assert max(shares, key=shares.get) == "optimizer.lr"
    assert sum(shares.values()) == pytest.approx(1)


def test_ranks_share_ties():
    assert sweep_plots._ranks([3.0, 1.0, 3.0, 2.0]).tolist() == [2.5, 0.0, 2.5, 1.0]
    draw = np.random.default_rng(0).permutation(7).astype(float)
    assert sweep_plots._ranks(list(draw)).tolist() == draw.tolist()


def test_sweeps_with_little_to_show(tmp_path, capsys):
    """One job, nothing swept, or nothing complete: said in words, and no picture left behind."""
    one = make(tmp_path / "one", 1, space={"model/layer_type": SPACE["model/layer_type"]})
    sweep_report.report(one.directory)
    assert "No importance" in capsys.readouterr().out
    assert (one.directory / "parallel.png").is_file()
    none = make(tmp_path / "none", 2, space={})
    sweep_report.report(none.directory)
    assert "No parallel coordinates" in capsys.readouterr().out
    dead = make(tmp_path / "dead", 1)
    job = dead.jobs[0]
    job.state, job.value, job.reason = FAILED, None, "ended by SIGKILL"
    write_job(dead.directory, job)
    (dead.directory / "parallel.png").touch()
    sweep_report.report(dead.directory)
    said = capsys.readouterr().out
    assert "Failed, job 0: ended by SIGKILL" in said and "The best" not in said
    assert not (dead.directory / "parallel.png").exists()


@pytest.mark.parametrize("columns", [40, 80, 140])
def test_no_header_or_number_of_the_table_is_broken(tmp_path, capsys, monkeypatch, columns):
    names = {"choices": ["a_rather_long_name_of_a_choice", "b"]}
    sweep = make(
        tmp_path / "s", 4, space={**SPACE, "data.batch_size": names, "data.val.batch_size": names}
    )
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    sweep_report.report(sweep.directory)
    lines = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines()
    header = next(line for line in lines if line.split()[:1] == ["job"])
    # By its last name where that says which it is, else in full.
    assert header.split() == [
        "job", "val_loss", "lr", "dropout", "num_layers", "hidden_size", "layer_type",
        "data.batch_size", "data.val.batch_size", "steps", "seconds",
    ]  # fmt: skip
    for job in sweep.complete:
        row = next(line for line in lines if line.split()[:1] == [str(job.number)])
        expected = [sweep_report.short(sweep.value(job, name)) for name in list(SPACE)[:4]]
        assert row.split()[1:6] == [f"{job.value:.4f}", *expected]


def test_no_line_runs_over_a_label(tmp_path, monkeypatch):
    figures = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure,
        "savefig",
        lambda figure, *a, **k: (save(figure, *a, **k), figures.append(figure)),
    )
    long = {"choices": ["a_rather_long_name_of_a_choice", "another_name_as_long_as_that"]}
    sweep = make(tmp_path / "s", space={"a.long": long, **SPACE, "b.long": long})
    sweep_plots.draw_parallel(sweep, tmp_path / "parallel.png")
    (plot,) = figures[0].axes
    labels = [text for text in plot.texts if text.get_bbox_patch() is not None]
    drawn = {text.get_text() for text in labels}
    assert {"64", "gru", "another_name_as_long_as_that"} <= drawn
    for text in labels:
        assert text.zorder > max(line.zorder for line in plot.lines)
        assert text.get_bbox_patch().get_facecolor() == (1, 1, 1, 1)
    # The texts have room beside each other: names, labels, the note of the best.
    boxes = [(text.get_text(), text.get_window_extent()) for text in plot.texts if text.get_text()]
    for i, (name, box) in enumerate(boxes):
        for other, other_box in boxes[:i]:
            assert not box.overlaps(other_box), (name, other)
