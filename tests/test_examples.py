"""Each script of examples/ runs and reaches its result."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def run(tmp_path, engine_cache):
    def run(name, *arguments):
        done = subprocess.run(
            [sys.executable, EXAMPLES / name, *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=240,
            env={
                **os.environ,
                "PYTHONPATH": str(EXAMPLES.parent),
                "TRITON_GRU_CACHE": str(engine_cache),
            },
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def figure(label, output):
    return float(re.search(rf"{label} ([\d.e+-]+)", output)[1])


def test_swap_in(run):
    output = run("swap_in.py")
    assert "Swapped for triton_gru's: gru." in output
    # Both are ATen's kernels on the same numbers; auto may come to choose another engine.
    assert figure("largest difference:", output) < 1e-5


def test_own_lightning_module(run):
    pytest.importorskip("lightning")
    # Always naming one sign is right in about half of the rows.
    assert figure("accuracy", run("own_lightning_module.py")) > 0.9


def test_own_data(run):
    pytest.importorskip("lightning")
    output = run("own_data.py")
    # A sentence is one of 18 with 21 to 27 characters: 4.2 bits; characters alone have over 3 each.
    assert figure("validation:", output) < 1
    assert re.search(
        r"^(The cat|A dog|My horse) (sees|hears|likes) (the moon|a bird)\.$", output, re.MULTILINE
    )


def test_each_example_is_run_here():
    tested = set(re.findall(r'run\("(\w+\.py)"', Path(__file__).read_text("utf-8")))
    assert tested == {path.name for path in EXAMPLES.glob("*.py")}
