"""Verdicts on disk: kept, merged, and never in the way of a call."""

import errno
import json
import logging
import multiprocessing

import pytest

from tests.triton_gru.verdicts.conftest import forget
from triton_gru.verdicts import store
from triton_gru.verdicts.shapes import Verdict

HERE = "NVIDIA Something sm_90 x132 of 132 | torch 2 | kernels abc"
PASSED = Verdict("2026-01-01", None, (10.0, 20.0), (30.0, 40.0))
FAILED = Verdict("2026-01-02", "wrong dh0")


@pytest.fixture
def file(cache):
    store.remember(HERE, {"a": PASSED})
    (path,) = cache.rglob("*.json")
    forget()
    return path


def warnings_in(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def test_what_one_process_remembers_another_knows(file, cache):
    assert store.known(HERE) == {"a": PASSED}
    store.remember(HERE, {"b": FAILED})
    store.remember("another | device", {"a": FAILED})
    store.remember(HERE.replace("abc", "def"), {"c": PASSED})  # other kernels, the same file
    forget()
    assert store.known(HERE) == {"a": PASSED, "b": FAILED}
    assert store.known("another | device") == {"a": FAILED}
    assert len(list(cache.rglob("*.json"))) == 2, "a file a device"


def test_a_source_hash_that_changed_is_another_environment(file):
    assert store.known(HERE.replace("abc", "abd")) == {}


@pytest.mark.parametrize("content", ["half", "empty", "not UTF-8", "a list", "no braces"])
def test_a_broken_file_is_one_warning_and_is_replaced(file, caplog, content):
    whole = file.read_bytes()
    broken = {"half": whole[: len(whole) // 2], "empty": b"", "not UTF-8": b"\xff\xfe"}
    file.write_bytes(broken.get(content, b"[1]" if content == "a list" else b"?"))
    for _ in range(3):
        assert store.known(HERE) == {}
        store._valid.cache_clear()
    assert len(warnings_in(caplog)) == 1 and str(file) in caplog.text
    store.remember(HERE, {"b": FAILED})
    forget()
    assert store.known(HERE) == {"b": FAILED}


def test_foreign_entries_are_left_out_and_left_alone(file, caplog):
    records = json.loads(file.read_text())
    records[HERE]["strange"] = {"day": 7}
    records["what"] = "ever"
    file.write_text(json.dumps(records))
    assert store.known(HERE) == {"a": PASSED}
    store.remember(HERE, {"b": FAILED})
    assert store.known(HERE) == {"a": PASSED, "b": FAILED}
    assert len(warnings_in(caplog)) == 1 and "2 entries" in caplog.text
    records = json.loads(file.read_text())
    assert records["what"] == "ever" and records[HERE]["strange"] == {"day": 7}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_takes_nothing_is_one_warning(cache, caplog, monkeypatch, code):
    def refuse(path, content):
        raise OSError(code, "no")

    monkeypatch.setattr(store, "write_atomically", refuse)
    for name in "ab":
        store.remember(HERE, {name: PASSED})
    assert store.known(HERE) == {"a": PASSED, "b": PASSED}, "in this process they hold"
    assert len(warnings_in(caplog)) == 1 and "this process alone" in caplog.text


def test_a_cache_that_cannot_be_made_is_one_warning(tmp_path, caplog, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRITON_GRU_CACHE", str(tmp_path / "file" / "cache"))
    for name in "ab":
        store.remember(HERE, {name: PASSED})
    assert store.known(HERE) == {"a": PASSED, "b": PASSED}
    assert len(warnings_in(caplog)) == 1


def test_a_lock_that_stays_taken_is_one_warning(file, caplog, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(store, "PATIENCE", 0.05)
    with open(file.with_suffix(".lock"), "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        store.remember(HERE, {"b": PASSED})
    assert store.known(HERE) == {"a": PASSED, "b": PASSED}
    assert len(warnings_in(caplog)) == 1


def writes(first):
    for i in range(first, first + 20):
        store.remember(HERE, {str(i): PASSED})


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="processes are not forked here"
)
def test_processes_that_write_at_once_lose_nothing(cache):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=writes, args=(20 * n,)) for n in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert set(store.known(HERE)) == set(map(str, range(60)))


def test_an_additional_file_is_read_and_never_written(tmp_path, monkeypatch, caplog):
    path = tmp_path / "cluster.json"
    monkeypatch.setenv("TRITON_GRU_VERDICTS", str(path))
    assert store.known(HERE) == {} and store.known(HERE) == {}
    assert len(warnings_in(caplog)) == 1, "it is named and is not there"
    forget()
    content = json.dumps({HERE: {"a": FAILED.record(), "b": FAILED.record()}})
    path.write_text(content)
    store.remember(HERE, {"a": PASSED})
    forget()
    assert store.known(HERE) == {"a": PASSED, "b": FAILED}, "one's own go first"
    assert path.read_text() == content


def test_what_comes_with_the_package_goes_last(tmp_path, monkeypatch):
    shipped, named = tmp_path / "shipped.json", tmp_path / "named.json"
    shipped.write_text(json.dumps({HERE: dict.fromkeys("abc", FAILED.record())}))
    named.write_text(json.dumps({HERE: {"b": PASSED.record()}}))
    monkeypatch.setattr(store, "_shipped", lambda: (shipped,))
    monkeypatch.setenv("TRITON_GRU_VERDICTS", str(named))
    store.adopt(HERE, {"c": PASSED})
    assert store.known(HERE) == {"a": FAILED, "b": PASSED, "c": PASSED}
