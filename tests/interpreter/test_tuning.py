"""`tune` with a stub clock: which plans it launches, and that the next launch takes its choice."""

import pytest
import torch

from triton_gru import tuning
from triton_gru.plan import selection, tuned


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_GRU_CACHE", str(tmp_path))
    tuned._read.cache_clear()
    yield
    tuned._read.cache_clear()


def test_the_fastest_of_the_timed_plans_is_taken_from_then_on(monkeypatch):
    calls = []

    def clock(call):
        calls.append(call.args[0])
        call()
        return 1.0 / len(calls)  # each later one is faster

    found = tuning.tune(8, 3, dtype=torch.float32, steps=2, candidates=2, device="cpu", timer=clock)
    assert [len(found[d]) for d in ("forward", "backward")] == [2, 2]
    for direction, timed in found.items():
        assert [us for _, us in timed] == sorted(us for _, us in timed)
        fastest = timed[0][0]
        assert fastest.direction == direction
        plan = selection.plan_scan(
            torch.zeros(5, 3, 1, 24),
            torch.zeros(1, 3, 8),
            reset_after=True,
            direction=direction,
            precision=selection.matrix_precision(torch.float32),
        )
        assert tuned._choice(plan) == tuned._choice(fastest)


def test_a_plan_that_cannot_be_launched_is_left_out(caplog):
    def clock(call):
        if call.args[0].block_m == 16:
            raise RuntimeError("out of resource")
        return 1.0

    found = tuning.tune(8, 3, dtype=torch.float32, steps=1, candidates=3, device="cpu", timer=clock)
    assert all(plan.block_m != 16 for timed in found.values() for plan, _ in timed)
    assert "out of resource" in caplog.text
