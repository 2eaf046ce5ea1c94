"""Sweeps as a user runs them: what is refused, what a failed job does, going on after a kill."""

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import pytest
import torch
from omegaconf import OmegaConf

from lightning_module import commands
from lightning_module.run_files import CHECKPOINTS, LAST
from lightning_module.settings.config_folder import CONFIGS
from lightning_module.sweeps.jobs import COMPLETE, FAILED, LAUNCHERS, WORST, Job, read_jobs
from tests.lightning_module.conftest import TINY

PNG = b"\x89PNG\r\n\x1a\n"
ROOT = str(Path(__file__).parents[3])


def arguments(text_file, *more):
    return [
        *TINY,
        f"data.paths=[{text_file}]",
        "trainer.max_steps=4",
        "trainer.val_check_interval=4",
        *more,
    ]


def study_of(directory, name):
    import optuna

    return optuna.load_study(study_name=name, storage=f"sqlite:///{directory / 'study.db'}")


def settings(run_dir, *keys):
    config = OmegaConf.load(run_dir / "config.yaml")
    return [OmegaConf.select(config, key) for key in keys]


REFUSED = {
    "an unknown key": (["optimizer.lrr=1,2"], "no setting optimizer.lrr; .* optimizer.lr"),
    "an unknown choice": (
        ["model/layer_type=gru,mamba"],
        "no model/layer_type=mamba; .*gru, gru_reset_before, lstm, rnn",
    ),
    "an interval in a grid": (["optimizer.lr=interval(1,2)"], "add sweep=optuna"),
    "resuming": (["resume=latest"], "goes on with a single run"),
    "an unknown key for Optuna": (
        ["sweep=optuna", "model.hiden_size=range(1,9)"],
        "no setting model.hiden_size; .* model.hidden_size",
    ),
    "an unknown choice for Optuna": (
        ["sweep=optuna", "model/layer_type=gru,mamba"],
        "model/layer_type=mamba",
    ),
    "nothing to search": (["sweep=optuna"], "nothing to search"),
    "logarithm of 0": (["sweep=optuna", "optimizer.lr=tag(log,interval(0,1))"], "cannot be search"),
    "an unknown sampler": (
        ["sweep=optuna", "optimizer.lr=1,2", "hydra.sweeper.sampler=magic"],
        "sampler must be tpe or random; got .magic",
    ),
    "no trials": (
        ["sweep=optuna", "optimizer.lr=1,2", "hydra.sweeper.n_trials=0"],
        "n_trials must be a whole number of at least 1; got 0",
    ),
    "a direction that is none": (["hydra.sweeper.direction=up"], "minimize or maximize; got .up"),
}


@pytest.fixture
def refused(fails, tmp_path):
    """Runs a sweep that is to be refused before it writes anything, and returns the errors."""

    def run(*command_line):
        errors = fails(commands.train, "-m", *command_line)
        assert not list(tmp_path.iterdir())
        return errors

    return run


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_written(refused, text_file, case):
    pytest.importorskip("optuna")
    more, expected = REFUSED[case]
    assert re.search(expected, refused(*arguments(text_file, *more)))


@pytest.mark.parametrize("name", sorted(p.stem for p in CONFIGS.glob("launcher/*.yaml")))
def test_a_launcher_that_is_not_installed_is_named_with_its_extra(refused, monkeypatch, name):
    plugin, extra = LAUNCHERS[name]
    monkeypatch.setitem(LAUNCHERS, name, (f"{plugin}_not_here", extra))
    assert f"pip install 'triton-gru[{extra}]'" in refused("seed=1,2", f"launcher={name}")
    assert f"{extra} = [" in (Path(ROOT) / "pyproject.toml").read_text()


@pytest.mark.parametrize("name", ["TORCHELASTIC_RUN_ID", "SLURM_STEP_NUM_TASKS"])
def test_several_processes_do_not_run_the_sweep_each(refused, text_file, monkeypatch, name):
    monkeypatch.setenv(name, "2")
    assert "each would run the whole sweep" in refused(*arguments(text_file, "seed=1,2"))


@pytest.mark.parametrize("what", ["a job", "a job elsewhere than on Linux", "a worker"])
def test_what_a_killed_sweep_started_ends(what):
    child = (
        "import sys, time; from lightning_module.sweeps import jobs\n"
        "sys.platform = 'darwin' if 'elsewhere' in sys.argv[1] else sys.platform\n"
        "jobs.end_with_sweep() if 'job' in sys.argv[1] else jobs._end_worker_with_sweep()\n"
        "print('ready', flush=True); time.sleep(600)"
    )
    sweep = (
        "import os, subprocess, sys, time; from lightning_module.sweeps import jobs\n"
        "name = jobs._PARENT if 'job' in sys.argv[1] else jobs.SWEEP_PROCESS\n"
        "os.environ[name] = str(os.getpid())\n"
        "subprocess.Popen([sys.executable, '-c', *sys.argv[2:], sys.argv[1]]); time.sleep(600)"
    )
    command = [sys.executable, "-c", sweep, what, child]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.kill()
        # Its end of the pipe closes when the child has ended, too.
        assert process.stdout.read() == ""


@pytest.fixture(scope="module")
def grid(command, text_file):
    """A grid of two jobs that work and one that diverges, run to its end."""
    folder = command.home / "grid"
    folder.mkdir()
    more = ["optimizer.lr=0.01,1e38,0.02", "hydra.sweeper.study=first", "run_dir=unused"]
    done = command("train", "-m", *arguments(text_file, *more), cwd=folder)
    return folder / "multirun" / "first", done, more


@pytest.mark.slow
def test_a_failed_job_does_not_end_a_grid(grid):
    directory, done, _ = grid
    jobs = read_jobs(directory)
    assert [job.state for job in jobs] == ["complete", "failed", "complete"]
    assert [settings(directory / str(n), "optimizer.lr") for n in (0, 2)] == [[0.01], [0.02]]
    assert "the training loss of step" in jobs[1].reason
    assert jobs[1].value is None
    assert jobs[1].told("minimize") == WORST == -jobs[1].told("maximize")
    # Each job of a grid was asked for: one that failed shows in the exit code.
    assert done.returncode == 1
    assert "Failed, job 1: the training loss of step" in done.stdout
    assert not (directory.parent.parent / "unused").exists()


@pytest.mark.slow
def test_the_report_of_a_grid(grid, command):
    directory, done, _ = grid
    jobs = {job.number: job for job in read_jobs(directory)}
    best = min((0, 2), key=lambda n: jobs[n].value)
    assert "2 complete, 1 failed" in done.stdout
    with (directory / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["job"]) for row in rows] == [best, 2 - best, 1]
    assert float(rows[0]["val_bits_per_char"]) == jobs[best].value
    assert rows[0]["optimizer.lr"] == ["0.01", "", "0.02"][best]
    assert "diverged" in rows[2]["reason"]
    assert (directory / "parallel.png").read_bytes().startswith(PNG)
    assert not (directory / "importance.png").exists()
    assert "No importance" in done.stdout
    again = command("sweep_report", directory)
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[-1] == (
        f"Table and pictures are in {directory}, what each job printed in {directory / 'jobs'}"
    )


@pytest.mark.slow
def test_the_best_command_gives_the_same_run(grid, command):
    directory, done, _ = grid
    line = next(x for x in done.stdout.splitlines() if x.startswith("  triton-gru-train "))
    assert (
        shlex.split(line)[1:]
        == min(
            (job for job in read_jobs(directory) if job.value), key=lambda job: job.value
        ).overrides
    )
    again = command("train", *shlex.split(line)[1:], f"run_dir={directory / 'again'}")
    assert again.returncode == 0, again.stderr
    best = min(job.value for job in read_jobs(directory) if job.value)
    found = json.loads((directory / "again" / "summary.json").read_text())
    assert found["val_bits_per_char"] == best


@pytest.mark.soak
def test_a_grid_goes_on_with_what_is_not_complete(grid, command, text_file):
    directory, _, more = grid
    files = [directory / str(n) / CHECKPOINTS / LAST for n in (0, 2)]
    before = [(f.stat().st_mtime_ns, f.read_bytes()) for f in files]
    done = command("train", "-m", *arguments(text_file, *more), cwd=directory.parent.parent)
    assert done.returncode == 1
    assert done.stdout.count("job 1: failed") == 1
    assert "job 0: val_bits_per_char" not in done.stdout
    assert [(f.stat().st_mtime_ns, f.read_bytes()) for f in files] == before
    assert len(read_jobs(directory)) == 3


@pytest.mark.slow
def test_a_name_that_exists_with_other_settings_is_refused(grid, command, text_file):
    directory, _, more = grid
    before = {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    other = ["optimizer.lr=0.01,0.03", "model.dropout=0.1"], ["seed=7", more[0]]
    for changed, expected in zip(other, ("another search space", "other settings"), strict=True):
        done = command(
            "train", "-m", *arguments(text_file, *changed, *more[1:]), cwd=directory.parent.parent
        )
        assert done.returncode == 1
        assert expected in done.stderr
        assert "hydra.sweeper.study=" in done.stderr
    assert {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()} == before


def test_report_of_no_sweep(command, tmp_path):
    done = command("sweep_report", tmp_path)
    assert done.returncode == 1
    assert "holds no sweep.json" in done.stderr
    (tmp_path / "sweep.json").write_text('{"objective":')
    damaged = command("sweep_report", tmp_path)
    assert damaged.returncode == 1
    assert "sweep.json is damaged" in damaged.stderr
    assert "Traceback" not in done.stderr + damaged.stderr


@pytest.mark.soak
@pytest.mark.timeout(1600)
def test_a_study_is_reproducible_and_counts_failures(command, text_file, tmp_path):
    """With one trial that diverges, and resumed in the middle: the same trials."""
    pytest.importorskip("optuna")
    search = [
        "sweep=optuna",
        # from 1e38 on, which float32 does not hold, a run diverges at once
        "optimizer.lr=tag(log,interval(0.01,1e100))",
        "model.num_layers=range(1,4)",
        "model/layer_type=gru,rnn",
        "hydra.sweeper.startup_trials=2",
        "hydra.sweeper.study=s",
    ]
    found = {}
    for name, parts in {"whole": (3,), "parts": (1, 3)}.items():
        (tmp_path / name).mkdir()
        for trials in parts:
            done = command(
                "train",
                "-m",
                *arguments(text_file, *search, f"hydra.sweeper.n_trials={trials}"),
                cwd=tmp_path / name,
            )
            # the first trial diverges, and a search in which all do has failed
            assert done.returncode == (0 if trials == 3 else 1), done.stderr
        directory = tmp_path / name / "multirun" / "s"
        found[name] = [(t.params, t.value) for t in study_of(directory, "s").trials]
        jobs = read_jobs(directory)
        assert [job.number for job in jobs] == [0, 1, 2]
        for job, (params, value) in zip(jobs, found[name], strict=True):
            run = settings(directory / str(job.number), "model.num_layers", "model.layer_type.name")
            assert run == [params["model.num_layers"], params["model/layer_type"]]
            assert value == (min(job.value, WORST) if job.state == "complete" else WORST)
        assert {job.state for job in jobs} == {"complete", "failed"}
    assert found["whole"] == found["parts"]
    assert len({params["optimizer.lr"] for params, _ in found["whole"]}) == 3


class Sweep:
    """A sweep in a process of its own, which ends with the test."""

    def __init__(self, command, cwd, *sweep, **environment):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lightning_module.train", "-m", *sweep],
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "TRITON_GRU_CACHE": str(command.home / "cache"), **environment},
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def wait_for(self, condition, seconds=500):
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until
            assert self.process.poll() is None, self.process.stdout.read()
            time.sleep(0.02)

    def end(self):
        output, _ = self.process.communicate(timeout=1500)
        return self.process.returncode, output


def processes_of(directory):
    """Ids of the processes whose command line names the directory."""
    found = subprocess.run(
        ["pgrep", "-f", f"lightning_module.*{directory}"], capture_output=True, text=True
    )
    return [int(pid) for pid in found.stdout.split()]


@pytest.mark.soak
@pytest.mark.timeout(1600)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_sweep_that_is_ended_in_the_middle_goes_on(command, text_file, tmp_path, number):
    pytest.importorskip("optuna")
    sweep = [
        *TINY,
        f"data.paths=[{text_file}]",
        "sweep=optuna",
        "hydra.sweeper.study=s",
        "hydra.sweeper.n_trials=2",
        "optimizer.lr=tag(log,interval(0.001,0.03))",
        "trainer.max_steps=250",
        "trainer.val_check_interval=50",
    ]
    directory = tmp_path / "multirun" / "s"
    with Sweep(command, tmp_path, *sweep) as running:
        # in the second trial, after its first checkpoint
        running.wait_for((directory / "1" / CHECKPOINTS / LAST).is_file)
        if number == signal.SIGINT:  # as a terminal sends it: to the sweep and to its job
            for pid in [running.process.pid, *processes_of(directory)]:
                os.kill(pid, number)
        else:
            running.process.kill()
        code, output = running.end()
    assert code == (130 if number == signal.SIGINT else -number), output
    if number == signal.SIGINT:
        assert "hydra.sweeper.study=s" in output
    # The job does not outlive its sweep; it saves and ends.
    until = time.monotonic() + 60
    while processes_of(directory) and time.monotonic() < until:
        time.sleep(0.1)
    assert not processes_of(directory)
    assert "stopped by SIG" in (directory / "jobs" / "1.log").read_text()
    stopped_at = torch.load(directory / "1" / CHECKPOINTS / LAST, weights_only=True)["global_step"]
    assert 50 <= stopped_at < 250

    with Sweep(command, tmp_path, *sweep) as again:
        code, output = again.end()
    assert code == 0, output
    jobs = read_jobs(directory)
    assert [(job.number, job.state) for job in jobs] == [(0, "complete"), (1, "complete")]
    assert sorted(p.name for p in directory.iterdir() if p.name.isdecimal()) == ["0", "1"]
    trials = study_of(directory, "s").trials
    assert [t.value for t in trials] == [job.value for job in jobs]
    for trial in trials:
        run_dir = directory / str(trial.number)
        assert settings(run_dir, "optimizer.lr") == [trial.params["optimizer.lr"]]
        assert torch.load(run_dir / CHECKPOINTS / LAST, weights_only=True)["global_step"] == 250
    # The trial that was cut went on: it is the run that its command gives in one piece.
    whole = command("train", *jobs[1].overrides, f"run_dir={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr
    expected = torch.load(tmp_path / "whole" / CHECKPOINTS / LAST, weights_only=True)
    got = torch.load(directory / "1" / CHECKPOINTS / LAST, weights_only=True)
    for key, weight in expected["state_dict"].items():
        assert torch.equal(got["state_dict"][key], weight), key


class Witness(L.Callback):
    """Writes down, on every rank, what it trains with."""

    def __init__(self, run_dir):
        self.run_dir = Path(run_dir)

    def on_train_end(self, trainer, pl_module):
        seen = {
            "pid": os.getpid(),
            "ranks": trainer.world_size,
            "optimizer.lr": trainer.optimizers[0].defaults["lr"],
            "model.hidden_size": pl_module.core.hidden_size,
            "model/layer_type": "gru" if pl_module.core.reset_after else "gru_reset_before",
        }
        (self.run_dir / f"witness-{trainer.global_rank}.json").write_text(json.dumps(seen))


@pytest.mark.soak
@pytest.mark.timeout(1600)
def test_eight_trials_of_two_ranks(command, text_file, tmp_path):
    pytest.importorskip("optuna")
    sweep = [
        *arguments(text_file, "strategy=ddp", "trainer.devices=2", "trainer.max_steps=2"),
        "sweep=optuna",
        "hydra.sweeper.n_trials=8",
        "hydra.sweeper.study=s",
        "optimizer.lr=tag(log,interval(0.001,0.1))",
        "model.hidden_size=8,16,24",
        "model/layer_type=gru,gru_reset_before",
        "+callbacks.witness._target_=tests.lightning_module.sweeps.test_sweeps.Witness",
        "+callbacks.witness.run_dir=${run_dir}",
    ]
    with Sweep(command, tmp_path, *sweep, PYTHONPATH=ROOT) as running:
        code, output = running.end()
    assert code == 0, output
    # No child ran the sweep again, or anything elsewhere.
    assert [p.name for p in tmp_path.iterdir()] == ["multirun"]
    assert [p.name for p in (tmp_path / "multirun").iterdir()] == ["s"]
    directory = tmp_path / "multirun" / "s"
    assert {p.name for p in directory.iterdir() if p.is_dir()} == {"jobs", *map(str, range(8))}
    trials = study_of(directory, "s").trials
    assert len(trials) == 8
    pids = set()
    for trial, job in zip(trials, read_jobs(directory), strict=True):
        assert (job.number, job.state) == (trial.number, "complete")
        files = sorted((directory / str(trial.number)).glob("witness-*.json"))
        assert len(files) == 2
        for seen in (json.loads(file.read_text()) for file in files):
            assert seen["ranks"] == 2
            assert {key: str(seen[key]) for key in trial.params} == {
                key: str(value) for key, value in trial.params.items()
            }
            pids.add(seen["pid"])
    assert len(pids) == 16
    assert (directory / "importance.png").read_bytes().startswith(PNG)


@pytest.mark.soak
@pytest.mark.timeout(1600)
@pytest.mark.parametrize(
    ("launcher", "plugin"),
    [("joblib", "hydra_joblib_launcher"), ("submitit_local", "hydra_submitit_launcher")],
)
def test_launchers(command, text_file, tmp_path, launcher, plugin):
    """Jobs in other processes, one of which diverges: the same records as without."""
    pytest.importorskip(f"hydra_plugins.{plugin}")
    more = ["optimizer.lr=0.01,1e38", f"launcher={launcher}", "hydra.sweeper.study=s"]
    with Sweep(command, tmp_path, *arguments(text_file, *more)) as running:
        code, output = running.end()
    assert code == 1, output
    directory = tmp_path / "multirun" / "s"
    jobs = read_jobs(directory)
    assert [job.state for job in jobs] == ["complete", "failed"], output
    assert "the training loss of step" in jobs[1].reason
    assert not any(o.startswith("launcher") for job in jobs for o in job.overrides)
    assert settings(directory / "0", "optimizer.lr") == [0.01]
    assert "1 complete, 1 failed" in output


@pytest.mark.soak
@pytest.mark.timeout(1600)
def test_a_search_of_several_trials_at_a_time(command, text_file, tmp_path):
    """With joblib: as many at a time as it has jobs, none twice, all told to the study."""
    pytest.importorskip("optuna")
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    more = ["sweep=optuna", "launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweeper.study=s"]
    space = ["optimizer.lr=tag(log,interval(0.001,0.1))", "hydra.sweeper.n_trials=5"]
    with Sweep(command, tmp_path, *arguments(text_file, *more, *space)) as running:
        code, output = running.end()
    assert code == 0, output
    directory = tmp_path / "multirun" / "s"
    jobs, trials = read_jobs(directory), study_of(directory, "s").trials
    assert [job.number for job in jobs] == [trial.number for trial in trials] == list(range(5))
    assert [job.value for job in jobs] == [trial.value for trial in trials]
    assert len({trial.params["optimizer.lr"] for trial in trials}) == 5
    begins = [trial.datetime_start for trial in trials]
    ends = [trial.datetime_complete for trial in trials]
    assert begins[1] < ends[0] <= begins[2] and begins[3] < ends[2] <= begins[4]


@pytest.mark.parametrize(("direction", "absurd"), [("minimize", 1e300), ("maximize", -1e300)])
def test_no_complete_job_is_told_worse_than_a_failed_one(direction, absurd):
    told = [
        Job(0, [], "", state=state, value=value).told(direction)
        for state, value in [(COMPLETE, absurd), (FAILED, None), (COMPLETE, 2.0)]
    ]
    assert told[0] == told[1] and abs(told[1]) == WORST and told[2] == 2.0
