"""How many multiprocessors a launch counts on."""

import pytest
import torch

pytest.importorskip("triton")

from triton_gru.plan import selection
from triton_gru.plan.devices import DEVICES
from triton_gru.plan.plan import Problem
from triton_gru.plan.planner import best_plan

CUDA = torch.device("cuda", 0)
H200 = DEVICES[90]


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch):
    monkeypatch.setattr(selection, "whole_device", lambda device: H200)
    for name in ("TRITON_GRU_SM_BUDGET", "NCCL_MAX_CTAS"):
        monkeypatch.delenv(name, raising=False)


def test_alone_a_launch_counts_on_thewhole_device():
    assert selection.device_limits(CUDA) == H200


@pytest.mark.parametrize(("asked", "expected"), [("100", 100), (" 1 ", 1), ("1000", 132)])
def test_a_budget_is_kept(monkeypatch, asked, expected):
    monkeypatch.setenv("TRITON_GRU_SM_BUDGET", asked)
    monkeypatch.setattr(selection, "_nccl_is_initialized", lambda: True)  # what is asked for wins
    assert selection.device_limits(CUDA).multiprocessors == expected


def test_no_plan_takes_more_programs_than_the_budget(monkeypatch):
    problem = Problem(batch=64, hidden=1024, dtype="bfloat16", reset_after=True)
    for budget in (132, 90, 40):
        monkeypatch.setenv("TRITON_GRU_SM_BUDGET", str(budget))
        plan = best_plan(problem, selection.device_limits(CUDA))
        assert plan.group * plan.groups_a_launch < budget  # one in 64 is left to others


@pytest.mark.parametrize("asked", ["", "0", "-1", "half", "1.5"])
def test_a_budget_that_is_none_is_refused(monkeypatch, asked):
    monkeypatch.setenv("TRITON_GRU_SM_BUDGET", asked)
    with pytest.raises(ValueError, match="TRITON_GRU_SM_BUDGET should be a number"):
        selection.device_limits(CUDA)


@pytest.mark.parametrize(("most", "left"), [(None, 100), ("16", 116)])
def test_beside_nccl_its_multiprocessors_are_left_to_it(monkeypatch, most, left):
    dist = torch.distributed
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: "cpu:gloo,cuda:nccl")
    if most is not None:
        monkeypatch.setenv("NCCL_MAX_CTAS", most)
    assert selection.device_limits(CUDA).multiprocessors == left
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    assert selection.device_limits(CUDA).multiprocessors == 132
