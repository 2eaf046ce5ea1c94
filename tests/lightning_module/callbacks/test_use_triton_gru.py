"""UseTritonGRU: any LightningModule, its checkpoints, and what Lightning does around it."""

import logging
import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from lightning_module import UseTritonGRU
from triton_gru import GRU, GRUCell
from triton_gru.engines.cpu import rule

B, T, F, H = 3, 5, 4, 6


class Forecaster(L.LightningModule):
    """Someone else's module."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.rnn = nn.GRU(F, H, num_layers=2, batch_first=True, dropout=0.1)
        self.cell = nn.GRUCell(H, H)
        self.output = nn.Linear(H, 1)

    def forward(self, x):
        y, _ = self.rnn(x)
        return self.output(self.cell(y[:, -1]))

    def training_step(self, batch, batch_idx):
        loss = (self(batch) - batch.sum((1, 2))[:, None]).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", (self(batch) - batch.sum((1, 2))[:, None]).square().mean())

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self(batch)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)

    def train_dataloader(self):
        data = torch.randn(4 * B, T, F, generator=torch.Generator().manual_seed(2))
        return torch.utils.data.DataLoader(data, batch_size=B)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class BuiltLate(Forecaster):
    """Builds its modules once it knows its data and its device, as large models do."""

    def __init__(self):
        super().__init__()
        self.rnn = self.cell = None

    def setup(self, stage):
        if self.cell is None:
            self.cell = nn.GRUCell(H, H)

    def configure_model(self):
        if self.rnn is None:
            self.rnn = nn.GRU(F, H, num_layers=2, batch_first=True)


def trainer(tmp_path, *callbacks, **options):
    options = {"max_epochs": 2, "logger": False, "enable_checkpointing": False} | options
    return L.Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )


@pytest.fixture(autouse=True)
def without_hints():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        warnings.filterwarnings("ignore", message=".*smaller than the logging interval")
        yield


def trained(tmp_path, module, *callbacks, ckpt_path=None, **options):
    torch.manual_seed(3)
    run = trainer(tmp_path, *callbacks, **options)
    run.fit(module, ckpt_path=ckpt_path)
    return run


def parameters(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def assert_same(actual, expected):
    assert list(actual) == list(expected)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.compat(
    "beyond", "Lightning: Trainer(callbacks=[UseTritonGRU()])", "works", "in any LightningModule"
)
def test_any_module_trains_as_before(tmp_path, backend):
    theirs, ours = Forecaster(), Forecaster()
    expected = trained(tmp_path, theirs)
    callback = UseTritonGRU(backend)
    run = trained(tmp_path, ours, callback)
    assert type(ours.rnn) is GRU and type(ours.cell) is GRUCell
    assert ours.rnn.backend == ours.cell.backend == backend
    assert_same(parameters(ours), parameters(theirs))
    for name in ("loss", "val_loss"):
        torch.testing.assert_close(run.callback_metrics[name], expected.callback_metrics[name])
    (replacement,) = callback.replacements
    replacement.undo()
    assert type(ours.rnn) is nn.GRU and type(ours.cell) is nn.GRUCell
    assert_same(parameters(ours), parameters(theirs))


def test_swaps_before_the_strategy_and_the_optimizers(tmp_path):
    order = []

    class Strategy(SingleDeviceStrategy):
        def setup(self, run):
            order.append(("strategy", type(run.lightning_module.rnn)))
            super().setup(run)

    class Module(Forecaster):
        def configure_optimizers(self):
            order.append(("optimizers", type(self.rnn)))
            return super().configure_optimizers()

    trained(tmp_path, Module(), UseTritonGRU(), strategy=Strategy(torch.device("cpu")))
    assert order == [("strategy", GRU), ("optimizers", GRU)]


@pytest.mark.parametrize(("first", "then"), [([], [UseTritonGRU]), ([UseTritonGRU], [])])
def test_runs_go_on_from_each_others_checkpoints(tmp_path, first, then):
    """Half a run with, half without the callback ends where a whole run without it does."""

    def module():
        module = Forecaster()
        module.rnn.dropout = 0.0  # whose random numbers restart in a resumed run
        return module

    whole, half, other = module(), module(), module()
    trained(tmp_path, whole, max_epochs=4)
    run = trained(tmp_path, half, *(callback("reference") for callback in first))
    checkpoint = tmp_path / "half.ckpt"
    run.save_checkpoint(checkpoint)
    assert list(torch.load(checkpoint, weights_only=True)["state_dict"]) == [*other.state_dict()]
    callbacks = [callback("reference") for callback in then]
    trained(tmp_path, other, *callbacks, ckpt_path=checkpoint, max_epochs=4)
    assert type(other.rnn) is (GRU if then else nn.GRU)
    assert type(half.rnn) is (GRU if first else nn.GRU)
    assert_same(parameters(other), parameters(whole))


def test_modules_built_late_are_swapped_when_the_stage_starts(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="lightning.pytorch")  # which commands may have quieted
    module, callback = BuiltLate(), UseTritonGRU()
    trained(tmp_path, module, callback)
    assert type(module.rnn) is GRU and type(module.cell) is GRUCell
    (replacement,) = callback.replacements
    assert set(replacement.swapped) == {"rnn", "cell"}
    assert "found nothing to swap" not in caplog.text


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_every_stage_swaps(tmp_path, stage):
    theirs, ours = Forecaster(), Forecaster()
    expected = getattr(trainer(tmp_path), stage)(theirs)
    actual = getattr(trainer(tmp_path, UseTritonGRU()), stage)(ours)
    assert type(ours.rnn) is GRU
    torch.testing.assert_close(actual, expected)


def test_reports_what_was_swapped_and_which_backend_runs(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="lightning.pytorch")  # which commands may have quieted
    module = Forecaster()
    run = trainer(tmp_path, UseTritonGRU(), max_epochs=1)
    run.fit(module)
    run.validate(module, verbose=False)
    lines = [r.getMessage() for r in caplog.records if "UseTritonGRU" in r.getMessage()]
    assert lines == [
        "UseTritonGRU: Swapped for triton_gru's: rnn, cell. rnn, cell: Backend 'torch' will run: "
        "the Triton kernels need a CUDA GPU and the tensors are on cpu, and torch's own GRU (ATen) "
        f"computes reset_after=True; the CPU engine takes {rule.sentence(torch.float32, H)}."
    ]


def test_reports_that_nothing_was_swapped(tmp_path):
    class Without(Forecaster):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(F, H, batch_first=True)
            self.cell = nn.Identity()

    with pytest.warns(UserWarning, match="UseTritonGRU found nothing to swap in Without"):
        trained(tmp_path, Without(), UseTritonGRU(), max_epochs=1)


def test_a_module_of_ours_needs_no_warning(tmp_path, recwarn):
    module = Forecaster()
    module.rnn, module.cell = GRU.from_torch(module.rnn), GRUCell.from_torch(module.cell)
    trained(tmp_path, module, UseTritonGRU(), max_epochs=1)
    assert not [w for w in recwarn if "UseTritonGRU" in str(w.message)]


class Watched(Forecaster):
    def training_step(self, batch, batch_idx):
        assert type(self.rnn) is GRU and self.rnn.backend == "reference"
        return super().training_step(batch, batch_idx)


def test_two_processes_train_as_they_do_without_it(tmp_path):
    options = {"strategy": "ddp_fork", "devices": 2, "max_epochs": 1}
    theirs, ours = Forecaster(), Watched()
    trained(tmp_path, theirs, **options)
    trained(tmp_path, ours, UseTritonGRU("reference"), **options)
    assert_same(parameters(ours), parameters(theirs))
    assert not torch.equal(ours.output.weight, Forecaster().output.weight)
