"""A store that fails: the run goes on if it comes back, and else saves and resumes exactly."""

import os
import re
import signal
import time

import pytest
import torch

from lightning_module.data.shards import reading
from lightning_module.errors import Stopped, StoreError
from lightning_module.run_directory import resumed
from lightning_module.run_files import CHECKPOINTS, LAST, METRICS, read_metrics
from lightning_module.train import train
from tests.lightning_module.data.shards.making import (
    hang,
    made_tokenizer,
    made_tokens,
    write_shards,
)

URL = "faulty://corpus"
TRAIN = [30, 5, 61, 17, 1, 70]  # tokens of the documents: 6 chunks in each of 3 rows


@pytest.fixture
def corpus(store, block, impatient):
    block(32)  # 16 tokens, so that a run of nine steps reads many
    tokenizer = made_tokenizer()
    splits = {
        name: made_tokens(lengths, tokenizer.vocab_size, len(lengths))
        for name, lengths in (("train", TRAIN), ("val", [40, 30, 50]))
    }
    write_shards(URL, tokenizer, splits, [50, 20, 41])
    return store


def state_of(run_dir):
    """The weights at the end of a run, and what it logged but the speed."""
    saved = torch.load(run_dir / CHECKPOINTS / LAST, weights_only=True)
    rows = [
        {name: value for name, value in row.items() if name != "tokens_per_second"}
        for row in read_metrics(run_dir / METRICS)
    ]
    return saved["state_dict"], [row for row in rows if row.keys() > {"epoch", "step"}]


def assert_same_run(run_dir, other):
    (weights, rows), (others, other_rows) = state_of(run_dir), state_of(other)
    assert all(torch.equal(weights[name], others[name]) for name in weights | others)
    assert rows == other_rows


def resume(run_dir, *changes):
    config, checkpoint = resumed(str(run_dir), changes)
    return train(config, checkpoint, resuming=True)


PASSES = {
    "steps": [],
    "accumulated": ["trainer.accumulate_grad_batches=2", "trainer.val_check_interval=8"],
    "epochs": ["trainer.check_val_every_n_epoch=1", "trainer.val_check_interval=1.0"],
    "packed": ["data.batching=packed"],
}


@pytest.fixture
def whole(corpus, train_on, tmp_path):
    """A run without failures: its directory, and how many reads it did."""
    made = {}

    def run(how):
        if how not in made:
            corpus.reads.clear()
            train_on(URL, tmp_path / how, *PASSES[how])
            made[how] = tmp_path / how, len(corpus.reads)
        return made[how]

    return run


@pytest.fixture
def fails_at(corpus, train_on, tmp_path):
    """Trains on a store that fails for good from a read on; returns the error and the run."""

    def run(number, how, fault):
        def fails(n, path):
            if n >= number:
                return fault(n, path)

        corpus.reads.clear()
        corpus.fault = staticmethod(fails)
        run_dir = tmp_path / f"{how}-{number}"
        try:
            train_on(URL, run_dir, *PASSES[how])
        except StoreError as error:
            return str(error), run_dir
        finally:
            corpus.fault = staticmethod(lambda n, path: None)
        return None, run_dir  # it was over before it needed that

    return run


def reset(number, path):
    raise OSError("the connection was reset")


def past_the_end(number, path):
    raise OSError(22, "The requested range is not satisfiable")  # as s3fs


@pytest.mark.slow
@pytest.mark.parametrize("how", PASSES)
def test_a_store_that_fails_at_any_read(whole, fails_at, how):
    """The run saves after the last step that has data, and resumes to the same weights and rows."""
    complete, reads = whole(how)
    assert reads > 20
    saved_after = set()
    for number in range(0, reads, reads // 8):
        message, run_dir = fails_at(number, how, reset)
        if message:
            assert re.match(rf"{URL}/\S+\.tokens cannot be read: OSError: the conn", message)
            assert "\n" not in message
            if step := re.search(r"Stopped after step (\d+); saved ", message):
                saved = torch.load(run_dir / CHECKPOINTS / LAST, weights_only=True)
                assert saved["global_step"] == int(step[1])
                saved_after.add(int(step[1]))
            if (run_dir / CHECKPOINTS / LAST).is_file():
                resume(run_dir)
        if not message or (run_dir / CHECKPOINTS / LAST).is_file():
            assert_same_run(run_dir, complete)
    assert saved_after


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (hang, r"no answer for 0 s, in 1 s of attempts"),
        (lambda n, path: b"", r"is damaged: bytes \d+ to \d+ came as 0 bytes"),
        (past_the_end, r"is damaged: OSError: .*not satisfiable. Copy"),
        (lambda n, path: b"x" * 32, r"is damaged: bytes .* have another checksum than was written"),
    ],
    ids=["hanging", "cut", "cut before", "changed"],
)
def test_faults_that_end_a_run(fails_at, fault, message):
    begun = time.monotonic()
    said, run_dir = fails_at(9, "steps", fault)
    assert re.search(rf"^{URL}/train-0000\d.tokens .*{message}.*; saved .*last.ckpt$", said), said
    assert (run_dir / CHECKPOINTS / LAST).is_file()
    assert time.monotonic() - begun < 60


def test_a_store_that_comes_back(whole, corpus, train_on, tmp_path, monkeypatch):
    """Reads that fail, hang, or come damaged once are repeated; the run is the same."""
    monkeypatch.setattr(reading, "PATIENCE", 120)
    complete, _ = whole("steps")
    faults = {3: reset, 7: hang, 11: lambda n, path: b"", 12: lambda n, path: b"x" * 32, 16: reset}
    corpus.reads.clear()
    corpus.fault = staticmethod(lambda n, path: faults[n](n, path) if n in faults else None)
    train_on(URL, tmp_path / "again")
    assert_same_run(tmp_path / "again", complete)


def test_a_signal_ends_a_run_that_waits_for_its_store(corpus, train_on, tmp_path, monkeypatch):
    """Not after the two minutes that a store is waited for: a cluster kills after 30 seconds."""
    monkeypatch.setattr(reading, "PATIENCE", 120)

    def hangs_and_signals(number, path):
        if number == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        if number >= 9:
            hang(number, path)

    corpus.fault = staticmethod(hangs_and_signals)
    begun = time.monotonic()
    with pytest.raises(Stopped, match=r"stopped by SIGTERM after step \d+; saved"):
        train_on(URL, tmp_path / "run")
    assert time.monotonic() - begun < 60
