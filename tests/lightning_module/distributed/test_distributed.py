"""Several processes train one run: the commands as a user runs them, with gloo on the CPU."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from omegaconf import OmegaConf

from lightning_module.run_files import CHECKPOINTS, LAST, METRICS, read_metrics
from tests.lightning_module.conftest import TINY, made_text

# 60 steps of 4 rows: long enough for a wrong mean or a wrong row to show.
STEPS = ["trainer.max_steps=60", "trainer.val_check_interval=30"]


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Documents of unequal lengths: the ranks have unequal numbers of tokens in most chunks."""
    folder = tmp_path_factory.mktemp("documents")
    for number in range(30):
        text = made_text(150 + 37 * number % 400, seed=number)
        (folder / f"{number:02}.txt").write_text(text)
    return folder / "*.txt"


@pytest.fixture(scope="module")
def runs(command, documents):
    """Makes runs of some ranks, once each."""
    folder = command.home / "runs" / "ranks"

    def run(name, *arguments):
        if not (folder / name).exists():
            done = command(
                "train", *TINY, *STEPS, f"data.paths=[{documents}]", f"run_dir={folder / name}",
                *arguments,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
        return folder / name

    return run


def checkpoint(run_dir, name=LAST):
    return torch.load(run_dir / CHECKPOINTS / name, weights_only=True)


def ranks(number, strategy="ddp"):
    return [f"strategy={strategy}", f"trainer.devices={number}"]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "strategy"), [(2, "ddp"), (4, "ddp"), (2, "fsdp")])
def test_ranks_train_and_judge_as_one(runs, number, strategy):
    alone = runs("alone")
    together = runs(f"{strategy}-{number}", *ranks(number, strategy))
    a, b = checkpoint(alone), checkpoint(together)
    assert a["global_step"] == b["global_step"] == 60
    for name, weight in a["state_dict"].items():
        torch.testing.assert_close(b["state_dict"][name], weight, rtol=0, atol=1e-5)
    # Every row's state is in the one file, in the order of the rows.
    torch.testing.assert_close(b["carried_state"], a["carried_state"], rtol=0, atol=1e-5)
    judged = [
        [row["val_loss"] for row in read_metrics(run / METRICS) if "val_loss" in row]
        for run in (alone, together)
    ]
    assert len(judged[0]) == 2
    assert judged[1] == pytest.approx(judged[0], abs=1e-5)  # of weights that differ by so much
    # One directory, as of one rank, and nothing else.
    assert sorted(p.name for p in together.iterdir()) == sorted(p.name for p in alone.iterdir())


@pytest.mark.slow
def test_the_same_weights_are_judged_alike_by_any_number_of_ranks(runs, command, documents):
    """To 1e-6: the sums are over all tokens, however the ranks divide them."""
    alone = runs("alone")
    judged = []
    for number in (1, 4):
        run_dir = command.home / "runs" / f"judged-{number}"
        (run_dir / CHECKPOINTS).mkdir(parents=True)
        config = OmegaConf.load(alone / "config.yaml")
        OmegaConf.save(config, run_dir / "config.yaml")
        for file in (alone / CHECKPOINTS).iterdir():
            (run_dir / CHECKPOINTS / file.name).write_bytes(file.read_bytes())
        # One more step with a learning rate of zero, and the validation after it.
        done = command(
            "train", f"resume={run_dir / CHECKPOINTS / LAST}", "trainer.max_steps=61",
            "optimizer.lr=0", "scheduler.final_lr=0",
            "trainer.strategy=ddp", f"trainer.devices={number}",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        judged.append(read_metrics(run_dir / METRICS)[-1])
    for name in ("val_loss", "val_perplexity", "val_bits_per_char", "val_top1", "val_top5"):
        values = [row[name] for row in judged]
        assert values == pytest.approx([values[0]] * 2, abs=1e-6), name


@pytest.mark.slow
def test_torchrun_trains_as_ranks_of_our_own_do(runs, command, documents):
    two = runs("ddp-2", *ranks(2))
    run_dir = command.home / "runs" / "torchrun"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run(
        [*torchrun, "-m", "lightning_module.train", *TINY, *STEPS, f"data.paths=[{documents}]",
         f"run_dir={run_dir}", "strategy=ddp"],
        env={**os.environ, "TRITON_GRU_CACHE": str(command.home / "cache")},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    a, b = checkpoint(two), checkpoint(run_dir)
    for name, weight in a["state_dict"].items():  # not to the bit: torchrun sets its own threads
        torch.testing.assert_close(b["state_dict"][name], weight, rtol=0, atol=1e-5)
    # and a sweep under it would be every rank's own
    done = subprocess.run(
        [*torchrun, "-m", "lightning_module.train", "-m", *TINY, f"data.paths=[{documents}]",
         "optimizer.lr=0.1,0.2", "strategy=ddp"],
        cwd=command.home, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode != 0
    assert "would run the whole sweep" in done.stderr


@pytest.mark.slow
def test_dropout_masks_differ_between_ranks(runs, command, documents):
    """With equal rows on both ranks only the masks can tell them apart."""
    run_dir = runs("dropout", *ranks(2), "model.dropout=0.5", "trainer.max_steps=2")
    first, second = checkpoint(run_dir)["rng_states"]
    assert not torch.equal(first["cpu"], second["cpu"])


BAD = {
    "rows that ranks cannot share": (
        [*ranks(2), "data.batch_size=3"],
        "data.batch_size=3 cannot be divided equally among 2 ranks",
    ),
    "no text": ([*ranks(2), "data.paths=[none.txt]"], "There is no file"),
    "a directory in use": ([*ranks(2), "run_dir=."], "exists and is not empty"),
    "an unknown prompt": ([*ranks(2), "callbacks.samples.prompts=[ß]"], "does not know"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD)
def test_refused_before_training(command, documents, tmp_path, case):
    arguments, message = BAD[case]
    (tmp_path / "here").touch()
    done = command("train", *TINY, f"data.paths=[{documents}]", *arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir() if p.name != "runs"] == ["here"]
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.slow
def test_a_diverging_run_of_two_names_the_step_once(command, documents, tmp_path):
    done = command(
        "train", *TINY, *STEPS, f"data.paths=[{documents}]", f"run_dir={tmp_path / 'run'}",
        *ranks(2), "optimizer.lr=1e38",
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("the training loss of step 3 is NaN or infinite") == 1
    assert "Traceback" not in done.stderr


class Running:
    """A run of two ranks that goes on until it is stopped."""

    def __init__(self, command, documents, run_dir):
        self.run_dir = run_dir
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lightning_module.train", *TINY, f"data.paths=[{documents}]",
             f"run_dir={run_dir}", *ranks(2), "trainer.max_steps=1000000", "rank_timeout=20"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "TRITON_GRU_CACHE": str(command.home / "cache")},
        )  # fmt: skip
        while not (run_dir / "tensorboard").exists() and self.process.poll() is None:
            time.sleep(0.05)
        time.sleep(1.0)

    def ranks(self):
        """Process ids by rank."""
        children = subprocess.run(
            ["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True
        ).stdout.split()
        found = {}
        for child in map(int, children):
            with open(f"/proc/{child}/environ", "rb") as file:
                values = dict(e.split(b"=", 1) for e in file.read().split(b"\0") if b"=" in e)
            if b"RANK" in values:
                found[int(values[b"RANK"])] = child
        return found

    def end(self):
        _, errors = self.process.communicate(timeout=100)
        return self.process.returncode, errors


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="finds processes in /proc")
class TestRanksThatDie:
    def test_a_killed_rank_ends_the_other_and_is_named(self, command, documents, tmp_path):
        running = Running(command, documents, tmp_path / "run")
        pids = running.ranks()
        assert set(pids) == {0, 1}
        os.kill(pids[1], signal.SIGKILL)
        begun = time.monotonic()
        code, errors = running.end()
        assert code == 1
        assert time.monotonic() - begun < 20
        first = errors.strip().splitlines()[0]
        assert "error: rank 1 of 2 failed, the others were ended" in first
        assert "SIGKILL" in first
        assert not any(map(alive, pids.values()))

    @pytest.mark.soak
    def test_a_hanging_rank_ends_the_run_after_the_timeout(self, command, documents, tmp_path):
        running = Running(command, documents, tmp_path / "run")
        pids = running.ranks()
        os.kill(pids[1], signal.SIGSTOP)
        begun = time.monotonic()
        code, errors = running.end()
        assert code == 1
        assert 15 < time.monotonic() - begun < 60  # rank_timeout=20
        assert "rank 0 of 2 failed" in errors
        assert not any(map(alive, pids.values()))

    def test_no_rank_outlives_the_command(self, command, documents, tmp_path):
        running = Running(command, documents, tmp_path / "run")
        pids = running.ranks()
        running.process.kill()
        running.process.wait()
        deadline = time.monotonic() + 20
        while any(map(alive, pids.values())) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(map(alive, pids.values()))

    def test_a_signal_stops_both_after_the_same_step(self, command, documents, tmp_path):
        number = signal.SIGTERM
        running = Running(command, documents, tmp_path / "run")
        running.process.send_signal(number)
        code, errors = running.end()
        assert code == 128 + number
        assert f"stopped by {number.name} after step" in errors
        assert f"resume={tmp_path / 'run'}" in errors
        saved = checkpoint(tmp_path / "run")
        assert f"after step {saved['global_step']};" in errors
        assert saved["carried_state"].shape[1] == 4  # all rows


@pytest.mark.soak
def test_another_number_of_ranks_goes_on(runs, command, documents, tmp_path):
    """Rows are everyone's: what two ranks saved, one or four take up, and end the same."""
    whole = checkpoint(runs("ddp-2", *ranks(2)))
    run_dir = tmp_path / "half"
    done = command(
        "train", *TINY, *STEPS, f"data.paths=[{documents}]", f"run_dir={run_dir}", *ranks(2),
        "trainer.max_steps=30", "scheduler=constant", "optimizer.lr=0.004",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    copies = {}
    for number in (1, 4):
        copy = tmp_path / f"on-{number}"
        subprocess.run(["cp", "-r", run_dir, copy], check=True)
        done = command(
            "train", f"resume={copy}", "trainer.max_steps=60", "trainer.strategy=ddp",
            f"trainer.devices={number}",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        copies[number] = checkpoint(copy)
    assert whole["global_step"] == copies[1]["global_step"] == 60
    for number in (1, 4):
        for name, weight in copies[2]["state_dict"].items():
            torch.testing.assert_close(
                copies[number]["state_dict"][name], weight, rtol=0, atol=1e-5
            )
        torch.testing.assert_close(
            copies[number]["carried_state"], copies[2]["carried_state"], rtol=0, atol=1e-5
        )
