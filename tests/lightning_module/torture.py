"""Ends a training at random moments, goes on with it, and looks at what comes out.

    python -m tests.lightning_module.torture FOLDER TEXT HOW RANKS MOMENTS SEED

Every attempt is forked from one process that has imported everything: it starts in a fraction of a
second, where a command takes seconds. Prints what it did as JSON.
"""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import matplotlib.figure
import torch
from hydra import compose, initialize_config_dir

from lightning_module import checkpoints, train
from lightning_module.atomic_files import write_atomically
from lightning_module.errors import Stopped
from lightning_module.lightning_warnings import quiet
from lightning_module.run_directory import resumed
from lightning_module.run_files import CHECKPOINTS, CONFIG, LAST, METRICS, read_metrics
from lightning_module.settings.config_folder import CONFIGS
from tests.lightning_module.conftest import TINY

assert matplotlib.figure  # imported here, or every attempt would

# The last checkpoint every five steps, whatever the clock says: moments to be killed in.
SETTINGS = [
    *TINY, "data.batch_size=4", "data.seq_len=8", "model.hidden_size=8", "model.dropout=0.2",
    "trainer.max_steps=90", "trainer.val_check_interval=40", "trainer.log_every_n_steps=5",
    "callbacks.last.every_minutes=0", "callbacks.samples.max_tokens=3", "rank_timeout=30",
]  # fmt: skip
TORN_WRITES = "a checkpoint being written"
HOW = ("SIGKILL", "SIGTERM", TORN_WRITES, "a full disk")
STOPPED, FAILED = 3, 4  # exit codes of an attempt
GRACE = 5.0


class Attempt:
    """Forked processes that train, one a rank."""

    def __init__(self, run_dir: Path, text: Path, ranks: int, prepare=lambda rank: None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        sys.stdout.flush()
        self.left: dict[int, int] = {}
        self.codes: dict[int, int] = {}
        self.give_up = 0.0
        for rank in range(ranks):
            pid = os.fork()
            if pid == 0:
                with open(f"{run_dir}-rank{rank}.log", "a") as log:
                    os.dup2(log.fileno(), 1)
                    os.dup2(log.fileno(), 2)
                if ranks > 1:
                    os.environ |= {
                        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                        "LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0",
                        "TORCHELASTIC_RUN_ID": "torture", "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": str(port),
                    }  # fmt: skip
                prepare(rank)
                os._exit(self._train(run_dir, text, ranks))
            self.left[rank] = pid

    @staticmethod
    def _train(run_dir: Path, text: Path, ranks: int) -> int:
        try:
            resuming = (run_dir / CONFIG).is_file()
            if resuming:
                config, checkpoint = resumed(str(run_dir), [])
            else:
                with initialize_config_dir(str(CONFIGS), version_base="1.3"):
                    strategy = ["strategy=ddp", f"trainer.devices={ranks}"] if ranks > 1 else []
                    places = [f"data.paths=[{text}]", f"run_dir={run_dir}"]
                    config = compose("train", [*SETTINGS, *places, *strategy])
                checkpoint = None
            quiet()
            train.train(config, checkpoint, resuming=resuming)
            return 0
        except Stopped:
            return STOPPED
        except BaseException:
            traceback.print_exc()
            return FAILED

    def send(self, rank: int, number: int) -> None:
        if rank in self.left:
            os.kill(self.left[rank], number)

    def wait(self, seconds: float) -> bool:
        """Whether all have ended within that time."""
        deadline = time.monotonic() + seconds
        while self.left and time.monotonic() < deadline:
            # As distributed/processes.py does, and torchrun.
            failed = any(code not in (0, STOPPED) for code in self.codes.values())
            self.give_up = self.give_up or (failed and time.monotonic() + GRACE)
            if self.give_up and time.monotonic() > self.give_up:
                for rank in self.left:
                    self.send(rank, signal.SIGKILL)
            for rank, pid in list(self.left.items()):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
                    del self.left[rank]
            time.sleep(0.001)
        return not self.left


def result(run_dir: Path) -> dict:
    """Everything of a run that must not depend on what interrupted it."""
    last = torch.load(run_dir / CHECKPOINTS / LAST, weights_only=True)
    rows = read_metrics(run_dir / METRICS)
    return {
        "tensors": [
            *last["state_dict"].values(),
            *(s[k] for s in last["optimizer_states"][0]["state"].values() for k in sorted(s)),
            last["carried_state"],
            *(state["cpu"] for state in last["rng_states"]),
        ],
        "steps": last["global_step"],
        "validations": [(r["step"], r["val_loss"]) for r in rows if "val_loss" in r],
        "files": sorted(p.name for p in (run_dir / CHECKPOINTS).iterdir()),
    }


def same(a: dict, b: dict) -> bool:
    bits = all(map(torch.equal, a["tensors"], b["tensors"]))
    return bits and all(a[name] == b[name] for name in a if name != "tensors")


def die_while_saving(choose: random.Random):
    """Rank 0 is ended by a timer, without Python's doing, within its n-th write of a checkpoint."""
    nth, delay = choose.randint(1, 12), choose.uniform(1e-6, 4e-3)

    def prepare(rank: int) -> None:
        seen = 0

        def write(path: Path, content) -> None:
            nonlocal seen
            seen += 1
            if seen == nth and rank == 0:
                signal.setitimer(signal.ITIMER_REAL, delay)
            write_atomically(path, content)

        checkpoints.write_atomically = write

    return prepare


def full_disk(choose: random.Random):
    """From the n-th checkpoint on no file may grow beyond 4 kB, which none can be written with."""
    nth = choose.randint(1, 12)

    def prepare(rank: int) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        seen = 0

        def write(path: Path, content) -> None:
            nonlocal seen
            seen += 1
            if seen == nth:
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
            write_atomically(path, content)

        checkpoints.write_atomically = write

    return prepare


def torture(folder: Path, text: Path, how: str, ranks: int, moments: int, seed: int) -> dict:
    choose = random.Random(f"{how} {ranks} {seed}")
    begun = time.monotonic()
    first = Attempt(folder / "whole", text, ranks)
    assert first.wait(240) and set(first.codes.values()) == {0}, first.codes
    duration = time.monotonic() - begun
    expected = result(folder / "whole")
    ended = {"interrupted": 0, "runs": 0, "different": 0, "saved_at": [], "codes": {}}
    while ended["interrupted"] < moments:
        run_dir = folder / f"run-{ended['runs']}"
        while True:
            prepare = lambda rank: None  # noqa: E731
            if ended["interrupted"] < moments:
                if how == TORN_WRITES:
                    prepare = die_while_saving(choose)
                elif how == "a full disk":
                    prepare = full_disk(choose)
            attempt = Attempt(run_dir, text, ranks, prepare)
            if how in ("SIGKILL", "SIGTERM") and ended["interrupted"] < moments:
                attempt.wait(choose.uniform(0, duration))
                victims = list(range(ranks))
                if how == "SIGKILL":  # one rank, or all as when a machine goes down
                    victims = choose.choice([victims, *([rank] for rank in victims)])
                for rank in victims:
                    attempt.send(rank, signal.Signals[how])
            assert attempt.wait(240), f"still there: {attempt.left}"
            code = str(sorted(attempt.codes.values()))
            ended["codes"][code] = ended["codes"].get(code, 0) + 1
            if set(attempt.codes.values()) == {0}:
                break
            ended["interrupted"] += 1
            with contextlib.suppress(FileNotFoundError):
                last = run_dir / CHECKPOINTS / LAST
                ended["saved_at"].append(torch.load(last, weights_only=True)["global_step"])
        found = result(run_dir)
        if not same(found, expected):
            ended["different"] += 1
            found.pop("tensors")
            print(f"run {ended['runs']} differs: {found}", file=sys.stderr)
        ended["runs"] += 1
        shutil.rmtree(run_dir)
    return ended | {"seconds": round(time.monotonic() - begun, 1), "one_run": round(duration, 1)}


if __name__ == "__main__":
    _, folder, text, how, ranks, moments, seed = sys.argv
    torch.set_num_threads(1)
    print(json.dumps(torture(Path(folder), Path(text), how, int(ranks), int(moments), int(seed))))
