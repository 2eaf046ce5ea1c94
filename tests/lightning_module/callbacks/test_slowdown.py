"""The line that says when a run has become slow, with a clock of the test's own."""

from types import SimpleNamespace

import pytest
import torch

from lightning_module.callbacks import slowdown


@pytest.fixture
def speeds(monkeypatch):
    """Trains step by step as long as it is told to take, and returns the steps that said a line."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(slowdown.time, "monotonic", lambda: clock.now)
    trainer = SimpleNamespace(global_step=0, is_global_zero=True)
    module = SimpleNamespace(device=torch.device("cpu"))
    batch = SimpleNamespace(token_count=lambda: 1000)

    def run(callback, seconds, capsys, between=lambda step: None):
        said = []
        for taken in seconds:
            between(trainer.global_step)
            callback.on_train_batch_start(trainer, module, batch, 0)
            clock.now += taken
            trainer.global_step += 1
            callback.on_train_batch_end(trainer, module, None, batch, 0)
            if capsys.readouterr().out:
                said.append(trainer.global_step)
        return said

    run.clock = clock
    return run


def test_reports_once_while_the_speed_stays_under_a_fifth_of_the_best(speeds, capsys):
    # 10 steps a second, then one in 0.6 s: a sixth.
    said = speeds(slowdown.NoteSlowdown(), [0.1] * 100 + [0.6] * 200, capsys)
    assert len(said) == 1
    assert 100 + 2 * 5 / 0.6 <= said[0] <= 100 + 3 * 5 / 0.6 + 1


def test_reports_again_after_half_an_hour(speeds, capsys):
    said = speeds(slowdown.NoteSlowdown(), [0.1] * 100 + [0.6] * 3100, capsys)
    assert len(said) == 2
    assert (said[1] - said[0]) * 0.6 == pytest.approx(30 * 60, abs=6)


def test_a_fourth_of_the_speed_and_a_single_pause_are_no_slowdown(speeds, capsys):
    seconds = [0.1] * 100 + [0.4] * 100 + [0.1] * 100 + [3600.0] + [0.1] * 100
    assert speeds(slowdown.NoteSlowdown(), seconds, capsys) == []


@pytest.mark.parametrize("hook", ["on_validation_start", "on_save_checkpoint"])
def test_validations_and_checkpoints_do_not_count(speeds, capsys, hook):
    callback = slowdown.NoteSlowdown(window_seconds=1.0)

    def between(step):
        if step % 7 == 0:  # more often than there are windows
            getattr(callback, hook)(None, None)
            speeds.clock.now += 100.0

    assert speeds(callback, [0.1] * 400, capsys, between) == []
    assert callback._best == pytest.approx(10_000)
