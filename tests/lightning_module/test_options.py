"""What throughput and quality options of a run do: accumulation, clipping, precision, averages."""

import itertools
import logging
import os
import signal

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir

from lightning_module.checkpoints import load_predictor
from lightning_module.errors import CheckpointError, DataError, RunError, Stopped
from lightning_module.run_directory import how_to_resume, resumed
from lightning_module.run_files import CHECKPOINTS, CONFIG, LAST, METRICS, read_metrics, summarize
from lightning_module.settings.config_folder import CONFIGS
from lightning_module.terminal.signals import Interrupted
from lightning_module.train import _show, quiet, train
from tests.lightning_module.conftest import TINY, made_text

# The callbacks below, which a resumed run may name.
TRUST = "trust=[tests.lightning_module]"
WEIGHTS = []  # after each batch, as `Recorder` saw them


class Recorder(L.Callback):
    """Keeps the weights after each batch."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        WEIGHTS.append([p.detach().clone() for p in pl_module.parameters()])


class Killer(L.Callback):
    """Sends SIGTERM to this process in the third step."""

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_GRU_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text(made_text(3_000))
    lightnings = logging.getLogger("lightning.pytorch")
    level = lightnings.level
    quiet()
    WEIGHTS.clear()

    def run(name, *settings):
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            config = compose(
                "train",
                [
                    *TINY,
                    f"data.paths=[{tmp_path / 'a.txt'}]",
                    f"run_dir={tmp_path / name}",
                    "trainer.max_steps=8",
                    "trainer.log_every_n_steps=1",
                    "+callbacks.recorder._target_=tests.lightning_module.test_options.Recorder",
                    *settings,
                ],
            )
        train(config)
        return torch.load(tmp_path / name / CHECKPOINTS / LAST, weights_only=True)

    yield run
    lightnings.setLevel(level)  # other tests read what Lightning says


PLAIN_SGD = ["optimizer._target_=torch.optim.SGD", "~optimizer.betas", "scheduler=constant",
             "scheduler.warmup=0"]  # fmt: skip


def moved(before, after):
    return torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)]).norm().item()


def test_clipping_bounds_the_step(run):
    run("run", *PLAIN_SGD, "optimizer.lr=1", "trainer.gradient_clip_val=0.01")
    steps = [moved(a, b) for a, b in itertools.pairwise(WEIGHTS)]
    assert steps == pytest.approx([0.01] * 7, rel=1e-3)  # all were clipped to it


def test_accumulated_gradients_are_the_mean_of_their_batches(run, tmp_path):
    settings = [*PLAIN_SGD, "optimizer.lr=1e-4", "trainer.gradient_clip_val=null"]
    run("each", *settings, "trainer.max_steps=2")
    each = list(WEIGHTS)
    WEIGHTS.clear()
    last = run("both", *settings, "trainer.max_steps=1", "trainer.accumulate_grad_batches=2")
    assert last["global_step"] == 1 and len(WEIGHTS) == 2
    # Of so small a step the gradient of the second batch is the same before and after the first.
    (before, after), first, second = WEIGHTS, each[0], each[1]
    for start, end, one, two in zip(before, after, first, second, strict=True):
        mean = ((one - start) + (two - one)) / 2
        torch.testing.assert_close(end - start, mean, rtol=0.02, atol=2e-7)
    assert moved(before, after) > 0


def test_a_checkpoint_never_falls_within_an_accumulated_step(run, tmp_path):
    settings = ["trainer.accumulate_grad_batches=3", "trainer.val_check_interval=4"]
    whole = run("whole", *settings, "trainer.max_steps=10")
    # The validation after batch 4 comes within step 2: its checkpoint is that of after step 2.
    assert whole["global_step"] == 10
    run("half", *settings, "trainer.max_steps=2")
    config, checkpoint = resumed(str(tmp_path / "half"), [TRUST, "trainer.max_steps=10"])
    train(config, checkpoint, resuming=True)
    half = torch.load(tmp_path / "half" / CHECKPOINTS / LAST, weights_only=True)
    # Not the learning rates, which follow max_steps; but every batch was read once, in order.
    assert (
        half["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        == (whole["loops"]["fit_loop"]["epoch_loop.batch_progress"])
    )


def test_bf16_mixed_computes_in_bf16_and_keeps_the_weights(run, tmp_path):
    exact = run("exact", "trainer.max_steps=20")
    mixed = run("mixed", "trainer.max_steps=20", "trainer.precision=bf16-mixed")
    losses = [
        [
            row["train_loss"]
            for row in read_metrics(tmp_path / name / METRICS)
            if "train_loss" in row
        ]
        for name in ("exact", "mixed")
    ]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert all(w.dtype == torch.float32 for w in mixed["state_dict"].values())
    assert exact["state_dict"].keys() == mixed["state_dict"].keys()


def test_the_exponential_average_is_what_is_saved(run, tmp_path):
    last = run("run", "averaging=ema", "callbacks.averaging.decay=0.7")
    average = WEIGHTS[0]
    for weights in WEIGHTS[1:]:
        average = [0.7 * a + 0.3 * w for a, w in zip(average, weights, strict=True)]
    for got, expected in zip(last["state_dict"].values(), average, strict=True):
        torch.testing.assert_close(got, expected)
    model, _ = load_predictor(tmp_path / "run" / CHECKPOINTS / LAST)
    assert torch.equal(model.output.weight, last["state_dict"]["output.weight"])


def test_the_mean_of_the_last_weights_is_what_is_saved(run, tmp_path):
    last = run("run", "averaging=swa", "callbacks.averaging.start=0.5")
    for i, got in enumerate(last["state_dict"].values()):  # steps 4 to 8 of 8
        torch.testing.assert_close(got, torch.stack([w[i] for w in WEIGHTS[3:8]]).mean(0))
    early = run("early", "averaging=swa", "trainer.max_steps=100", "trainer.max_epochs=1",
                "trainer.limit_train_batches=2", "callbacks.averaging.start=0.99")  # fmt: skip
    assert early["global_step"] == 2


@pytest.mark.parametrize("averaging", ["ema", "swa"])
def test_an_averaged_run_resumes_to_the_same_weights(run, tmp_path, averaging):
    settings = [f"averaging={averaging}", "scheduler=constant", "trainer.val_check_interval=4"]
    if averaging == "swa":
        settings.append("callbacks.averaging.start=0")
    whole = run("whole", *settings, "trainer.max_steps=12")
    run("half", *settings, "trainer.max_steps=8", "scheduler.warmup=0.03")
    config, checkpoint = resumed(
        str(tmp_path / "half"), [TRUST, "trainer.max_steps=12", "scheduler.warmup=0.02"]
    )
    train(config, checkpoint, resuming=True)
    half = torch.load(tmp_path / "half" / CHECKPOINTS / LAST, weights_only=True)
    for name, weight in whole["state_dict"].items():
        assert torch.equal(half["state_dict"][name], weight), name


@pytest.mark.parametrize("interval", [1, 3, 5])
def test_a_signal_is_handled_with_any_validation_interval(run, tmp_path, interval):
    """Also where every batch is followed by a validation; the run goes on to the same weights."""
    settings = [f"trainer.val_check_interval={interval}"]
    whole = run("whole", *settings)
    with pytest.raises(Stopped, match=r"stopped by SIGTERM after step \d; saved"):
        run("stopped", *settings,
            "+callbacks.killer._target_=tests.lightning_module.test_options.Killer")  # fmt: skip
    config, checkpoint = resumed(str(tmp_path / "stopped"), [TRUST])
    config.callbacks.killer = None
    train(config, checkpoint, resuming=True)
    last = torch.load(tmp_path / "stopped" / CHECKPOINTS / LAST, weights_only=True)
    for name, weight in whole["state_dict"].items():
        assert torch.equal(last["state_dict"][name], weight), name
    judged = [
        [(row["step"], row["val_loss"]) for row in read_metrics(tmp_path / name / METRICS)
         if "val_loss" in row]
        for name in ("whole", "stopped")
    ]  # fmt: skip
    assert judged[0] == judged[1]


def test_early_stopping_ends_a_resumed_run_where_it_would_have_ended(run, tmp_path):
    """A rate so low that no validation is 0.1 nats better than the first one."""
    settings = ["callbacks=early_stopping", "callbacks.early_stopping.min_delta=0.1",
                "optimizer.lr=1e-6", "trainer.val_check_interval=2",
                "trainer.max_steps=100"]  # fmt: skip
    whole = run("whole", *settings)
    assert whole["global_step"] == 2 * (1 + 3)
    config = ["callbacks.killer._target_=tests.lightning_module.test_options.Killer"]
    with pytest.raises(Stopped):
        run("stopped", *settings, *(f"+{c}" for c in config))
    config, checkpoint = resumed(str(tmp_path / "stopped"), [TRUST])
    config.callbacks.killer = None
    train(config, checkpoint, resuming=True)
    last = torch.load(tmp_path / "stopped" / CHECKPOINTS / LAST, weights_only=True)
    assert last["global_step"] == 8
    assert all(torch.equal(last["state_dict"][k], w) for k, w in whole["state_dict"].items())
    # Today's patience is what counts, and not the checkpoint's.
    config, checkpoint = resumed(
        str(tmp_path / "stopped"), [TRUST, "callbacks.early_stopping.patience=5"]
    )
    config.callbacks.killer = None
    train(config, checkpoint, resuming=True)
    last = torch.load(tmp_path / "stopped" / CHECKPOINTS / LAST, weights_only=True)
    assert last["global_step"] == 2 * (1 + 5)
    logged = [r["step"] for r in read_metrics(tmp_path / "stopped" / METRICS) if "train_loss" in r]
    assert logged == list(range(12))
    with pytest.raises(RunError, match="patience must be a whole number of at least 1; got 0"):
        run("none", "callbacks=early_stopping", "callbacks.early_stopping.patience=0")


def test_debug_settings_do_what_they_are_named_for(run, tmp_path, capsys):
    fast = run("fast", "debug=fast", "trainer.max_steps=4", "trainer.val_check_interval=2")
    judged = [r["step"] + 1 for r in read_metrics(tmp_path / "fast" / METRICS) if "val_loss" in r]
    assert fast["global_step"] == 4 and judged == [2, 4]
    run(
        "overfit",
        "debug=overfit",
        "data.batch_size=4",
        "trainer.max_steps=150",
        "optimizer.lr=0.02",
    )
    losses = [r["train_loss"] for r in read_metrics(tmp_path / "overfit" / METRICS)
              if "train_loss" in r]  # fmt: skip
    assert losses[0] > 2 and losses[-1] < 0.2  # nats; a text of its own has 0.25 at best
    run("profile", "debug=profile")
    _show({}, tmp_path / "profile")
    said = capsys.readouterr().out
    assert f"Where the time went: {tmp_path / 'profile' / 'fit-profile.txt'}" in said
    assert "backward" in (tmp_path / "profile" / "fit-profile.txt").read_text()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ("data.lanes=8", DataError),
        ("model.hidden_size=16", CheckpointError),
        ("optimizer._target_=torch.optim.Nothing", RunError),
    ],
)
def test_a_change_that_is_refused_leaves_the_run_as_it_was(run, tmp_path, change, error):
    run("run", "trainer.max_steps=4")
    before = (tmp_path / "run" / CONFIG).read_bytes()
    config, checkpoint = resumed(str(tmp_path / "run"), [TRUST, "trainer.max_steps=6", change])
    with pytest.raises(error) as refused:
        train(config, checkpoint, resuming=True)
    assert "\n" not in str(refused.value)
    assert (tmp_path / "run" / CONFIG).read_bytes() == before
    config, checkpoint = resumed(str(tmp_path / "run"), [TRUST, "trainer.max_steps=6"])
    train(config, checkpoint, resuming=True)
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 6


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["trainer.max_steps=0"], ["No step was trained"]),
        (["callbacks.best=null"], ["Checkpoints, curves", "Predict with"]),
        (["trainer.val_check_interval=4"], ["best.ckpt is of step", "Checkpoints", "Predict with"]),
    ],
)
def test_the_end_names_the_checkpoints_there_are(run, tmp_path, capsys, settings, says):
    try:
        run("run", *settings)
    except FileNotFoundError:  # `run` reads the last checkpoint
        assert "trainer.max_steps=0" in settings
    capsys.readouterr()
    _show(summarize(read_metrics(tmp_path / "run" / METRICS)), tmp_path / "run")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(says)
    assert all(line.startswith(start) for line, start in zip(lines, says, strict=True))


def test_settings_that_build_nothing_are_named_in_one_line(run):
    with pytest.raises(RunError, match="the settings of optimizer cannot be used") as refused:
        run("run", "optimizer._target_=torch.optim.Nothing")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_a_logger_names_the_package_that_it_lacks(run, tmp_path, monkeypatch, package):
    monkeypatch.setattr("lightning_module.loggers.trackers.find_spec", lambda name: None)
    with pytest.raises(RunError, match=rf"pip install 'triton-gru\[{package}\]'"):
        run("run", f"logger={package}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_a_logger_continues_its_run(run, tmp_path, monkeypatch, package):
    """Without a network; metrics.csv is kept as well."""
    pytest.importorskip(package)
    monkeypatch.setenv("WANDB_MODE", "offline")
    run("run", f"logger={package}")
    file = tmp_path / "run" / f"{package}_run.txt"
    name = file.read_text()
    if package == "wandb":
        import wandb

        wandb.finish()  # as the end of the process does
    config, checkpoint = resumed(str(tmp_path / "run"), ["trainer.max_steps=10"])
    train(config, checkpoint, resuming=True)
    assert file.read_text() == name
    assert read_metrics(tmp_path / "run" / METRICS)[-1]["step"] == 9
    if package == "wandb":
        kept = list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
        assert kept and all(name.strip() in f.name for f in kept)
    else:
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
        steps = [m.step for m in client.get_metric_history(name.strip(), "train_loss")]
        assert steps == list(range(10))


def test_averaging_and_fsdp_are_refused_together(run):
    with pytest.raises(RunError, match="set strategy=ddp or averaging=null"):
        run("run", "averaging=ema", "strategy=fsdp", "trainer.devices=1")


@pytest.mark.slow
def test_compiled_training_is_the_same_training(run, tmp_path):
    plain = run("plain")
    compiled = run("compiled", "compile=true")
    for name, weight in plain["state_dict"].items():
        torch.testing.assert_close(compiled["state_dict"][name], weight, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_of_another_tokenizer_is_refused(run, tmp_path):
    """The vocabulary has the same size; without the check, training would go on in nonsense."""
    run("run")
    run_dir = tmp_path / "run"
    before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
    text = (tmp_path / "a.txt").read_text()
    (tmp_path / "a.txt").write_text(text.replace("z", "y").replace("T", "Q"))
    config, checkpoint = resumed(str(run_dir), [TRUST, "trainer.max_steps=10"])
    with pytest.raises(
        CheckpointError, match=r"trained with another tokenizer .* Restore the text"
    ):
        train(config, checkpoint, resuming=True)
    assert {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()} == before
    # So is its use for predictions, beside the tokenizer of another run.
    other = tmp_path / "other"
    run("other")
    (run_dir / CHECKPOINTS / "tokenizer.json").write_bytes(
        (other / CHECKPOINTS / "tokenizer.json").read_bytes()
    )
    with pytest.raises(CheckpointError, match="is another run's tokenizer"):
        load_predictor(checkpoint)


class TwiceInterrupter(L.Callback):
    """Sends SIGINT to this process twice in the fourth step."""

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("interval", [2, 5])
def test_a_second_ctrl_c_ends_at_once(run, tmp_path, capfd, interval):
    """With a checkpoint, and before there is one; the run says so and goes on from there."""
    twice = "tests.lightning_module.test_options.TwiceInterrupter"
    with pytest.raises(Interrupted, match="stopped by SIGINT"):
        run("run", f"trainer.val_check_interval={interval}", f"+callbacks.twice._target_={twice}")
    assert "Ctrl-C ends the run at once" in capfd.readouterr().err
    said = how_to_resume(tmp_path / "run")
    last = tmp_path / "run" / CHECKPOINTS / LAST
    assert (f"The last checkpoint is {last}" if interval == 2 else "There is no checkpoint") in said
    assert said.endswith(f"\nResume with: triton-gru-train resume={tmp_path / 'run'}")
    config, checkpoint = resumed(str(tmp_path / "run"), [TRUST])
    assert (checkpoint is None) == (interval == 5)
    config.callbacks.twice = None
    train(config, checkpoint, resuming=True)
    assert torch.load(last, weights_only=True)["global_step"] == 8
