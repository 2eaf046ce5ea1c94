import json

import pytest
import yaml

from benchmarks.compare_backends import compared, curve, draw, runs, text_table


def made_run(folder, number, backend, seed, loss, lr=0.1):
    run = folder / str(number)
    run.mkdir(parents=True)
    config = {
        "model": {"core": {"name": "gru", "backend": backend}},
        "data": {"lanes": 4, "seq_len": 8},
        "seed": seed,
        "run_dir": str(run),
        "callbacks": {"report": {"run_dir": str(run)}},
        "optimizer": {"lr": lr},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    summary = {"device": "cpu", "versions": {}, "steps": 20, "last_val_loss": loss}
    summary["tokens_per_second"] = {"torch": 100.0, "triton": 250.0}[backend] + seed
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "metrics.csv").write_text(
        f"step,tokens_per_second,val_loss\n9,32,\n9,32,3\n19,64,\n19,64,{loss}\n"
    )


@pytest.mark.parametrize(
    ("losses", "verdict"),
    [((1.5, 1.52, 1.515, 1.505), "apart, the same within"), ((1.5, 1.51, 1.6, 1.61), "NOT the")],
)
def test_speed_loss_and_whether_it_is_the_same(tmp_path, losses, verdict):
    for number, loss in enumerate(losses):
        made_run(tmp_path, number, ("torch", "triton")[number // 2], number % 2 + 1, loss)
    found = runs(tmp_path)
    rows = compared(found)
    assert [(r["backend"], r["runs"], r["tokens_per_second"]) for r in rows] == [
        ("torch", 2, 101.5),
        ("triton", 2, 251.5),
    ]
    assert rows[0]["noise"] == pytest.approx(abs(losses[0] - losses[1]))
    text = text_table(rows)
    assert "| triton | 2 | 252 | 2.48 |" in text
    assert verdict in text
    draw(found, tmp_path / "training.png")
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")


def test_a_curve_counts_the_seconds_spent_training():
    rows = [
        {"step": 9, "tokens_per_second": 32.0},
        {"step": 9, "val_loss": 3.0},
        {"step": 19, "tokens_per_second": 64.0},
        {"step": 19, "tokens_per_second": 64.0, "val_loss": 2.0},
    ]
    assert curve(rows, tokens=32) == [(10.0, 3.0), (15.0, 2.0)]


def test_what_cannot_be_compared_is_refused(tmp_path):
    made_run(tmp_path, 0, "torch", 1, 1.5)
    with pytest.raises(ValueError, match="1 finished runs of backend torch"):
        runs(tmp_path)
    made_run(tmp_path, 1, "triton", 1, 1.5, lr=0.2)
    with pytest.raises(ValueError, match=r"differs .* in more than the backend"):
        runs(tmp_path)
    with pytest.raises(ValueError, match="0 finished runs"):
        runs(tmp_path / "jobs")
