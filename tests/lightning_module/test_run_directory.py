"""The run directory: where it may lie, who may write to it, and what a failed start leaves."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace

import pytest
from omegaconf import OmegaConf

from lightning_module import run_lock
from lightning_module.callbacks.stopping import EndWhenTakenOver
from lightning_module.errors import DataError, RunError
from lightning_module.run_directory import check_run_dir, make_run_dir
from lightning_module.run_files import CHECKPOINTS, CONFIG, TOKENIZER
from lightning_module.run_lock import LOCK, STALE, Holder, RunLock, read_holder, wait_until_free


class Data:
    """What `make_run_dir` asks of the data."""

    def __init__(self):
        self.tokenizer = self

    def save(self, path):
        path.write_text("a tokenizer")


def make(run_dir):
    lock = RunLock(run_dir)
    check_run_dir(run_dir)
    undo = make_run_dir(run_dir, OmegaConf.create({"seed": 1}), Data(), lock)
    return lock, undo


def refused(run_dir):
    before = sorted(run_dir.iterdir()) if os.path.isdir(run_dir) else None
    with pytest.raises(RunError) as error:
        make(run_dir)
    assert "\n" not in str(error.value)
    assert before == (sorted(run_dir.iterdir()) if os.path.isdir(run_dir) else None)
    return str(error.value)


@pytest.mark.skipif(os.name != "posix", reason="modes of Unix")
def test_every_file_and_folder_has_the_mode_of_the_umask(train_here, tmp_path, monkeypatch):
    seen = set()
    before = os.umask(0)
    try:
        for mask in (0o077, 0o002):
            os.umask(mask)
            made = tmp_path / f"{mask:o}"
            monkeypatch.setenv("TRITON_GRU_CACHE", str(made / "cache"))
            train_here(f"run_dir={made / 'run'}")
            for path in made.rglob("*"):
                expected = (0o777 if path.is_dir() else 0o666) & ~mask
                assert path.stat().st_mode & 0o777 == expected, path
                seen.add(path.name)
    finally:
        os.umask(before)
    assert {"best.ckpt", "last.ckpt", "metrics.csv", "samples.txt", "curves.png"} <= seen
    assert {TOKENIZER, CONFIG, "tensorboard", "train.tokens", "checksums.json"} <= seen


def test_an_empty_folder_is_filled_in_place_and_left_empty_by_a_failed_start(train_here, tmp_path):
    own, link = tmp_path / "own", tmp_path / "link"
    own.mkdir()
    link.symlink_to(own)
    folder = own.stat().st_ino
    unknown = "callbacks.samples.prompts=['ß']"
    with pytest.raises(DataError, match="does not know"):
        train_here(f"run_dir={link}", unknown)
    assert link.is_symlink() and own.stat().st_ino == folder and not list(own.iterdir())
    with pytest.raises(DataError, match="does not know"):
        train_here(f"run_dir={tmp_path / 'new' / 'run'}", unknown)
    assert not (tmp_path / "new").exists()
    train_here(f"run_dir={link}")
    assert link.is_symlink() and own.stat().st_ino == folder
    assert (own / CONFIG).is_file() and not (own / LOCK).exists()


def test_content_of_a_new_file_system_is_ignored(tmp_path):
    (tmp_path / "lost+found").mkdir(mode=0)
    _, undo = make(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"lost+found", LOCK, CHECKPOINTS, CONFIG}
    undo()
    assert [p.name for p in tmp_path.iterdir()] == ["lost+found"]


def test_the_directory_of_a_killed_start_is_used_again(tmp_path):
    left = tmp_path / "left"
    (left / CHECKPOINTS).mkdir(parents=True)
    (left / CHECKPOINTS / TOKENIZER).write_text("another tokenizer")
    (left / f".{CONFIG}.0123456789ab").write_text("half")
    (left / LOCK).write_text(json.dumps(asdict(replace(Holder.here(), pid=2**22 + 1))))
    lock, _ = make(left)
    lock.release()
    assert {p.name for p in left.iterdir()} == {CHECKPOINTS, CONFIG}
    assert (left / CHECKPOINTS / TOKENIZER).read_text() == "a tokenizer"
    assert f"resume={left}" in refused(left)


def test_directories_that_no_run_can_be_in(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    used = tmp_path / "used"
    (used / CHECKPOINTS).mkdir(parents=True)
    (used / "run.lock").write_text("of another program")
    (used / "precious").touch()
    for name, message in {
        "file": "is not a directory",
        "file/run": "Not a directory",
        "gone": "is a link to",
        "used": "exists and is not empty. Choose another",
        "x" * 300: "File name too long",
    }.items():
        assert message in refused(tmp_path / name)
    assert (used / "run.lock").read_text() == "of another program"
    # Nothing was made on the way there either.
    assert "too long" in refused(tmp_path / "a" / "b" / ("x" * 300))
    assert not (tmp_path / "a").exists()


@pytest.fixture(params=["flock", "no flock"])
def any_file_system(request, monkeypatch):
    """The system's locks, and a file system without them."""
    if request.param == "no flock":
        monkeypatch.setattr(run_lock, "fcntl", None)
    return request.param


def test_of_starts_at_once_in_one_directory_one_wins(tmp_path, any_file_system):
    for number in range(20):
        run_dir = tmp_path / f"{number}" / "run"
        if number % 2:
            run_dir.mkdir(parents=True)  # an empty folder of the user's
        together, won, lost = threading.Barrier(4), [], []

        def start(run_dir=run_dir, together=together, won=won, lost=lost):
            together.wait()
            try:
                won.append(make(run_dir))
            except RunError as refusal:
                lost.append(str(refusal))

        threads = [threading.Thread(target=start) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1 and len(lost) == 3
        assert all("is held by" in error or "is not empty" in error for error in lost)
        assert {p.name for p in run_dir.iterdir()} == {LOCK, CHECKPOINTS, CONFIG}
        won[0][1]()
        # One of the refused may have made the folder: then it stays, empty.
        assert run_dir.exists() or number % 2 == 0
        assert not run_dir.exists() or not list(run_dir.iterdir())


# --- the lock -------------------------------------------------------------------------------------


def hold(run_dir, seconds_ago=0.0, **changes):
    """A lock file as another process would have written it that long ago."""
    holder = replace(Holder.here(), token="another", **changes)
    (run_dir / LOCK).write_text(json.dumps(asdict(holder)))
    touched = time.time() - seconds_ago
    os.utime(run_dir / LOCK, (touched, touched))


def taken(run_dir):
    lock = RunLock(run_dir)
    lock.take()
    lock.release()
    assert not list(run_dir.iterdir())


def held(run_dir):
    with pytest.raises(RunError) as error:
        RunLock(run_dir).take()
    return str(error.value)


def test_a_second_process_is_refused_in_one_line(tmp_path, any_file_system):
    lock = RunLock(tmp_path)
    lock.take()
    code = (
        "import sys, pathlib; from lightning_module import run_lock\n"
        "if sys.argv[2] == 'no flock': run_lock.fcntl = None\n"
        "try: run_lock.RunLock(pathlib.Path(sys.argv[1])).take()\n"
        "except run_lock.RunError as error: print(error)\n"
        "assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code, str(tmp_path), any_file_system]
    said = subprocess.run(command, capture_output=True, text=True)
    assert f"is held by pid {os.getpid()} on" in said.stdout, said.stderr
    assert said.stdout.count("\n") == 1 and "last touched" in said.stdout
    lock.release()
    taken(tmp_path)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="tells processes apart by /proc")
def test_the_lock_of_an_ended_process_is_taken_over(tmp_path, any_file_system):
    hold(tmp_path, pid=2**22 + 1)  # above what Linux gives
    taken(tmp_path)
    hold(tmp_path, started=0)  # this pid, when another process had it
    taken(tmp_path)
    if any_file_system == "no flock":  # else the system knows better
        hold(tmp_path, seconds_ago=1)
        assert f"held by pid {os.getpid()}" in held(tmp_path)
    child = subprocess.Popen([sys.executable, "-c", ""])
    while run_lock._started(child.pid) is not None:
        time.sleep(0.01)
    assert run_lock._started(child.pid) is None  # it has ended, and nobody has asked how
    child.wait()


def test_the_lock_of_another_machine_is_taken_over_without_touches(
    tmp_path, any_file_system, caplog
):
    hold(tmp_path, machine="another", host="far", pid=7, seconds_ago=STALE / 2)
    error = held(tmp_path)
    assert "pid 7 on far since" in error and f"last touched {STALE / 2:.0f} s ago" in error
    assert f"After {STALE:.0f} s without" in error and str(tmp_path / LOCK) in error
    hold(tmp_path, machine="another", host="far", pid=7, seconds_ago=STALE + 1)
    taken(tmp_path)
    assert "pid 7 on far" in caplog.text and "taken over" in caplog.text
    (tmp_path / LOCK).touch()  # its maker has not written its name yet, or was killed before
    if any_file_system == "no flock":
        assert "has just taken it" in held(tmp_path)
        os.utime(tmp_path / LOCK, (0, 0))
    taken(tmp_path)


def test_a_sweep_waits_for_a_job_that_is_still_trained(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(run_lock, "_LOOK_AGAIN", 0.01)
    caplog.set_level("INFO")
    wait_until_free(tmp_path / "none")
    lock = RunLock(tmp_path)
    lock.take()
    waiting = threading.Thread(target=wait_until_free, args=[tmp_path])
    waiting.start()
    eventually(lambda: "waiting: " in caplog.text)
    time.sleep(0.1)
    assert waiting.is_alive() and caplog.text.count("waiting: ") == 1
    lock.release()
    waiting.join(60)
    assert not waiting.is_alive() and not list(tmp_path.iterdir())


def eventually(condition):
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_signs_of_life_and_a_run_that_was_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "HEARTBEAT", 0.02)
    lock = RunLock(tmp_path)
    lock.take()
    os.utime(tmp_path / LOCK, (0, 0))
    eventually(lambda: (tmp_path / LOCK).stat().st_mtime > 0)
    (tmp_path / LOCK).unlink()  # by hand: it is there again
    eventually(lambda: read_holder(tmp_path) is not None)
    lock.check()
    hold(tmp_path, machine="another", host="far")  # while this process was suspended
    with pytest.raises(RunError, match=r"lost the run .* held by pid .* on far"):
        eventually(lambda: EndWhenTakenOver(lock).on_train_batch_end())
    lock.release()
    assert read_holder(tmp_path).host == "far"


def test_training_holds_the_run_and_ends_when_it_is_lost(train_here, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    holders = []

    def check(lock):
        holders.append(read_holder(run_dir))
        raise RunError("lost")

    with monkeypatch.context() as patched:
        patched.setattr(RunLock, "check", check)
        with pytest.raises(RunError, match="lost"):
            train_here(f"run_dir={run_dir}")
    assert [holder.pid for holder in holders] == [os.getpid()]
    assert not (run_dir / LOCK).exists()
    lock = RunLock(run_dir)
    lock.take()
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    with pytest.raises(RunError, match="is held by"):
        train_here(f"run_dir={run_dir}", resuming=True)
    with pytest.raises(RunError, match="is held by"):
        train_here(f"run_dir={run_dir}")
    assert before == {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    lock.release()
