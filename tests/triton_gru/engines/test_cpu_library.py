"""The CPU engine's library: what it is built with, and what stands in the way of it."""

import stat
import subprocess
import sys

import pytest

from triton_gru.engines.cpu import library

needs_library = pytest.mark.skipif(
    library.obstacle() is not None, reason=f"no CPU engine here: {library.obstacle()}"
)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A cache directory of its own, in which nothing is built."""
    monkeypatch.setenv("TRITON_GRU_CACHE", str(tmp_path))
    for function in (library.library, library.obstacle):
        function.cache_clear()
    yield tmp_path
    for function in (library.library, library.obstacle):
        function.cache_clear()


def test_it_can_be_turned_off(fresh, monkeypatch):
    monkeypatch.setenv("TRITON_GRU_CPU", "0")
    assert "TRITON_GRU_CPU=0" in library.obstacle()
    assert not list(fresh.iterdir())


def test_a_machine_without_a_compiler(fresh, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert "needs a C compiler" in library.obstacle()


@needs_library
def test_a_compiler_that_fails_is_named_with_what_it_said(fresh, monkeypatch):
    compiler = fresh / "broken-cc"
    compiler.write_text("#!/bin/sh\necho 'x.c:1: error: no such thing' >&2\nexit 1\n")
    compiler.chmod(0o700)
    monkeypatch.setenv("CC", str(compiler))
    assert "broken-cc cannot build the CPU engine: x.c:1: error" in library.obstacle()
    assert [p.name for p in (fresh / "cpu").iterdir()] == ["lock"]


@needs_library
def test_a_directory_that_others_can_write_to_is_refused(fresh):
    (fresh / "cpu").mkdir()
    (fresh / "cpu").chmod(0o777)
    assert "can be written by others" in library.obstacle()


@needs_library
def test_processes_at_once_build_it_once(fresh):
    code = (
        "import logging, sys; logging.basicConfig(level=logging.INFO, stream=sys.stdout);"
        "from triton_gru.engines.cpu import library; assert library.obstacle() is None"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [run.communicate(timeout=240)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert "".join(said).count("building") == 1
    assert stat.S_IMODE((fresh / "cpu").stat().st_mode) == 0o700
    assert len(list((fresh / "cpu").glob("*.so"))) == 1
