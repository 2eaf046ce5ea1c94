"""What becomes of a class whose process ends well, badly or not at all: processes without torch."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from triton_gru.verdicts import measuring
from triton_gru.verdicts.measuring import BEGUN, MODES, measure
from triton_gru.verdicts.shapes import ShapeClass, Verdict

pytest.importorskip("triton")

SHAPE = ShapeClass(True, "float32", 16, 1, 4)
PASSED = {m: Verdict("2026-01-01", None, (10.0, 20.0), (30.0, 40.0)) for m in MODES}
RESULT = json.dumps({mode: verdict.record() for mode, verdict in PASSED.items()})
SECONDS = 0.7


def process(script, deadline=250.0):
    command = [sys.executable, "-c", f"begun = {BEGUN!r}\nresult = {RESULT!r}\n{script}"]
    return measure(SHAPE, torch.device("cpu"), deadline=deadline, command=command)


def test_a_class_that_passes():
    assert process("print('noise'); print(begun); print('more'); print(result)").verdicts == PASSED


@pytest.mark.parametrize(
    ("script", "failure"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended with SIGSEGV"),
        ("raise RuntimeError('illegal memory access')", "ended with 1: RuntimeError: illegal"),
        ("raise SystemExit(7)", "ended with 7"),
        ("print('{')", "without a result"),
        ("print('[]')", "without a result"),
        ("", "without a result"),
    ],
)
def test_a_process_that_ends_badly_is_a_failure_of_the_kernels(script, failure):
    outcome = process(f"print(begun, flush=True)\n{script}")
    assert set(outcome.verdicts) == set(MODES) and failure in outcome.failure


@pytest.mark.parametrize(
    ("script", "obstacle"),
    [
        ("raise ImportError('no torch')", "ended with 1: ImportError: no torch"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended with -9"),
        ("import json; print(begun); print(json.dumps({'obstacle': 'no memory'}))", "no memory"),
    ],
)
def test_what_says_nothing_about_the_kernels_is_not_remembered(script, obstacle):
    outcome = process(script)
    assert outcome.verdicts == {} and outcome.failure is None and obstacle in outcome.obstacle


def test_a_process_that_hangs_is_killed_with_what_it_started(tmp_path):
    pid = tmp_path / "pid"
    script = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(pid)!r}, "w").write(str(child.pid))
print(begun, flush=True)
time.sleep(600)
"""
    for deadline in (SECONDS, 20 * SECONDS, 200 * SECONDS):  # a busy machine is slow to begin
        outcome = process(script, deadline)
        if outcome.verdicts:
            break
    assert f"no result within {deadline:g} s" in outcome.failure
    stat = Path("/proc", pid.read_text(), "stat")
    for _ in range(500):  # whoever inherits it has yet to reap it
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.01)
    else:
        pytest.fail("what the process started lives on")


def test_a_process_that_never_begins_is_no_failure():
    outcome = process("import time; time.sleep(600)", SECONDS)
    assert outcome.verdicts == {} and "gave no sign" in outcome.obstacle


def test_a_process_that_cannot_be_started_is_no_failure():
    outcome = measure(SHAPE, torch.device("cpu"), command=["/no/such/program"])
    assert outcome.verdicts == {} and "could not be started" in outcome.obstacle


def test_what_no_kernel_takes_starts_no_process():
    shape = ShapeClass(True, "float32", 100_000, 1, 4)
    outcome = measure(shape, torch.device("cpu"), command=["/no/such/program"])
    assert outcome.verdicts == {} and "hidden_size=100000" in outcome.obstacle


def test_the_process_counts_on_the_same_multiprocessors(monkeypatch):
    monkeypatch.setenv("TRITON_GRU_SM_BUDGET", "17")
    code, output, _ = measuring._run(
        [sys.executable, "-c", "import os; print(os.environ['TRITON_GRU_SM_BUDGET'])"], 5, 60.0
    )
    assert (code, output.strip()) == (0, "5")
    assert os.environ["TRITON_GRU_SM_BUDGET"] == "17"
