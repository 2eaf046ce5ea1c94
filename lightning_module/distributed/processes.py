"""Several processes on one machine that train one run: started, watched and ended together.

The process that the user started (or Hydra's launcher, for a job of a sweep) trains nothing: it
passes its resolved config to the ranks, so that all have the same parameters, write to one
directory, and do not depend on a sweep. The ranks connect as torchrun's do.

torch's own `elastic_launch` was tried instead of `launch` (torch 2.13, two ranks on a CPU). It is
90 lines shorter, trains and handles SIGTERM alike (ended after 6.0 s, here after 3.6 s). But:
- it starts the ranks with its own standard input, so they notice that the command was killed only
  by prctl, which only Linux has (here a pipe closes);
- it prints its log before the error, and the message lacks the output of the rank that died;
- when a rank was killed the command took 17 s to end, and the two tests of ranks that die failed.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf

from lightning_module.errors import (
    CheckpointError,
    DamagedFile,
    DataError,
    Diverged,
    RankFailed,
    RunError,
    Stopped,
    StoreError,
)
from lightning_module.terminal.signals import Interrupted, handled_by

log = logging.getLogger(__name__)

JOB = "job.json"
# Seconds that the other ranks have to end by themselves, and to clean up, after one is lost.
_GRACE = 5.0
# Errors that `train` raises on purpose: their message suffices.
_KINDS = (DataError, StoreError, RunError, CheckpointError, DamagedFile, Diverged)
EXPECTED = {kind.__name__: kind for kind in _KINDS}


def launch(
    config: DictConfig, checkpoint: Path | None, ranks: int, resuming: bool
) -> dict[str, Any]:
    """Trains in `ranks` processes of this machine.

    Args:
        config: As for `train`.
        checkpoint: As for `train`.
        ranks: Number of processes.
        resuming: As for `train`.

    Returns:
        The result of `train` on rank 0.

    Raises:
        RankFailed: A rank died; the others are ended.
        Exception: As `train`; of several ranks' errors the first.
    """
    with tempfile.TemporaryDirectory(prefix="triton_gru-ranks-") as folder:
        job = {
            "config": OmegaConf.to_yaml(config, resolve=True),
            "checkpoint": checkpoint and str(checkpoint),
            "resuming": resuming,
        }
        Path(folder, JOB).write_text(json.dumps(job))
        # The store is open before the ranks connect: no other process can take its port.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        started = [_Rank(Path(folder), number, ranks, store.port) for number in range(ranks)]
        try:
            with _forwarding_signals(started) as received:
                _wait(started, received)
        finally:
            for rank in started:
                rank.kill()
        if any(rank.process.returncode != 0 for rank in started):
            failed = [rank for rank in started if rank.process.returncode != 0 and not rank.killed]
            # A rank without an outcome was killed; the others' errors are consequences.
            first = min(failed, key=lambda rank: rank.outcome().get("time", 0), default=None)
            error: Any = first and first.error()
            if received and not isinstance(error, Stopped):
                number = received[0]
                raise Interrupted(number)
            raise error
        return started[0].outcome()["metrics"]


class _Rank:
    def __init__(self, folder: Path, number: int, ranks: int, port: int) -> None:
        self.folder, self.number, self.ranks = folder, number, ranks
        self.killed = False
        threads = max(1, (os.cpu_count() or 1) // ranks)
        environment = {
            "OMP_NUM_THREADS": str(threads),
            **os.environ,
            "RANK": str(number),
            "WORLD_SIZE": str(ranks),
            "LOCAL_RANK": str(number),
            "LOCAL_WORLD_SIZE": str(ranks),
            "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            # As torchrun's workers: the store exists, connect to it.
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RUN_ID": folder.name,
            "TORCHELASTIC_RESTART_COUNT": "0",
        }
        with open(self._errors, "wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lightning_module.distributed.worker", str(folder)],
                env=environment,
                # Nothing is written to it: it closes when this process ends, however it ends.
                stdin=subprocess.PIPE,
                stdout=None if number == 0 else subprocess.DEVNULL,
                stderr=None if number == 0 else errors,
                # A terminal's Ctrl-C reaches this process alone, which forwards it once.
                start_new_session=True,
            )

    @property
    def _errors(self) -> Path:
        return self.folder / f"stderr-{self.number}.txt"

    def kill(self) -> None:
        if self.process.poll() is None:
            self.killed = True
            self.process.kill()
        self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()

    def outcome(self) -> dict[str, Any]:
        """The outcome that the rank wrote; empty if it was killed."""
        path = outcome_file(self.folder, self.number)
        return json.loads(path.read_text()) if path.is_file() else {}

    def error(self) -> BaseException:
        outcome = self.outcome()
        kind, text = outcome.get("kind"), outcome.get("text")
        if kind == Stopped.__name__:
            return Stopped(outcome["signal"], outcome["text"])
        if kind == Interrupted.__name__:
            return Interrupted(outcome["signal"])
        if kind in EXPECTED:
            return EXPECTED[kind](text)
        code = self.process.returncode
        if text is None:
            how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            said = self._errors.read_text(errors="replace").splitlines()[-20:]
            text = "\n".join([f"it ended by {how}", *said])
        return RankFailed(
            f"rank {self.number} of {self.ranks} failed, the others were ended: {text}"
        )


def outcome_file(folder: Path, number: int) -> Path:
    """The file to which a rank writes its outcome."""
    return folder / f"rank-{number}.json"


def _wait(ranks: list[_Rank], received: list[int]) -> None:
    """Waits until all ranks have ended, or the grace period is over.

    The period begins when a rank has failed or at the Ctrl-C that ends the run at once, because a
    rank that waits for another one in torch does not handle signals.
    """
    give_up = None
    while any(rank.process.poll() is None for rank in ranks):
        at_once = signal.SIGINT in received[1:]
        if give_up is None and (at_once or any(rank.process.poll() for rank in ranks)):
            give_up = time.monotonic() + _GRACE
        if give_up is not None and time.monotonic() > give_up:
            return
        time.sleep(0.05)


@contextmanager
def _forwarding_signals(ranks: list[_Rank]) -> Iterator[list[int]]:
    """Forwards SIGINT and SIGTERM to the ranks, which save and end; yields the received ones."""
    received: list[int] = []

    def forward(number: int, frame: Any) -> None:
        received.append(number)
        for rank in ranks:
            if rank.process.poll() is None:
                rank.process.send_signal(number)

    with handled_by(forward):
        yield received
