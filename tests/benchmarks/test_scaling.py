"""The arithmetic of docs/scaling.md: against the model's own sizes, and at its limits."""

import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.scaling import GRADIENT_BYTES, Cluster, Model, main, step

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
MODEL = Model(vocab=1000, embedding=96, hidden=256, layers=3)


def test_parameters_are_those_of_the_model():
    from lightning_module.model import SentencePredictor

    model = SentencePredictor(1000, embedding_size=96, hidden_size=256, num_layers=3)
    assert MODEL.parameters == sum(p.numel() for p in model.parameters())
    last = [p for n, p in model.named_parameters() if "embedding" in n or n.endswith("_l0")]
    assert MODEL.last_gradients == sum(p.numel() for p in last)


def test_all_reduce_at_its_limits():
    free = Cluster(near=0.0, far=0.0)
    assert free.all_reduce(1e9, 1) == 0
    # two GPUs of a node: each sends half and receives half, twice
    assert free.all_reduce(1e9, 2) == pytest.approx(1e9 / free.nvlink)
    # one GPU a node: the network's ring alone
    apart = dataclasses.replace(free, per_node=1)
    assert apart.all_reduce(1e9, 4) == pytest.approx(2 * 3 / 4 * 1e9 / free.network)
    # without bandwidth terms only the latency is left, and it grows with the logarithm
    latency = [Cluster().all_reduce(0, n) for n in (8, 64, 512)]
    assert latency[2] - latency[1] == pytest.approx(latency[1] - latency[0])


def test_what_no_time_is_spent_on_does_not_count():
    slow = step(MODEL, Cluster(), 64, 16, 32)
    instant = Cluster(nvlink=1e30, network=1e30, near=0, far=0)
    fast = step(MODEL, instant, 64, 16, 32)
    alone = step(MODEL, instant, 1, 16, 32)
    assert fast.tokens_per_second == pytest.approx(64 * alone.tokens_per_second)
    assert slow.tokens_per_second < fast.tokens_per_second
    assert slow.seconds == pytest.approx(fast.seconds + slow.exposed)
    # never less than what nothing can hide, never more than all of it
    last = Cluster().all_reduce(MODEL.last_gradients * GRADIENT_BYTES, 64)
    assert last <= slow.exposed <= slow.all_reduce
    # without a network worth the name everything shows but what the backward hides
    starved = step(MODEL, Cluster(network=1e6), 64, 16, 32)
    assert starved.limit == "all-reduce"
    assert 0.9 * starved.all_reduce < starved.exposed < starved.all_reduce


def test_the_scan_takes_a_step_a_token():
    one, four = (step(MODEL, Cluster(), 8, 16, length) for length in (32, 128))
    assert four.scan == pytest.approx(4 * one.scan)
    assert four.all_reduce == one.all_reduce
    accumulated = step(MODEL, Cluster(), 8, 16, 32, accumulate=4)
    assert (accumulated.tokens, accumulated.scan) == (four.tokens, pytest.approx(four.scan))


def rows(text):
    """Tokens a second, in millions, by number of GPUs."""
    return {int(m[1]): float(m[2]) for m in re.finditer(r"^ +(\d+) .* ([\d.]+) M ", text, re.M)}


def test_the_page_shows_what_its_commands_print():
    """Within a quarter: a better plan moves the lower bounds by less, a changed formula by more."""
    blocks = re.findall(r"```\n\$ python (-m benchmarks.scaling.*)\n([^`]*)```", PAGE.read_text())
    assert len(blocks) == 2
    for command, shown in blocks:
        done = subprocess.run(
            [sys.executable, *shlex.split(command)], capture_output=True, text=True, check=True
        )
        printed, expected = rows(done.stdout), rows(shown)
        assert set(printed) == set(expected) == {8, 64, 512}
        assert printed == pytest.approx(expected, rel=0.25), f"bring {PAGE} up to date: {command}"
        assert "arithmetic, not a measurement" in shown


@pytest.mark.parametrize(
    "bad", [["--batch-size", "0"], ["--total-batch-size", "100"], ["--device", "70"]]
)
def test_bad_sizes_are_refused(bad, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scaling", *bad])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "error: " in capsys.readouterr().err
