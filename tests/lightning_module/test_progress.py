"""What a run shows of itself while it goes on, in a terminal and elsewhere."""

import io
from functools import partial

import lightning as L
import pytest
import torch
from rich.console import Console

from lightning_module.callbacks.progress import RunProgress
from lightning_module.callbacks.stopping import EarlyStopping, ValidateAtEnd
from lightning_module.data.chunks import Chunk
from lightning_module.model import SentencePredictor
from lightning_module.terminal import progress_bars as bars


def chunks(number):
    return torch.utils.data.DataLoader(
        [
            Chunk(*torch.randint(9, (2, 4, 2)), fresh=torch.tensor([k == 0] * 2))
            for k in range(number)
        ],
        batch_size=None,
    )


class Watched(RunProgress):
    """Keeps what its bars showed after each change."""

    def __init__(self, terminal):
        super().__init__(every_seconds=0.0)
        self.output = io.StringIO()
        self.console = Console(
            file=self.output, force_terminal=terminal, width=120, highlight=False
        )
        self.shown = []

    def _look(self):
        if self._bars is not None:
            self.shown.append([(bar.completed / bar.total, bar.description)
                               for bar in self._bars.tasks])  # fmt: skip

    def on_validation_batch_end(self, *arguments):
        super().on_validation_batch_end(*arguments)
        self._look()

    def on_train_end(self, *arguments):
        super().on_train_end(*arguments)
        self._look()


def run(progress, rate=0.1, patience=10**6, **limits):
    torch.manual_seed(0)
    model = SentencePredictor(
        9, hidden_size=4, embedding_size=4, optimizer=partial(torch.optim.SGD, lr=rate)
    )
    trainer = L.Trainer(
        accelerator="cpu",
        **{"max_epochs": -1, "check_val_every_n_epoch": None, "val_check_interval": 5, **limits},
        log_every_n_steps=4,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[progress, ValidateAtEnd(), EarlyStopping(patience=patience)],
    )
    trainer.fit(model, chunks(10), chunks(4))
    return trainer


ENDS = {
    "max_steps": {"max_steps": 7},
    "max_epochs": {"max_epochs": 1, "check_val_every_n_epoch": 1, "val_check_interval": 1.0},
    "max_time": {"max_time": {"seconds": 1}, "val_check_interval": 100},
    "early stopping": {"max_steps": 1000, "rate": 0.0, "patience": 2},
}


@pytest.mark.parametrize("end", ENDS)
def test_the_bar_ends_at_100_percent_and_shows_validations(end):
    progress = Watched(terminal=True)
    trainer = run(progress, **ENDS[end])
    ((share, status),) = progress.shown[-1]
    assert share == 1
    assert status.startswith(f"step {trainer.global_step} ") and status.endswith("0:00 left")
    validating = progress.shown[:-1]
    assert len(validating) % 4 == 0
    for number, ((_, whole), (done, part)) in enumerate(validating):
        assert whole.endswith("validating")
        assert done == (number % 4 + 1) / 4
        assert part == f"validation: chunk {number % 4 + 1} of 4"
    assert ("ended early: no lower loss in 2 validations" in progress.output.getvalue()) == (
        end == "early stopping"
    )
    if end == "early stopping":  # the first validation is the best, two more are waited for
        assert trainer.global_step == 15 and len(validating) == 3 * 4


def test_without_a_terminal_lines_show_the_same():
    progress = Watched(terminal=False)
    run(progress, max_steps=7)
    lines = progress.output.getvalue().splitlines()
    assert " 71% step 5  validation: chunk 2 of 4" in lines
    assert lines[-1].startswith("100% step 7 ")
    assert lines[-2].startswith("step 7: validation loss ")


def test_reading_a_text_shows_a_bar_in_a_terminal_and_lines_elsewhere(monkeypatch, caplog):
    log = bars.logging.getLogger("reading")
    log.setLevel("INFO")
    output = io.StringIO()
    monkeypatch.setattr(bars, "Console", lambda **_: Console(file=output, force_terminal=True))
    with bars.reading("Tokenising", 4000, log) as advance:
        advance(1000)
    assert "25%" in output.getvalue() and "Tokenising: 1,000 characters" in output.getvalue()
    assert not caplog.records
    monkeypatch.setattr(bars, "Console", lambda **_: Console(file=output, force_terminal=False))
    monkeypatch.setattr(bars, "EVERY_SECONDS", -1)
    with bars.reading("Tokenising", 4000, log) as advance:
        advance(3000)
    assert caplog.messages == ["Tokenising: 3,000 characters (75%)"]
