"""The first measurements in the interpreter: their kernels are right, and would say if not."""

import json
import os
import re
import subprocess
import sys

import pytest

from benchmarks.measurements import ROOT

pytest.importorskip("triton")

SCRIPT = """
import json, torch
from tests.interpreter import harness
harness.install()
from benchmarks import probes
from benchmarks.timing import WallClock
cpu, clock, found = torch.device("cpu"), WallClock(), {}
for name in ("copy", "L2", "product bfloat16", "exchange sentinel", "exchange counter", "kernels"):
    found[name] = probes.PROBES[name](cpu, clock, True)
for protocol in ("sentinel", "counter"):
    prepare, launch, right = probes.exchange_step(cpu, protocol, 2, 3)
    prepare()
    found[f"nothing done, {protocol}"] = right()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_ceilings_are_rates_of_known_sizes(found):
    assert found["L2"]["bytes"] == 2 * 64 * 4 * 3
    copy, product = found["copy"], found["product bfloat16"]
    assert copy["bytes"] == 2 * 2 * 1024
    assert copy["GB_s"] == pytest.approx(copy["bytes"] / copy["median_ms"] / 1e6)
    assert product["TFLOP_s"] == pytest.approx(2 * 32**3 / product["median_ms"] / 1e9)


@pytest.mark.parametrize("protocol", ["sentinel", "counter"])
def test_the_exchange_hands_over_every_word(found, protocol):
    """The probe checks its own result, and says no before it has run."""
    assert [row["programs"] for row in found[f"exchange {protocol}"]["rows"]] == [2, 3]
    assert found[f"nothing done, {protocol}"] is False


def test_kernels_are_measured_beside_their_plans(found):
    rows = found["kernels"]["rows"]
    assert {row["direction"] for row in rows} == {"forward", "backward"}
    assert {row["reset_after"] for row in rows} == {True, False}
    for row in rows:
        assert row["step_us"] > 0 and row["plan"]["lower_bound_us"] <= row["plan"]["estimate_us"]


def test_shared_memory_is_read_as_compiled():
    torch = pytest.importorskip("torch")
    from benchmarks import probes
    from benchmarks.timing import WallClock
    from tests.ptx.launching import emulated

    with emulated(90, seed=0) as launches:
        found = probes.shared_rate(torch.device("cpu"), WallClock(), True)
    assert found["bytes"] == 2 * 1024 * 4 * 7
    # A label, the loads, the jump back to it.
    loop = re.search(r"(\$L__BB\d+_\d+):.*ld\.shared\.v4.*bra\S*\s+\1;", launches[0].ptx, re.S)
    assert loop, "the loads have left the loop"
