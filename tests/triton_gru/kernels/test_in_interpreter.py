"""Runs tests/interpreter in processes of its own: see its __init__.py for why not in this one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FILES = {path.name for path in (ROOT / "tests/interpreter").glob("test_*.py")}
# Those of a few seconds share a process: to start one takes as long.
LONG = {f"test_{name}.py" for name in ("scan", "layer", "operators", "interleavings", "mutations")}

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "files", [*([name] for name in sorted(LONG)), sorted(FILES - LONG)], ids=lambda files: files[0]
)
def test_in_interpreter(files):
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *(f"tests/interpreter/{name}" for name in files)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_nothing_is_collected_there_without_the_interpreter():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--collect-only", "tests/interpreter"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert "no tests collected" in done.stdout, done.stdout
