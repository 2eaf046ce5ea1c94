"""What training puts around a module: autocast, GradScaler, determinism, DDP, FSDP2."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.tolerances import assert_close
from tests.triton_gru.counterparts import IN, H, T, pair, results
from triton_gru import GRU, replace_gru

pytestmark = pytest.mark.parametrize("reset_after", [True, False])
WORLD = 2
ROWS = 2 * WORLD


@pytest.fixture
def x():
    return torch.randn(T, ROWS, IN)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.compat("training", "autocast bf16 and fp16 with GradScaler", "works")
def test_autocast_and_grad_scaler(backend, reset_after, x, dtype):
    ours, theirs = pair(backend, reset_after)
    outcomes = []
    for module in (ours, theirs):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=dtype == torch.float16)
        for _ in range(2):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype):
                y, h_n = module(x)
                loss = y.float().square().mean() + h_n.float().square().mean()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in module.parameters())
        outcomes.append([y, h_n, *module.parameters()])
    assert [t.dtype for t in outcomes[0][:2]] == [t.dtype for t in outcomes[1][:2]]
    assert_close(*([t.float() for t in outcome] for outcome in outcomes), dtype=dtype)


@pytest.mark.compat("training", "autocast bf16 and fp16 with GradScaler", "works")
def test_grad_scaler_skips_a_step_that_overflows(backend, reset_after, x):
    ours, _ = pair(backend, reset_after)
    before = [p.detach().clone() for p in ours.parameters()]
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15)
    with torch.autocast("cpu", torch.float16):
        y, _ = ours(x)
    scaler.scale(y.float().sum() * 1e35).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**14
    assert all(torch.equal(p, b) for p, b in zip(ours.parameters(), before, strict=True))


@pytest.mark.compat("training", "torch.use_deterministic_algorithms(True)", "works")
def test_deterministic_algorithms(backend, reset_after, x, poisoned_memory):
    ours, theirs = pair(backend, reset_after)
    first, second = results(ours, x), results(ours, x)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert_close(first, results(theirs, x))


def in_processes(tmp_path, function, *arguments):
    """Runs function(rank, *arguments) in WORLD processes joined by gloo."""
    torch.multiprocessing.start_processes(
        _joined, (str(tmp_path / "store"), function, arguments), WORLD, start_method="fork"
    )


def _joined(rank, store, function, arguments):
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=WORLD)
    with contextlib.ExitStack() as stack:
        stack.callback(dist.destroy_process_group)
        function(rank, *arguments)


def trained(module, x, steps=2):
    """The parameters after some steps of SGD on the mean over the rows of x."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        module(x)[0].square().mean().backward()
        optimizer.step()
    parameters = [p.detach() for p in module.parameters()]
    return [p.full_tensor() if isinstance(p, DTensor) else p for p in parameters]


def rows_of(rank, x):
    return x.chunk(WORLD, 1)[rank]


def _ddp(rank, ours, x, expected):
    wrapped = DistributedDataParallel(ours)
    assert_close(trained(wrapped, rows_of(rank, x)), expected)


@pytest.mark.compat("training", "DistributedDataParallel", "works")
def test_ddp(backend, reset_after, x, tmp_path):
    ours, theirs = pair(backend, reset_after)
    in_processes(tmp_path, _ddp, ours, x, trained(theirs, x))


class Model(nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn, self.output = rnn, nn.Linear(H, H)

    def forward(self, x):
        return self.output(self.rnn(x)[0]), None


def _fsdp(rank, model, x, expected, alone):
    mesh = dist.init_device_mesh("cpu", (WORLD,))
    if alone:
        fully_shard(model.rnn, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert isinstance(model.rnn, FSDPModule) == alone and isinstance(model.rnn, GRU)
    assert isinstance(model.rnn.weight_hh_l0, DTensor)
    assert_close(trained(model, rows_of(rank, x)), expected)
    if alone:
        left = replace_gru(nn.ModuleList([nn.GRU(2, 2), model.rnn]))
        assert list(left.swapped) == ["0"]


@pytest.mark.parametrize("alone", [False, True], ids=["with its parent", "alone"])
@pytest.mark.compat("training", "FSDP2 (fully_shard)", "works", "swap before it")
def test_fsdp2(backend, reset_after, x, tmp_path, alone):
    ours, theirs = pair(backend, reset_after)
    model, reference = Model(ours), Model(theirs)
    reference.output.load_state_dict(model.output.state_dict())
    in_processes(tmp_path, _fsdp, model, x, trained(reference, x), alone)
