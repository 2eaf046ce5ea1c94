"""A file is written whole or not at all, by the layer's function and the training project's."""

import errno
import os
from pathlib import Path

import pytest

import lightning_module.atomic_files
import triton_gru.cache

MODULES = [lightning_module.atomic_files, triton_gru.cache]


@pytest.fixture(params=MODULES, ids=lambda module: module.__name__)
def write(request):
    return request.param.write_atomically


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_mode_is_the_umasks(write, tmp_path, umask):
    before = os.umask(umask)
    try:
        write(tmp_path / "file", b"new")
    finally:
        os.umask(before)
    assert (tmp_path / "file").read_bytes() == b"new"
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SystemExit(3)])
@pytest.mark.parametrize("owner, call", [(os, "fsync"), (Path, "replace")])
def test_what_fails_leaves_the_file_that_was_there(
    write, tmp_path, monkeypatch, owner, call, error
):
    def fail(*_):
        raise error

    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(owner, call, fail)
    with pytest.raises(type(error)):
        write(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]
