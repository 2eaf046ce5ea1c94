"""The project's kernels, compiled, in the machine: values against float64."""

import pytest

pytest.importorskip("triton", reason="compiles the kernels")

from tests.ptx import cases


@pytest.mark.parametrize("launch", ["single", "sentinel", "counter"])
def test_a_scan(launch):
    outcome = cases.run_scan((4, 3, 33), "bf16", launch, 90, True, lengths=True)
    assert not outcome.wrong()


def test_a_step():
    assert not cases.run_step(3, 48, "bf16", 90, True).wrong()
