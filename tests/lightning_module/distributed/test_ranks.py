"""Which processes train: settings that fit, settings that contradict each other."""

import pytest
import torch
from omegaconf import OmegaConf

from lightning_module.distributed import ranks
from lightning_module.distributed.ranks import World
from lightning_module.errors import RunError


def world(**settings):
    defaults = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "single"}
    return World.of(OmegaConf.create(defaults | settings))


def as_torchrun_starts(monkeypatch, here, nodes):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    values = {"RANK": 0, "WORLD_SIZE": here * nodes, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": here}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize(
    ("settings", "here"),
    [
        ({}, 1),
        ({"strategy": "auto", "devices": "auto"}, 1),
        ({"strategy": "auto", "devices": 3}, 3),
        ({"strategy": "ddp", "devices": "2"}, 2),
        ({"strategy": "fsdp", "devices": 4}, 4),
    ],
)
def test_processes_of_this_machine(settings, here):
    found = world(**settings)
    assert (found.here, found.nodes, found.size, found.environment) == (here, 1, here, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"devices": 2}, "strategy=single trains on one device .*trainer.devices=2.* strategy=ddp"),
        ({"num_nodes": 2}, "strategy=single trains on one .* or trainer.devices=1"),
        ({"strategy": "ddp", "num_nodes": 2}, "needs torchrun or srun .* trainer.num_nodes=1"),
        ({"strategy": "horovod"}, "must be one of single, auto, ddp, fsdp; got 'horovod'"),
        ({"strategy": "ddp", "devices": 0}, "trainer.devices=0 cannot be used"),
        ({"strategy": "ddp", "devices": "two"}, "trainer.devices=two cannot be used"),
        ({"strategy": "ddp", "devices": 4000}, "trainer.devices=4000 .*: at most .* are started"),
        (
            {"strategy": "ddp", "devices": 2, "accelerator": "abacus"},
            "accelerator=abacus .* cannot",
        ),
    ],
)
def test_settings_that_contradict_each_other(settings, message):
    with pytest.raises(RunError, match=message):
        world(**settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_gpu_that_is_not_there():
    with pytest.raises(RunError, match=r"accelerator=gpu .* cannot be used on this machine"):
        world(strategy="ddp", devices=2, accelerator="gpu")


def test_torchrun_and_the_settings_must_agree(monkeypatch):
    as_torchrun_starts(monkeypatch, here=2, nodes=3)
    found = world(strategy="ddp", devices="auto", num_nodes=3)
    assert (found.here, found.nodes, found.size) == (2, 3, 6)
    assert found.environment is not None
    with pytest.raises(RunError, match=r"trainer\.devices=2 trainer\.num_nodes=3$"):
        world(strategy="ddp", devices=4, num_nodes=3)
    with pytest.raises(RunError, match=r"trainer\.devices=2 trainer\.num_nodes=3$"):
        world(strategy="ddp", devices="auto")
    with pytest.raises(RunError, match=r"6 processes were started.* set strategy=ddp"):
        world()


@pytest.mark.parametrize(("batch_size", "of"), [(8, 2), (9, 4), (5, 5), (1, 1)])
def test_shares_cover_all_rows_once_and_differ_by_one(batch_size, of):
    shares = [list(range(batch_size))[ranks.share(batch_size, number, of)] for number in range(of)]
    assert [row for share in shares for row in share] == list(range(batch_size))
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1


def test_rows_saved_by_some_ranks_are_taken_by_others(monkeypatch):
    state = torch.randn(2, 12, 3)
    for of in (1, 2, 3, 4):
        monkeypatch.setattr(ranks, "size", lambda of=of: of)
        parts = []
        for number in range(of):
            monkeypatch.setattr(ranks, "rank", lambda number=number: number)
            h, c = ranks.own_rows((state, -state))
            assert torch.equal(c, -h)
            parts.append(h)
        assert torch.equal(torch.cat(parts, 1), state)
    assert ranks.own_rows(None) is None


def test_one_process_asks_nobody():
    assert ranks.agree(3.0) == 3.0
    assert ranks.from_rank_zero("x") == "x"
    assert ranks.gathered(1) == [1]
    assert ranks.once(lambda: 5) == ranks.once_a_machine(lambda: 5) == 5
