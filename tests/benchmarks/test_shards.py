"""The benchmark of shards compares the same tokens, and its table has the ratio of each."""

import json

import pytest
import torch

from benchmarks import shards


def test_all_places_give_the_same_chunks(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_GRU_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shards, "DOCUMENT", 2_000)
    shards.write(tmp_path, 64 * 2_000)
    loaders = {
        "mapped": shards.opened("mapped", "", tmp_path),
        "folder": shards.opened("folder", str(tmp_path / "shards"), tmp_path),
    }
    for one, other in zip(*loaders.values(), strict=True):
        assert torch.equal(one.inputs, other.inputs) and torch.equal(one.targets, other.targets)
    seen = []
    found = shards.compare(loaders, turn=3, rounds=2, use=seen.append)
    assert len(seen) == 2 * (1 + 3 * 2)
    shards.show("Made", found, 3)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| folder")]
    assert len(rows) == 1 and rows[0].count("|") == 6
    shards.memory_of("folder", str(tmp_path / "shards"), tmp_path, 5)
    assert int(json.loads(capsys.readouterr().out)) >= 0


@pytest.mark.slow
def test_a_server_answers_late(tmp_path, monkeypatch):
    pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    monkeypatch.setenv("TRITON_GRU_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shards, "LATENCIES", (0,))
    monkeypatch.setattr(shards, "DOCUMENT", 2_000)
    monkeypatch.setitem(shards.fsspec.config.conf, "s3", {})
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "none")  # and so restored
    shards.write(tmp_path, 64 * 2_000)
    expected = shards.opened("mapped", "", tmp_path)
    with shards.servers(tmp_path) as urls:
        found = shards.opened("S3, 0 ms", urls["S3, 0 ms"], tmp_path)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one.inputs, other.inputs)
