import json

import pytest
import yaml

from benchmarks.compare_backends import compared, curve, draw, runs, text_table, within_noise


def made_run(folder, number, backend, seed, loss, lr=0.1):
    run = folder / str(number)
    run.mkdir(parents=True)
    config = {
        "model": {"layer_type": {"name": "gru", "backend": backend}},
        "data": {"batch_size": 4, "seq_len": 8},
        "trainer": {"accumulate_grad_batches": 1},
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
    ("torchs", "tritons", "same"),
    [
        ((1.5, 1.52), (1.515, 1.505), True),
        ((1.5, 1.51), (1.6, 1.61), False),
        ((1.5, 1.51), (1.5, 3.5), False),  # a broken backend's own spread excuses nothing
    ],
)
def test_speed_loss_and_whether_it_is_the_same(tmp_path, torchs, tritons, same):
    for seed in (1, 2):  # the kernels' first, as names of jobs sort
        made_run(tmp_path, seed, "triton", seed, tritons[seed - 1])
        made_run(tmp_path, 10 + seed, "torch", seed, torchs[seed - 1])
    found = runs(tmp_path)
    rows = compared(found)
    assert [(r["backend"], r["runs"], r["tokens_per_second"]) for r in rows] == [
        ("torch", 2, 101.5),
        ("triton", 2, 251.5),
    ]
    assert rows[0]["noise"] == pytest.approx(torchs[1] - torchs[0])
    assert within_noise(rows) == same
    text = text_table(rows)
    assert "| triton | 2 | 252 | 2.48 |" in text
    assert ("NOT the same" in text) != same
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


REFUSED = {
    "nothing": ([], "two backends with the same seeds"),
    "one backend": ([("torch", 1), ("torch", 2)], "two backends with the same seeds"),
    "a job failed": ([("torch", 1), ("torch", 2), ("triton", 1)], "with the same seeds"),
    "one seed": ([("torch", 1), ("triton", 1)], "at least two seeds"),
    "one seed twice": ([("torch", 1)] * 2 + [("triton", 1)] * 2, "at least two seeds"),
    "other settings": ([("torch", 1, 1.5), ("triton", 1, 1.5, 0.2)], "in more than the backend"),
    "not finite": ([("torch", 1, float("nan"))], "ended with a loss of nan"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_compared_is_refused(tmp_path, case):
    made, message = REFUSED[case]
    for number, (backend, seed, *more) in enumerate(made):
        made_run(tmp_path, number, backend, seed, *(more or [1.5]))
    with pytest.raises(ValueError, match=message):
        runs(tmp_path)
