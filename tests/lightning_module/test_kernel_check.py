"""The training command measures the kernels before its first step on a GPU, and reports it."""

import contextlib
import json
import logging
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch.plugins.precision import HalfPrecision
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_module import kernel_check
from lightning_module import train as train_module
from lightning_module.callbacks.reports import RunReport
from lightning_module.run_files import SUMMARY
from lightning_module.settings.config_folder import CONFIGS
from tests.lightning_module.conftest import TINY, made_text
from triton_gru import GRU
from triton_gru.dispatch import compute_dtype
from triton_gru.verdicts.shapes import Verdict

VERDICT = Verdict("2026-01-01", None, (10.0, 20.0), (30.0, 40.0))


@pytest.fixture
def prepared(monkeypatch):
    """What was prepared: batch sizes and dtypes."""
    seen = []

    def prepare(layer, x):
        seen.append((x.device.type, *x.shape, compute_dtype(x, x)))
        return {f"class of B{x.shape[1]}": VERDICT}

    monkeypatch.setattr(kernel_check, "prepare", prepare)
    monkeypatch.setattr(GRU, "explain", lambda layer, x: "why")
    return seen


def trainer_on(device, context=contextlib.nullcontext):
    return SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device(device)),
        precision_plugin=SimpleNamespace(forward_context=context),
        callbacks=[RunReport("nowhere")],
    )


DATA = SimpleNamespace(
    seq_len=16, train=SimpleNamespace(batch_size=6), val=SimpleNamespace(batch_size=3)
)


def test_both_batch_sizes_are_measured_as_the_steps_will_run(prepared, caplog):
    trainer = trainer_on("cuda", HalfPrecision("bf16-true").forward_context)
    with FakeTensorMode(), caplog.at_level(logging.INFO):
        kernel_check.measure_kernels(GRU(5, 7), 5, DATA, trainer)
    assert prepared == [
        ("cuda", 16, 6, 5, torch.bfloat16),
        ("cuda", 16, 3, 5, torch.bfloat16),
    ]
    assert caplog.messages == ["why"]
    assert trainer.callbacks[0].verdicts == {
        "class of B6": VERDICT.record(),
        "class of B3": VERDICT.record(),
    }


@pytest.mark.parametrize(
    ("layer", "device"),
    [(GRU(5, 7), "cpu"), (GRU(5, 7, backend="torch"), "cuda"), (nn.LSTM(5, 7), "cuda")],
)
def test_where_there_is_nothing_to_decide(layer, device, prepared):
    kernel_check.measure_kernels(layer, 5, DATA, trainer_on(device))
    assert prepared == []


@pytest.mark.parametrize("check", ["off", None])
def test_the_command_measures_before_it_trains(check, tmp_path, monkeypatch):
    steps = []

    def measure(layer, input_size, data, trainer):
        assert trainer.global_step == 0 and isinstance(layer, GRU)
        steps.append(input_size)
        (report,) = (c for c in trainer.callbacks if isinstance(c, RunReport))
        report.verdicts = {"a class": VERDICT.record()}

    monkeypatch.setattr(train_module, "measure_kernels", measure)
    (tmp_path / "a.txt").write_text(made_text(3000))
    settings = ["trainer.max_steps=1", f"data.paths=[{tmp_path / 'a.txt'}]"]
    settings += [f"run_dir={tmp_path / 'run'}", "callbacks.samples=null"]
    settings += ["check=off" if check else "~check"]  # auto, and configs of before have none
    monkeypatch.setenv("TRITON_GRU_CACHE", str(tmp_path / "cache"))
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", [*TINY, *settings])
    train_module.train(config)
    summary = json.loads((tmp_path / "run" / SUMMARY).read_text())
    if check == "off":
        assert steps == [] and "verdicts" not in summary
    else:
        assert steps == [16]
        assert Verdict.read(summary["verdicts"]["a class"]) == VERDICT
