"""Runs tests/interpreter in processes of its own: see its __init__.py for why not in this one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FILES = {path.name for path in (ROOT / "tests/interpreter").glob("test_*.py")}
# A process takes 5 s to start: four of about the same length, the last of what is not named.
TOGETHER = [
    ["test_scan.py"],
    ["test_layer.py", "test_operators.py"],
    ["test_interleavings.py", "test_mutations.py"],
]
REST = sorted(FILES.difference(*TOGETHER))

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("files", [*TOGETHER, REST], ids=lambda files: files[0])
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
    from tests.interpreter import conftest

    assert set(conftest.collect_ignore_glob) == {"test_*.py"}
