"""Whatever ends a run and when: it goes on, and ends with the bits of a run that nothing ended.

By default three moments of each kind; `TRITON_GRU_MOMENTS=20` is a run of about twenty minutes.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from lightning_module.callbacks.last_checkpoint import LastCheckpoint
from lightning_module.loggers.metrics_csv import MetricsLogger
from lightning_module.run_files import CHECKPOINTS, LAST, METRICS, read_metrics
from tests.lightning_module.conftest import TINY, made_text
from tests.lightning_module.torture import FAILED, HOW, STOPPED, TORN_WRITES

MOMENTS = int(os.environ.get("TRITON_GRU_MOMENTS", 3))
ROOT = Path(__file__).parents[2]


@pytest.mark.soak
@pytest.mark.timeout(600 + 120 * MOMENTS)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("how", HOW)
def test_ended_at_random_moments_it_ends_the_same(tmp_path, how, ranks):
    text = tmp_path / "made.txt"
    text.write_text(made_text(4_000))
    (tmp_path / "runs").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "tests.lightning_module.torture", tmp_path / "runs", text, how,
         str(ranks), str(MOMENTS), "1"],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "TRITON_GRU_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    assert found["interrupted"] >= MOMENTS
    assert found["different"] == 0, found
    # It was ended as it should have been: by the signal, by the timer, by the error.
    codes = {code for codes in found["codes"] for code in json.loads(codes)} - {0}
    expected = {
        "SIGKILL": {-signal.SIGKILL},
        "SIGTERM": {-signal.SIGTERM, STOPPED},  # -SIGTERM: before the first step
        TORN_WRITES: {-signal.SIGALRM},
        "a full disk": {FAILED, 1},  # 1: what it prints meets the end of the disk too
    }[how]
    if ranks == 2:  # and the rank that lost the other one
        expected |= {FAILED, -signal.SIGKILL}
    assert codes and codes <= expected, found
    if how == "a full disk":
        said = "".join(log.read_text() for log in (tmp_path / "runs").glob("*-rank0.log"))
        assert "Free some space" in said


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_starts_over(command, text_file, tmp_path):
    arguments = [*TINY, f"data.paths=[{text_file}]", "trainer.max_steps=20"]
    whole = command("train", *arguments, f"run_dir={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr
    left = tmp_path / "killed"
    (left / CHECKPOINTS).mkdir(parents=True)
    config = OmegaConf.load(tmp_path / "whole" / "config.yaml")
    text = OmegaConf.to_yaml(config).replace(str(tmp_path / "whole"), str(left))
    (left / "config.yaml").write_text(text)
    (left / METRICS).write_text("step,train_loss\n9,123.0\n19,12")
    done = command("train", f"resume={left}")
    assert done.returncode == 0, done.stderr
    a, b = (
        torch.load(run / CHECKPOINTS / LAST, weights_only=True)
        for run in (tmp_path / "whole", left)
    )
    assert all(
        torch.equal(a["state_dict"][name], b["state_dict"][name]) for name in a["state_dict"]
    )
    assert 123.0 not in [row.get("train_loss") for row in read_metrics(left / METRICS)]


class Killed(BaseException):
    pass


def logged(run_dir):
    """What a run logged: rows, TensorBoard's scalars, samples; without times.

    Scalars by step: TensorBoard reads the files of a second in the order of their numbers as text.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = {}
    for row in read_metrics(run_dir / METRICS):
        assert not (rows.setdefault(row["step"], {}).keys() & row.keys() - {"epoch", "step"}), row
        rows[row["step"]] |= row
    board = EventAccumulator(str(run_dir / "tensorboard"), purge_orphaned_data=False).Reload()
    scalars = {
        tag: sorted((event.step, event.value) for event in board.Scalars(tag))
        for tag in board.Tags()["scalars"]
        if tag not in ("tokens_per_second", "hp_metric")
    }
    for row in rows.values():
        row.pop("tokens_per_second", None)
    return rows, scalars, (run_dir / "samples.txt").read_text()


def test_what_was_logged_after_the_checkpoint_is_cut(train_here, tmp_path, monkeypatch):
    from torch.utils.tensorboard import SummaryWriter

    def run(name, **how):
        run_dir = tmp_path / name
        train_here(
            f"run_dir={run_dir}", "trainer.max_steps=9", "trainer.val_check_interval=4",
            "trainer.log_every_n_steps=2", "callbacks.last.every_minutes=0", **how,
        )  # fmt: skip
        return run_dir

    expected = logged(run("whole"))
    assert [step for step, _ in expected[1]["train_loss"]] == [1, 3, 5, 7, 8]
    assert [row for row in expected[0] if "val_loss" in expected[0][row]] == [3, 7, 8]

    save = LastCheckpoint._save
    # Killed after its third save of the last checkpoint, whose step is not logged yet; after the
    # second, which follows a validation; before the first.
    for saves, steps in ((3, 6), (2, 4), (0, 2)):
        done = []

        def save_and_die(callback, trainer, saves=saves, done=done):
            if saves:
                save(callback, trainer)
            done.append(trainer.global_step)
            if len(done) >= saves:
                raise Killed

        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(LastCheckpoint, "_save", save_and_die)
            run(f"killed-{saves}")
        assert done[-1] == steps
        left = tmp_path / f"killed-{saves}"
        # What a process leaves that goes on after its checkpoint and is killed while it writes.
        columns = (left / METRICS).read_text().split("\n")[0].count(",")
        with (left / METRICS).open("a") as file:
            file.write("8" + ",8" * columns + "\n9,")
        with (left / "samples.txt").open("a") as file:
            file.write("== step 8, validation loss 1.0000 nats per token\n> a|b\n\n== step 9, hel")
        writer = SummaryWriter(left / "tensorboard")
        for step in (6, 7, 9):
            writer.add_scalar("train_loss", 7.0, step)
        writer.close()
        torn = max((left / "tensorboard").glob("*tfevents*"), key=lambda path: path.stat().st_mtime)
        torn.write_bytes(torn.read_bytes()[:-3])
        run(left.name, resuming=True, checkpoint=left / CHECKPOINTS / LAST if saves else None)
        found = logged(left)
        assert found[0] == expected[0]
        assert found[1] == expected[1]
        assert found[2] == expected[2]


def test_metrics_are_appended_and_never_rewritten_in_place(tmp_path, monkeypatch):
    def logger():
        return MetricsLogger(tmp_path, name="", version="")

    first = logger()
    first.log_metrics({"a": 1.0}, 0)
    first.save()
    first.log_metrics({"b": 2.0}, 1)  # a new column
    first.save()
    assert read_metrics(tmp_path / METRICS) == [{"a": 1, "step": 0}, {"b": 2, "step": 1}]

    second = logger()
    assert second.experiment  # to begin deletes nothing
    assert len(read_metrics(tmp_path / METRICS)) == 2
    second.experiment.keep([{"a": 1.0, "step": 0}])
    second.log_metrics({"a": 3.0}, 1)
    second.save()
    assert read_metrics(tmp_path / METRICS) == [{"a": 1, "step": 0}, {"a": 3, "step": 1}]

    # What is killed between two writes leaves one file or the other.
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_module.atomic_files.os.fsync", killed)
    second.log_metrics({"c": 4.0}, 2)
    with pytest.raises(KeyboardInterrupt):
        second.save()
    assert read_metrics(tmp_path / METRICS) == [{"a": 1, "step": 0}, {"a": 3, "step": 1}]
    # A line that was cut short is none.
    with (tmp_path / METRICS).open("a") as file:
        file.write("5.0,1")
    assert len(read_metrics(tmp_path / METRICS)) == 2
