"""The commands on shards in a folder: trained on, evaluated, resumed; and by two ranks."""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch

from lightning_module.data.shards.tables import ShardCache
from lightning_module.data.tokenizers import SHARDS, TokenizerSettings
from lightning_module.run_config import read_config
from lightning_module.run_files import CHECKPOINTS, CONFIG, LAST, METRICS, read_metrics
from tests.lightning_module.conftest import made_text
from tests.lightning_module.data.shards.making import made_tokenizer, write_shards

SMALL = [
    *("data=shards", "data.batch_size=4", "data.seq_len=16", "model.hidden_size=16"),
    *("model.embedding_size=8", "trainer.accelerator=cpu", "trainer.log_every_n_steps=2"),
    *("trainer.max_epochs=-1", "trainer.check_val_every_n_epoch=null", "optimizer.lr=0.02"),
    *("trainer.val_check_interval=10", "callbacks.samples.num_sentences=0", "logger=csv"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Text in shards of 500 tokens."""
    import numpy as np

    from lightning_module.data.token_cache import SplitTokens

    text = made_text(9_000)
    tokenizer = made_tokenizer(text)
    splits = {}
    for name, part in (("train", text[:8_000]), ("val", text[8_000:])):
        ids = np.array([0, *tokenizer.encode(part)], np.uint16)
        splits[name] = SplitTokens(ids, np.array([0, len(ids)]), 0, len(part), len(part), 0)
    path = tmp_path_factory.mktemp("corpus") / "shards"
    write_shards(str(path), tokenizer, splits, [500])
    return path


def test_trained_evaluated_and_resumed(folder, command, tmp_path):
    """With the folder relative to where the command was given; the rest from elsewhere."""
    run_dir = tmp_path / "run"
    done = command(
        *("train", *SMALL, "data.url=shards", f"run_dir={run_dir}", "trainer.max_steps=20"),
        cwd=folder.parent,
    )
    assert done.returncode == 0, done.stderr
    assert "8,000 characters = 8,000 tokens to train on" in done.stdout
    config = read_config(run_dir / CONFIG)
    assert (config.data.url, config.tokenizer.kind) == (str(folder), "shards")
    done = command("evaluate", f"checkpoint={run_dir}", "format=json", cwd=tmp_path)
    found = json.loads(done.stdout.splitlines()[-1])
    last = [row["val_loss"] for row in read_metrics(run_dir / METRICS) if "val_loss" in row]
    assert found["tokens"] == 1_000 and found["loss"] == pytest.approx(min(last), rel=1e-6)
    done = command("predict", f"checkpoint={run_dir}", "prompt=The ", "max_tokens=5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = command("train", f"resume={run_dir}", "trainer.max_steps=25", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert torch.load(run_dir / CHECKPOINTS / LAST, weights_only=True)["global_step"] == 25
    # Another kind of tokenizer is an error at once, which leaves nothing.
    done = command(
        *("train", *SMALL, f"data.url={folder}", f"run_dir={tmp_path / 'other'}", "tokenizer=word")
    )
    assert done.returncode == 1 and "holds tokens of tokenizer=char" in done.stderr
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_two_ranks_save_when_the_store_of_one_fails(folder, command, tmp_path):
    """Both save after the same step while both have data, and resume to the same weights."""

    def run(*arguments):
        return command("train", *map(str, arguments))

    two = ["strategy=ddp", "trainer.devices=2", "trainer.max_steps=40"]
    two += ["trainer.val_check_interval=25"]
    whole, ended = tmp_path / "whole", tmp_path / "ended"
    done = run(*SMALL, *two, f"data.url={folder}", f"run_dir={whole}")
    assert done.returncode == 0, done.stderr
    # In the second half of the text, which only the second rank reads.
    shard = folder / "train-00009.tokens"
    content = shard.read_bytes()
    shard.unlink()
    try:
        done = run(*SMALL, *two, f"data.url={folder}", f"run_dir={ended}")
    finally:
        shard.write_bytes(content)
    assert done.returncode == 1
    said = re.search(
        r"^error: (\S+)/train-00009.tokens cannot be read: FileNotFoundError: .*\. "
        r"Stopped after step (\d+); saved (\S+)$",
        done.stderr,
        re.MULTILINE,
    )
    assert said, done.stderr
    assert (said[1], said[3]) == (str(folder), str(ended / CHECKPOINTS / LAST))
    saved = torch.load(said[3], weights_only=True)
    assert saved["global_step"] == int(said[2]) > 0
    assert f"Resume with: triton-gru-train resume={ended}" in done.stderr
    assert "Traceback" not in done.stderr
    done = run(f"resume={ended}")
    assert done.returncode == 0, done.stderr
    one, other = (
        torch.load(path / CHECKPOINTS / LAST, weights_only=True)["state_dict"]
        for path in (whole, ended)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_a_killed_run_is_resumed_to_the_same_weights(folder, command, tmp_path):
    steps = ["trainer.max_steps=200", "trainer.val_check_interval=50"]
    steps += ["callbacks.last.every_minutes=0"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = command("train", *SMALL, *steps, f"data.url={folder}", f"run_dir={whole}")
    assert done.returncode == 0, done.stderr
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "lightning_module.train"),
            *(*SMALL, *steps, f"data.url={folder}", f"run_dir={killed}"),
        ],
        env={**os.environ, "TRITON_GRU_CACHE": str(command.home / "cache")},
        stdout=subprocess.DEVNULL,
    )
    last = killed / CHECKPOINTS / LAST
    while process.poll() is None and not last.is_file():
        time.sleep(0.01)
    time.sleep(0.2)
    process.kill()
    process.wait()
    assert torch.load(last, weights_only=True)["global_step"] < 200
    done = command("train", f"resume={killed}")
    assert done.returncode == 0, done.stderr
    one, other = (
        torch.load(path / CHECKPOINTS / LAST, weights_only=True)["state_dict"]
        for path in (whole, killed)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_that_cannot_begin_says_which_shard(folder, command, tmp_path):
    shutil.copytree(folder, tmp_path / "shards")
    index = tmp_path / "shards" / "index.json"
    index.write_text(index.read_text().replace("a made corpus", "another one"))  # not in the cache
    (tmp_path / "shards" / "val-00001.blocks").unlink()
    done = command(
        *("train", *SMALL, f"data.url={tmp_path / 'shards'}", f"run_dir={tmp_path / 'run'}"),
        "trainer.max_steps=5",
    )
    assert done.returncode == 1
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert f"{tmp_path}/shards/val-00001.blocks cannot be read: FileNotFoundError" in line
    assert "Resume" not in done.stderr and not (tmp_path / "run").exists()


def test_python_reads_what_the_command_reads(folder):
    cache = ShardCache(str(folder), TokenizerSettings(SHARDS), 16)
    cache.make()
    tokenizer, train, _ = cache.open()
    import numpy as np

    ids = train.take(np.arange(8_001)[:, None])[:, 0]
    assert tokenizer.decode(ids) == made_text(9_000)[:8_000]
