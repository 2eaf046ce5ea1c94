import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lightning_module.conftest import TINY, made_text

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_wheel_trains_from_another_directory(tmp_path, engine_cache):
    def run(*command, cwd, **environment):
        done = subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=240,
            env={**os.environ, "TRITON_GRU_CACHE": str(engine_cache), **environment},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, ROOT, cwd=tmp_path)
    (wheel,) = tmp_path.glob("triton_gru-*.whl")
    site = tmp_path / "site"
    run("-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "text.txt").write_text(made_text(5_000))
    where = run(
        *("-c", "import lightning_module as m, triton_gru as t; print(m.__file__, t.__file__)"),
        cwd=elsewhere,
        PYTHONPATH=str(site),
    )
    assert where.count(str(site)) == 2
    run(
        *("-m", "lightning_module.train", *TINY, "data.paths=[text.txt]", "trainer.max_steps=3"),
        "run_dir=run",
        cwd=elsewhere,
        PYTHONPATH=str(site),
    )
    assert (elsewhere / "run" / "summary.json").is_file()
