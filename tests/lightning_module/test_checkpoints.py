import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_module.checkpoints import (
    AtomicCheckpointIO,
    find_checkpoint,
    load_predictor,
    read_checkpoint,
)
from lightning_module.errors import CheckpointError
from lightning_module.model import SentencePredictor
from lightning_module.run_files import BEST, CHECKPOINTS, LAST, TOKENIZER


def test_written_and_read_back(tmp_path):
    path = tmp_path / "deep" / "a.ckpt"
    content = {
        "state_dict": {"w": torch.randn(3)},
        "hyper_parameters": {"layer_type": {}},
        "epoch": 3,
    }
    AtomicCheckpointIO().save_checkpoint(content, path)
    read = AtomicCheckpointIO().load_checkpoint(path)
    torch.testing.assert_close(read["state_dict"], content["state_dict"], rtol=0, atol=0)
    assert read["epoch"] == 3
    assert [p.name for p in path.parent.iterdir()] == ["a.ckpt"]
    assert oct(path.stat().st_mode)[-3:] == "644"


# A file size limit is the one full disk that a test can have without being root.
FULL_DISK = """
import resource, signal, sys, torch
from lightning_module.checkpoints import AtomicCheckpointIO, CheckpointError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    AtomicCheckpointIO().save_checkpoint({"w": torch.zeros(100_000)}, sys.argv[1])
except CheckpointError as error:
    print(error)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="no file size limits on this system")
def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"w": torch.ones(3)}, path)
    before = path.read_bytes()
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, path], capture_output=True, text=True, timeout=120
    )
    assert "could not write the checkpoint" in done.stdout, done.stderr
    assert "the earlier last.ckpt is intact" in done.stdout
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_truncated_empty_and_foreign_files_are_named(trained, tmp_path):
    whole = (trained / CHECKPOINTS / BEST).read_bytes()
    for name, content in {
        "half.ckpt": whole[: len(whole) // 2],
        "empty.ckpt": b"",
        "text.ckpt": b"not a checkpoint at all\n" * 10,
        "pickle.ckpt": pickle.dumps({"weights": [1, 2, 3]}),
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            read_checkpoint(tmp_path / name)
    torch.save({"model": torch.zeros(2)}, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="not a checkpoint of lightning_module"):
        read_checkpoint(tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        read_checkpoint(tmp_path / "none.ckpt")


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_a_checkpoint_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Bomb(), "hyper_parameters": {}}, "bomb.ckpt")
    with pytest.raises(CheckpointError, match=r"bomb\.ckpt"):
        read_checkpoint("bomb.ckpt")
    assert not (tmp_path / "exploded").exists()


def test_found_by_run_file_and_latest(trained, tmp_path):
    best, last = trained / CHECKPOINTS / BEST, trained / CHECKPOINTS / LAST
    assert find_checkpoint(str(trained)) == best
    assert find_checkpoint(str(last)) == last
    for name, age in (("old", 100), ("new", 0), ("middle", 50)):
        folder = tmp_path / "runs" / name / CHECKPOINTS
        folder.mkdir(parents=True)
        (folder / BEST).touch()
        os.utime(folder / BEST, (10_000 - age, 10_000 - age))
    assert find_checkpoint("latest", tmp_path / "runs").parent.parent.name == "new"
    with pytest.raises(CheckpointError, match="does not exist"):
        find_checkpoint(str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="is a directory without"):
        find_checkpoint(str(tmp_path))
    with pytest.raises(CheckpointError, match="Train one first"):
        find_checkpoint("latest", tmp_path / "none")


def test_settings_weights_and_tokenizer_that_do_not_fit(trained, tmp_path):
    def copy(change):
        content = torch.load(trained / CHECKPOINTS / BEST, weights_only=True)
        change(content)
        torch.save(content, tmp_path / BEST)
        return tmp_path / BEST

    tokenizer = (trained / CHECKPOINTS / TOKENIZER).read_bytes()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing beside"):
        load_predictor(copy(lambda c: None))
    (tmp_path / TOKENIZER).write_bytes(tokenizer)
    load_predictor(copy(lambda c: None))
    # As an earlier version wrote it. The same weights fit both GRUs: a name ignored would not show.
    kept = {"core": {"name": "gru_reset_before"}}
    former = copy(lambda c: c["hyper_parameters"].update(kept, layer_type=None))
    with pytest.warns(FutureWarning, match="core is called layer_type now"):
        model, _ = load_predictor(former)
    assert model.core.reset_after is False and model.hparams.layer_type == kept["core"]
    with pytest.warns(FutureWarning, match="core is called layer_type now"):
        assert SentencePredictor.load_from_checkpoint(former).core.reset_after is False
    with pytest.raises(CheckpointError, match="colour"):
        load_predictor(copy(lambda c: c["hyper_parameters"].update(colour="red")))
    with pytest.raises(CheckpointError, match=r"one of gru, .* got 'transformer'"):
        load_predictor(
            copy(lambda c: c["hyper_parameters"].update(layer_type={"name": "transformer"}))
        )
    with pytest.raises(CheckpointError, match="size mismatch"):
        load_predictor(copy(lambda c: c["hyper_parameters"].update(hidden_size=33)))
    model, other = load_predictor(copy(lambda c: None))
    vocab = model.hparams.vocab_size
    other._tokenizer.add_tokens(["another"])
    other.save(tmp_path / TOKENIZER)
    with pytest.raises(CheckpointError, match=f"has {vocab + 1} tokens, but the model .* {vocab}"):
        load_predictor(copy(lambda c: None))


class _RunsCode:
    def __reduce__(self):
        return os.mkdir, ("it_ran",)


@pytest.mark.parametrize("kind", ["zip", "legacy", 0, 2, 3, 4, 5])
def test_a_checkpoint_that_holds_code_is_neither_loaded_nor_called_damaged(
    tmp_path, monkeypatch, kind
):
    monkeypatch.chdir(tmp_path)
    content = {"state_dict": {}, "hyper_parameters": {"layer_type": _RunsCode()}}
    if isinstance(kind, int):
        Path("bad.ckpt").write_bytes(pickle.dumps(content, protocol=kind))
    else:
        torch.save(content, "bad.ckpt", _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(CheckpointError, match=r"holds code objects \(posix.mkdir\)") as refused:
        read_checkpoint("bad.ckpt")
    assert "weights_only" not in str(refused.value)
    assert "damaged" not in str(refused.value)
    assert refused.value.__suppress_context__  # nor does a traceback show torch's advice
    assert not Path("it_ran").exists()
